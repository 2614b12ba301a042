"""The one reader of audio: a path, a URL, bytes or an array goes in, a mono waveform at the wanted rate comes out."""

from __future__ import annotations

import io
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    import soundfile
except ImportError:  # reported when a file is to be read: arrays need no reader
    soundfile = None

MINIMUM_SECONDS = 0.1


def load_audio(
    source: Any, sampling_rate: int = 16000, max_seconds: float | None = None, name: str | None = None
) -> np.ndarray:
    """Read audio from wherever it is as one mono waveform.

    Args:
        source: a path or http(s) URL, the bytes of an audio file, `{"path", "bytes"}` (one of the two set), `{"array"
            or "raw", "sampling_rate"}`, a torchcodec decoder (as datasets' Audio columns give), or a waveform already
            at `sampling_rate`, of shape (samples,) or (channels, samples).
        sampling_rate: of the result, in Hz; other rates are resampled, channels averaged.
        max_seconds: read no more than this.
        name: what error messages call the source.

    Returns:
        float32 waveform of shape (samples,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, a URL that cannot be fetched, empty, with values that are not finite, or a sampling rate
            that is not positive.
    """
    array, rate, name = _decode(source, sampling_rate, max_seconds, name)
    if not rate > 0:
        raise ValueError(f"{name} has a sampling rate of {rate} Hz; it must be positive.")
    if array.ndim == 2 and array.size:
        array = array.mean(axis=int(np.argmin(array.shape)))  # (channels, samples) or (samples, channels)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} holds no audio (shape {array.shape}); expected (samples,) or (channels, samples).")
    if max_seconds is not None:
        array = array[: max(1, round(max_seconds * rate))]
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity).")
    if rate != sampling_rate:
        try:
            import librosa
        except ImportError as error:
            raise ImportError(f"{name} has {rate} Hz: resampling needs librosa (pip install librosa).") from error
        array = librosa.resample(array, orig_sr=rate, target_sr=sampling_rate)
    return np.ascontiguousarray(array, dtype=np.float32)


def _decode(
    source: Any, sampling_rate: int, max_seconds: float | None, name: str | None
) -> tuple[np.ndarray, float, str]:
    if isinstance(source, Mapping):
        for key in ("array", "raw"):
            if source.get(key) is not None:
                if "sampling_rate" not in source:
                    raise ValueError(f"{name or 'The audio'} has {key!r} but no 'sampling_rate'; give it in Hz.")
                return _as_array(source[key]), source["sampling_rate"], name or "The waveform"
        name = name or source.get("path")
        source = source.get("bytes") or source.get("path")
        if source is None:
            raise ValueError(f"{name or 'The audio'} has no 'array', 'raw', 'bytes' or 'path'.")
    if isinstance(source, (str, os.PathLike)):
        name = name or str(source)
        if str(source).startswith(("http://", "https://")):
            return *_read(io.BytesIO(_fetch(str(source))), max_seconds, name), name
        if not Path(source).is_file():
            raise FileNotFoundError(f"No such audio file: {source}")
        return *_read(source, max_seconds, name), name
    if isinstance(source, (bytes, bytearray)):
        return *_read(io.BytesIO(source), max_seconds, name or "The audio bytes"), name or "The audio bytes"
    if hasattr(source, "get_all_samples"):
        samples = source.get_all_samples()
        return _as_array(samples.data), samples.sample_rate, name or "The audio"
    return _as_array(source), sampling_rate, name or "The waveform"


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()
    except OSError as error:
        raise ValueError(f"{url} cannot be fetched: {error}") from error


def _as_array(values: Any) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if np.issubdtype(array.dtype, np.integer):
        # Integer samples are full scale at their type's limit, as in a WAV file.
        return array.astype(np.float32) / -float(np.iinfo(array.dtype).min or -1)
    return array.astype(np.float32, copy=False)


def _read(file: Any, max_seconds: float | None, name: str) -> tuple[np.ndarray, int]:
    if soundfile is None:
        raise ImportError(f"Reading {name} needs the soundfile package (pip install soundfile).")
    try:
        with soundfile.SoundFile(file) as opened:
            frames = -1 if max_seconds is None else max(1, round(max_seconds * opened.samplerate))
            return opened.read(frames, dtype="float32", always_2d=True).T, opened.samplerate
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{name} is not readable audio ({error}). Supported are WAV, FLAC, Ogg and MP3; convert other formats, "
            "for instance with ffmpeg."
        ) from error


__all__ = ["MINIMUM_SECONDS", "load_audio"]
