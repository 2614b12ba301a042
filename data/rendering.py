"""Clips in, what is heard out: one clip, or two with silence between them or overlapping (paper, section 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import soxr

from sailer.audio_sailer import MINIMUM_SECONDS, load_audio
from sailer.data.schema import CorpusError

Item = Mapping[str, Any]
RenderingKey = tuple[str | float, ...]


def clips_of(item: Item) -> tuple[list[Item], float]:
    """Canonical rows of an item in playing order, and the gap between them in seconds.

    Args:
        item: a canonical row, or an item of `sampler.PlannedDataset`.
    """
    return (item["clips"], item["gap"]) if "clips" in item else ([item], 0.0)


def rendering_key(item: Item) -> RenderingKey:
    """What is heard: equal for two items that sound the same. Clip ids in playing order, then the gap of a mix, then
    the speed where it is not their own."""
    clips, gap = clips_of(item)
    ids = tuple(clip["id"] for clip in clips)
    mixed = (gap,) if len(ids) > 1 else ()
    return ids + mixed + changed_speed(item.get("speed", 1.0))


def changed_speed(speed: float) -> tuple[float, ...]:
    """What tells a speed from clips' own: nothing, where it is that."""
    return () if speed == 1 else (speed,)


def transcript_of(item: Item) -> str:
    """What is said, in playing order; "" where no clip has a transcript or the plan withholds it."""
    if item.get("drop_text"):
        return ""
    return " ".join(clip["transcript"] for clip in clips_of(item)[0] if clip["transcript"].strip())


def render(item: Item, sampling_rate: int, max_seconds: float) -> np.ndarray:
    """Decode an item's clips, mix them and play that at its speed, float32 of at most `max_seconds`; of what is longer
    the beginning.

    Raises:
        CorpusError: a clip that cannot be decoded or is too short; the message names it.
    """
    clips, gap = clips_of(item)
    waveforms = [_decode(clip, sampling_rate, max_seconds) for clip in clips]
    limit = int(max_seconds * sampling_rate)
    heard = waveforms[0]
    if len(waveforms) == 2:
        heard = mix(heard, waveforms[1], gap=round(gap * sampling_rate), limit=limit)
    return play_at(heard, item.get("speed", 1.0), sampling_rate)[:limit]


def play_at(waveform: np.ndarray, speed: float, sampling_rate: int) -> np.ndarray:
    """A waveform (samples,) played faster or slower, with a higher or lower pitch: (about samples / speed,).

    A clip that would be shorter than `MINIMUM_SECONDS` is played no faster than that allows.
    """
    speed = min(speed, max(len(waveform) / (MINIMUM_SECONDS * sampling_rate), 1.0))
    if speed == 1:
        return waveform
    shortest = math.ceil(MINIMUM_SECONDS * sampling_rate)
    played = soxr.resample(waveform, speed * sampling_rate, sampling_rate).astype(np.float32, copy=False)
    return np.pad(played, (0, max(shortest - len(played), 0)))


def mix(first: np.ndarray, second: np.ndarray, gap: int, limit: int | None = None) -> np.ndarray:
    """Two clips one after the other, of n1 + n2 + gap samples, or `limit` if that is less.

    An overlap that is longer than a clip is shortened to it: the shorter clip then lies wholly within the longer one.
    A mix over the limit crops each clip to its share first, so that both are heard: half of the speech each, and
    what a shorter clip does not need goes to the other. Where the sum exceeds full scale the whole mix is scaled down
    to a peak of 1, which keeps the clips' balance and distorts nothing.

    Args:
        first: (n1,) float waveform, heard first.
        second: (n2,) float waveform.
        gap: samples of silence between the two if positive, of overlap (summed) if negative.
        limit: longest mix in samples.

    Returns:
        float32 waveform.

    Raises:
        ValueError: the limit leaves no room for the clips beside the silence.
    """
    if limit is not None and limit < max(gap, 0) + 2:
        raise ValueError(
            f"A mix of at most {limit} samples has no room for two clips around {gap} samples of silence."
        )
    gap = max(gap, -len(first), -len(second))
    if limit is not None:
        gap = max(gap, -limit)
        first, second = _shares(first, second, limit - gap)
    start = len(first) + gap
    mixed = np.zeros(max(start + len(second), len(first)), dtype=np.float32)
    mixed[: len(first)] += first
    mixed[start : start + len(second)] += second
    return mixed / max(1.0, float(np.abs(mixed).max(initial=0)))


def _shares(first: np.ndarray, second: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Beginnings of both clips, together at most `budget` samples, as evenly as their lengths allow."""
    kept = min(len(first), max(budget - budget // 2, budget - len(second)))
    return first[:kept], second[: max(budget - kept, 0)]


def _decode(clip: Item, sampling_rate: int, max_seconds: float) -> np.ndarray:
    try:
        waveform = load_audio(clip["audio"], sampling_rate, max_seconds)
    except (OSError, ValueError) as error:
        raise CorpusError(f"Clip {clip['id']!r} cannot be read: {error}") from error
    seconds = len(waveform) / sampling_rate
    if seconds < MINIMUM_SECONDS:
        raise CorpusError(
            f"Clip {clip['id']!r} is {seconds:.3f} s long; the minimum is {MINIMUM_SECONDS} s. Leave it out."
        )
    return waveform
