"""The one reader of audio: a path, a URL, bytes or an array goes in, a mono waveform at the wanted rate comes out.

What is asked for is bounded before it is allocated, and a file is decoded block by block, so that memory grows with
what is heard and never with what a header claims. Three cases are told apart:

- A header that claims more samples than its bytes can hold in any codec (`SAMPLES_PER_BYTE`), a rate outside `RATES`,
  or more than `MAXIMUM_SECONDS`, is an error, whatever could be decoded.
- A file that ends or is damaged before the length that its header gives was cut short: what was decoded up to there
  is used, with a warning. Uncompressed audio is always this case, because a size that is too large is what a broken
  download, a pipe and a recorder that was switched off leave.
- A file of which nothing can be decoded is an error.
"""

from __future__ import annotations

import io
import math
import numbers
import os
import re
import stat
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers.utils import logging

try:
    import soundfile
except ImportError:  # reported when a file is to be read: arrays need no reader
    soundfile = None
try:
    import soxr
except ImportError:  # reported when there is something to resample
    soxr = None
try:
    import av
except ImportError:  # reported when a file is MP4
    av = None

logger = logging.get_logger(__name__)

# The limits of what is taken.
MINIMUM_SECONDS = 0.1  # of what the processor and the pipeline hear
MAXIMUM_SECONDS = 4 * 3600.0  # of one recording: 0.9 GB at 16 kHz
RATES = (1000, 768_000)  # lowest and highest sampling rate, in Hz
MAXIMUM_AMPLITUDE = 1000.0  # full scale is 1: beyond are integers as floats, or garbage
SILENT_CHANNELS = 2  # an array of more channels is averaged with a warning: it may be a batch of clips
SAMPLES_PER_BYTE = 8192  # the densest there is, silence as FLAC, has 4,700
MAXIMUM_DOWNLOAD = 2**30  # bytes of a URL
DOWNLOAD_SECONDS = 300.0  # for the whole of a URL
STALL_SECONDS = 30.0  # without a byte of it

UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's word for a length that the header leaves open
CUT = "cut it into pieces, for instance with ffmpeg."
BYTES = (bytes, bytearray, memoryview)
BLOCK_VALUES = 2**15  # decoded at once: frames x channels
URL_PREFIXES = ("http://", "https://")
# What libsndfile's log says of WAV, AIFF, AU, W64 and RF64 whose header claims more bytes than there are.
SIZE_CORRECTED = re.compile(r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)


@dataclass
class Recording:
    """A float32 waveform of shape (samples,), and what should be known of it: cut short, many channels."""

    waveform: np.ndarray
    warning: str | None = None


def load_audio(
    source: Any, sampling_rate: int = 16000, max_seconds: float | None = None, name: str | None = None
) -> np.ndarray:
    """Read audio from wherever it is as one mono waveform; `read_audio`, with its warning logged.

    Returns:
        float32 waveform of shape (samples,).
    """
    recording = read_audio(source, sampling_rate, max_seconds, name)
    if recording.warning is not None:
        logger.warning(recording.warning)
    return recording.waveform


def trim_silence(waveform: np.ndarray, sampling_rate: int, decibels: float) -> np.ndarray:
    """A clip without the silence before and behind its speech, as `librosa.effects.trim` defines it: up to the first
    and from the last moment at which the power, averaged over 128 ms, is less than `decibels` below its highest.

    Args:
        waveform: (samples,).
        sampling_rate: in Hz.
        decibels: positive; a lower number cuts more.

    Returns:
        A view of it, no shorter than `MINIMUM_SECONDS` where the clip is not; digital silence is left whole.
    """
    hop, window, samples = round(0.032 * sampling_rate), round(0.128 * sampling_rate), len(waveform)
    energy = np.concatenate([[0.0], np.cumsum(np.square(waveform, dtype=np.float64))])
    starts = np.arange(0, samples + 1, hop) - window // 2
    power = energy[np.clip(starts + window, 0, samples)] - energy[np.clip(starts, 0, samples)]
    loud = np.flatnonzero(power > power.max() * 10 ** (-decibels / 10))
    if not len(loud):
        return waveform
    least = math.ceil(MINIMUM_SECONDS * sampling_rate)
    end = min(max((loud[-1] + 1) * hop, loud[0] * hop + least), samples)
    return waveform[max(min(loud[0] * hop, end - least), 0) : end]


def read_audio(
    source: Any, sampling_rate: int = 16000, max_seconds: float | None = None, name: str | None = None
) -> Recording:
    """Read audio from wherever it is.

    Args:
        source: a path or http(s) URL, the bytes of an audio file, `{"path", "bytes"}` (one of the two set), `{"array"
            or "raw", "sampling_rate"}`, a torchcodec decoder (as datasets' Audio columns give), or a waveform already
            at `sampling_rate`, of shape (samples,) or (channels, samples). Floats have a full scale of 1, integers
            that of their type, as in a WAV file (uint8 is centred at 128); int64, which Python's integers become,
            holds int16's values.
        sampling_rate: of the result, in Hz; other rates are resampled, channels averaged.
        max_seconds: read no more than this; by default all, and more than `MAXIMUM_SECONDS` is refused.
        name: what messages call the source.

    Returns:
        The waveform, with a warning where a file was cut short or an array has more than two channels.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, not a regular file, a URL that cannot be fetched, a list of several waveforms, empty,
            values that are not finite or beyond `MAXIMUM_AMPLITUDE`, or a rate or length out of the limits.
        ImportError: the package that this source needs is not installed.
    """
    values, rate, name = _unwrap(source, name)
    if rate is None and isinstance(values, (str, os.PathLike, *BYTES)):
        with _opened(values, name) as (file, size):
            recording = _decode(file, size, sampling_rate, max_seconds, name)
    else:
        warning = None
        if hasattr(values, "get_all_samples"):
            samples = values.get_all_samples()
            array, rate = _as_array(samples.data, name), samples.sample_rate
            array = array.mean(axis=0) if array.ndim == 2 and array.size else array
        else:
            array, warning = _mono(_as_array(values, name), name)
            rate = sampling_rate if rate is None else rate
        if array.ndim != 1:
            raise ValueError(
                f"{name} holds no audio (shape {array.shape}); expected (samples,) or (channels, samples)."
            )
        waveform, _ = _heard([array], _checked_rate(rate, name), sampling_rate, max_seconds, name)
        recording = Recording(waveform, warning)
    _check_values(recording.waveform, name)
    return recording


def _unwrap(source: Any, name: str | None) -> tuple[Any, Any, str]:
    """What a source holds, its sampling rate where it comes with one, and what messages call it."""
    if isinstance(source, Mapping):
        for key in ("array", "raw"):
            if source.get(key) is not None:
                if source.get("sampling_rate") is None:
                    raise ValueError(f"{name or 'The audio'} has {key!r} but no 'sampling_rate'; give it in Hz.")
                return source[key], source["sampling_rate"], name or "The waveform"
        content, path = source.get("bytes"), source.get("path")
        name = name or (None if path is None else str(path))
        source = path if content is None or (isinstance(content, BYTES) and len(content) == 0) else content
        if not isinstance(source, (str, os.PathLike, *BYTES)):
            raise ValueError(f"{name or 'The audio'} has no 'array', 'raw', 'bytes' or 'path' that can be read.")
    if isinstance(source, (str, os.PathLike)):
        return source, None, name or str(source)
    return source, None, name or ("The audio bytes" if isinstance(source, BYTES) else "The waveform")


@contextmanager
def _opened(source: Any, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """The encoded audio as a file, and its size in bytes."""
    if not isinstance(source, BYTES) and str(source).lower().startswith(URL_PREFIXES):
        source = _fetch(str(source))
    if isinstance(source, BYTES):
        yield io.BytesIO(source), len(source)
        return
    try:
        # Asked before it is opened: opening a FIFO waits for a writer, for ever where there is none.
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise ValueError("it is no file but a folder, pipe, socket or device")
        file = open(source, "rb")  # noqa: SIM115 - closed below, where errors are not those of opening
    except FileNotFoundError as error:
        if os.path.islink(source):
            raise FileNotFoundError(f"{name} is a link to {os.readlink(source)}, which does not exist.") from error
        raise FileNotFoundError(f"No such audio file: {name}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be opened: {error}") from error
    with file:
        yield file, os.fstat(file.fileno()).st_size


def _fetch(url: str) -> bytes:
    """A URL's content. In a thread, because a socket's timeout bounds neither a name's look-up nor bytes that drip."""
    outcome: list[bytes | Exception] = []
    deadline = time.monotonic() + DOWNLOAD_SECONDS

    def download() -> None:
        try:
            outcome.append(_download(url, deadline))
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    content = outcome[0] if outcome else TimeoutError(f"it took more than {DOWNLOAD_SECONDS:g} s")
    if isinstance(content, Exception):
        reason = str(content) if isinstance(content, (OSError, ValueError)) else f"{type(content).__name__}: {content}"
        raise ValueError(f"{url} cannot be fetched: {reason}") from content
    return content


def _download(url: str, deadline: float) -> bytes:
    opener = urllib.request.OpenerDirector()
    # No handler of file: or ftp:, to which a server might redirect.
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    with opener.open(url, timeout=STALL_SECONDS) as response:
        promised, content = response.length, bytearray()
        if promised is not None and promised > MAXIMUM_DOWNLOAD:
            raise ValueError(f"the server announces {promised} bytes; at most {MAXIMUM_DOWNLOAD} are taken")
        while chunk := response.read1(2**16):
            content += chunk
            if len(content) > MAXIMUM_DOWNLOAD:
                raise ValueError(f"the server sends more than {MAXIMUM_DOWNLOAD} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"it took more than {DOWNLOAD_SECONDS:g} s")
    if promised is not None and len(content) < promised:
        raise ValueError(f"the connection ended after {len(content)} of {promised} bytes")
    return bytes(content)


def _decode(file: BinaryIO, size: int, target: int, max_seconds: float | None, name: str) -> Recording:
    """A file's waveform at the rate `target`."""
    if soundfile is None:
        raise ImportError(f"Reading {name} needs the soundfile package (pip install soundfile).")
    is_real = os.name == "posix" and not isinstance(file, io.BytesIO)
    try:
        # By its descriptor libsndfile reads a file without asking Python for each piece.
        opened = soundfile.SoundFile(file.fileno() if is_real else file, closefd=False)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:
        file.seek(0)
        if file.read(8)[4:] == b"ftyp":
            file.seek(0)
            return _decode_mp4(file, size, target, max_seconds, name)
        reason = getattr(error, "error_string", error)
        raise ValueError(
            f"{name} is not readable audio ({reason}). Supported are WAV, FLAC, Ogg and MP3, and M4A where the av "
            "package is installed; convert other formats, for instance with ffmpeg."
        ) from error
    with opened:
        rate = _checked_rate(opened.samplerate, name)
        promised = opened.frames if opened.frames < UNKNOWN_FRAMES else None
        _check_claim(promised, rate, size, max_seconds, name)
        waveform, heard = _heard(_sound_blocks(opened), rate, target, max_seconds, name)
        for claimed, there in SIZE_CORRECTED.findall(opened.extra_info):
            promised = max(promised or 0, round(opened.frames * int(claimed) / max(int(there), 1)))
    return Recording(waveform, _cut_short(promised, heard, rate, max_seconds, name))


def _sound_blocks(opened: Any) -> Iterator[np.ndarray]:
    """What a `SoundFile` decodes to, in mono float32 blocks; it ends where the decoder gives up."""
    buffer = np.empty((max(1, BLOCK_VALUES // opened.channels), opened.channels), np.float32)
    is_over = False
    while not is_over:
        buffer.fill(np.nan)
        try:
            frames = len(opened.read(out=buffer))
            is_over = frames < len(buffer)
        except soundfile.SoundFileError:
            # What was written before it gave up is there, and is no NaN.
            frames = int(np.append(np.isnan(buffer[:, 0]), True).argmax())
            is_over = True
        if frames:
            yield buffer[:frames].mean(axis=1)


def _decode_mp4(file: BinaryIO, size: int, target: int, max_seconds: float | None, name: str) -> Recording:
    if av is None:
        raise ImportError(
            f"{name} is MP4 (M4A): reading it needs the av package (pip install av); or convert it, for instance with "
            "ffmpeg."
        )
    try:
        # The format is given, because others that FFmpeg might find are lists of further files and addresses.
        with av.open(file, mode="r", format="mp4") as container:
            if not container.streams.audio:
                raise ValueError(f"{name} holds no audio: it is an MP4 without sound.")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise ValueError(f"{name} is not readable audio: FFmpeg knows no decoder for it.")
            rate = _checked_rate(stream.rate, name)
            promised = None if stream.duration is None else round(stream.duration * stream.time_base * rate)
            _check_claim(promised, rate, size, max_seconds, name)
            failures: list[Exception] = []
            waveform, heard = _heard(_av_blocks(container, stream, failures), rate, target, max_seconds, name)
    except av.FFmpegError as error:
        raise ValueError(f"{name} is not readable audio ({error}).") from error
    warning = _cut_short(promised, heard, rate, max_seconds, name)
    if warning is None and failures:  # not every MP4 says how long it is
        warning = f"{name} is cut short or damaged: the {heard / rate:.2f} s that could be decoded are used."
    return Recording(waveform, warning)


def _av_blocks(container: Any, stream: Any, failures: list[Exception]) -> Iterator[np.ndarray]:
    """What an MP4's sound decodes to, in mono float32 blocks; it ends where the decoder gives up, which is noted."""
    planar = av.AudioResampler(format="fltp")
    try:
        for frame in container.decode(stream):
            for part in planar.resample(frame):
                yield part.to_ndarray().mean(axis=0)
    except av.FFmpegError as error:
        failures.append(error)


def _heard(
    blocks: Iterable[np.ndarray], rate: float, target: int, max_seconds: float | None, name: str
) -> tuple[np.ndarray, int]:
    """Mono blocks as one waveform at the rate `target`, and how many samples there were at the rate that they had."""
    limit = max(1, round((MAXIMUM_SECONDS if max_seconds is None else max_seconds) * rate))
    resample, heard, parts = _resampler(rate, target, name), 0, []
    for block in blocks:
        if heard + len(block) > limit and max_seconds is None:
            raise ValueError(f"{name} is longer than {MAXIMUM_SECONDS / 3600:g} h; {CUT}")
        block = block[: limit - heard]
        heard += len(block)
        parts.append(resample(block, False))
        if heard == limit and max_seconds is not None:
            break
    if heard == 0:
        raise ValueError(f"{name} holds no audio: it is empty, or nothing of it can be decoded.")
    parts.append(resample(np.zeros(0, np.float32), True))
    waveform, length = np.concatenate(parts), math.ceil(heard * target / rate)
    if len(waveform) < length:
        waveform = np.pad(waveform, (0, length - len(waveform)))
    return waveform[:length], heard


def _resampler(rate: float, target: int, name: str) -> Callable[[np.ndarray, bool], np.ndarray]:
    if rate == target:
        return lambda block, is_last: block
    if soxr is None:
        raise ImportError(f"{name} has {rate:g} Hz: resampling needs the soxr package (pip install soxr).")
    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    return lambda block, is_last: stream.resample_chunk(np.ascontiguousarray(block, np.float32), last=is_last)


def _checked_rate(rate: Any, name: str) -> float:
    if isinstance(rate, (np.ndarray, torch.Tensor)) and rate.ndim == 0:
        rate = rate.item()
    is_number = isinstance(rate, numbers.Real)
    if not is_number or not RATES[0] <= rate <= RATES[1]:
        raise ValueError(
            f"{name} has a sampling rate of {rate} Hz; it must be a number between {RATES[0]} and {RATES[1]}."
        )
    return float(rate)


def _check_claim(promised: int | None, rate: float, size: int, max_seconds: float | None, name: str) -> None:
    """Refuse a header's claims before anything is done about them."""
    if promised is not None and promised > SAMPLES_PER_BYTE * size:
        raise ValueError(
            f"{name} claims {promised} samples, more than {size} bytes can hold in any codec: its header is damaged "
            "or forged."
        )
    if promised is not None and max_seconds is None and promised > MAXIMUM_SECONDS * rate:
        raise ValueError(
            f"{name} claims {promised / rate / 3600:.1f} h, which is longer than {MAXIMUM_SECONDS / 3600:g} h; {CUT}"
        )


def _cut_short(promised: int | None, heard: int, rate: float, max_seconds: float | None, name: str) -> str | None:
    """What is said of a file that ended early. Lossy formats are some hundredths of a second off without harm."""
    if promised is None:
        return None
    wanted = promised / rate if max_seconds is None else min(promised / rate, max_seconds)
    if heard / rate >= wanted - MINIMUM_SECONDS:
        return None
    return (
        f"{name} is cut short or damaged: the {heard / rate:.2f} s that could be decoded are used; its header "
        f"promises {promised / rate:.2f} s."
    )


def _as_array(values: Any, name: str) -> np.ndarray:
    """Values as float32 of full scale 1, in the shape that they have."""
    if isinstance(values, (list, tuple)) and len(values) > 0 and _is_sequence(values[0]):
        raise ValueError(
            f"{name} is a list of {len(values)} waveforms: pass each recording as an item of its own, and channels as "
            "one array of shape (channels, samples)."
        )
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is no waveform: {error}") from error
    kind = array.dtype
    if kind == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if kind == np.int64:
        limits = np.iinfo(np.int16)
        if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
            raise ValueError(
                f"{name} holds integers from {array.min()} to {array.max()}, beyond int16: give int16, int32, or "
                "floats of full scale 1."
            )
        array, kind = array.astype(np.int16), np.dtype(np.int16)
    if np.issubdtype(kind, np.signedinteger):
        return array.astype(np.float32) / -float(np.iinfo(kind).min)
    if np.issubdtype(kind, np.floating):
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    raise ValueError(
        f"{name} holds no audio: {type(values).__name__} of {kind} where a path, a URL, bytes, or an array of floats, "
        "signed integers or uint8 is expected."
    )


def _is_sequence(value: Any) -> bool:
    """Whether this is a list or array of values rather than one value."""
    return isinstance(value, (list, tuple)) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 0)


def _mono(array: np.ndarray, name: str) -> tuple[np.ndarray, str | None]:
    """The mean of an array's channels, which are its shorter side, and what is to be said of it."""
    if array.ndim != 2 or array.size == 0:
        return array, None
    channels = min(array.shape)
    warning = None
    if channels > SILENT_CHANNELS:
        warning = (
            f"{name} has shape {array.shape}: it is heard as one recording, the mean of {channels} channels. Pass "
            "several recordings as a list of arrays."
        )
    return array.mean(axis=int(np.argmin(array.shape))), warning


def _check_values(waveform: np.ndarray, name: str) -> None:
    peak = max(float(waveform.max()), -float(waveform.min()))
    if not math.isfinite(peak):
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity).")
    if peak > MAXIMUM_AMPLITUDE:
        raise ValueError(
            f"{name} holds values up to {peak:.3g}, where full scale is 1 and at most {MAXIMUM_AMPLITUDE:g} is taken: "
            "divide integer samples by their type's limit."
        )


__all__ = ["MINIMUM_SECONDS", "Recording", "load_audio", "read_audio"]
