"""Emotions of audio that never ends: blocks of any size and rate go in, a result per hop comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
import soxr
import torch

from sailer.audio_sailer import MINIMUM_SECONDS, read_audio
from sailer.pipeline_sailer import SETS, SpeechEmotionPipeline
from sailer.windows_sailer import SHORTEST_LAST_WINDOW, at_least, set_of

SHORTEST_HOP = 0.02  # seconds: encoders have a frame in 20 ms, and between two frames is nothing new
MOST_CHANNELS = 32  # of a block: more are samples, in a block of shape (channels, samples)
BLOCK_SAMPLES = 2**16  # resampled at once
# Given to the stream itself, by its own names.
OWN_OPTIONS = {"chunk_length_s": "chunk_s", "stride_length_s": "hop_s", "return_timestamps": "hop_s"}


class EmotionStream:
    """
    A pipeline's results over a sliding window of audio that arrives piece by piece, in bounded memory.

    ```python
    >>> stream = EmotionStream(classifier, chunk_s=3, hop_s=1, top_k=1)
    >>> for block in microphone:
    ...     for result in stream.feed(block, sampling_rate=48000):
    ...         print(result)
    {'timestamp': (0.0, 3.0), 'primary': [{'label': 'Happy', 'score': 0.71}]}
    >>> stream.close()
    [{'timestamp': (1.0, 3.6), 'primary': [{'label': 'Neutral', 'score': 0.55}]}]
    ```

    The windows are those of the pipeline with `chunk_length_s=chunk_s, stride_length_s=(0, chunk_s - hop_s)` over the
    whole recording, the last, shorter one (of `close`) too, however the audio was cut into blocks. A window of silence
    is judged when the stream is made, so that what cannot be is told before there is audio to lose, and the first
    result is as quick as the others. A stream belongs to one thread at a time; several may share a pipeline.

    Args:
        classifier: a `SpeechEmotionPipeline`, of any backend.
        chunk_s: seconds that a result hears; no longer than the encoder takes.
        hop_s: seconds from one result to the next, at most `chunk_s`: otherwise audio would go unheard.
        smooth_s: time constant of an exponential smoothing, in seconds: from the result before, t seconds ago, each
            goes 1 - exp(-t / smooth_s) of the way to what its own window gives. Scores, attributes, age and embedding
            are smoothed, and the decision and the set are taken on them. 0 (the default) for none.
        options: of the pipeline's call: `top_k`, `return_all`, `return_embedding`, `prior`, `function_to_apply`,
            `coverage`, `coverage_by_class`, and `transcriber`, which hears each window of a system that reads
            transcripts.

    Raises:
        ValueError: a length out of its range, a chunk longer than the encoder takes, an option's value, or a system
            that needs transcripts without a transcriber.
        TypeError: an unknown option.
    """

    def __init__(
        self, classifier: SpeechEmotionPipeline, chunk_s: float, hop_s: float, smooth_s: float = 0.0, **options: Any
    ) -> None:
        for name, own in OWN_OPTIONS.items():
            if name in options:
                raise TypeError(f"{name} is the pipeline's; a stream's windows are told by {own}.")
        at_least("chunk_s", chunk_s, MINIMUM_SECONDS)
        at_least("hop_s", hop_s, SHORTEST_HOP)
        at_least("smooth_s", smooth_s, 0)
        if hop_s > chunk_s:
            raise ValueError(
                f"hop_s is {hop_s} and chunk_s {chunk_s}: what lies between two chunks would go unheard; choose a "
                "hop_s up to chunk_s."
            )
        self.classifier, self.smooth_s = classifier, smooth_s
        self.rate: int = classifier.processor.sampling_rate
        self.chunk, self.hop = round(chunk_s * self.rate), round(hop_s * self.rate)
        self.shortest = min(self.chunk, round(SHORTEST_LAST_WINDOW * self.rate))
        given = getattr(classifier, "_postprocess_params", {}) | options
        self.return_all, self.top_k = bool(given.get("return_all", False)), given.get("top_k")
        self.options = options
        self._sets = {name: given[name] for name in SETS if name in given}
        try:
            self._judged(np.zeros(self.chunk, np.float32))
        except ValueError as error:
            raise ValueError(f"Windows of {chunk_s:g} s (chunk_s) cannot be judged: {error}") from error
        if smooth_s:  # takes all labels, and the decision with them
            self.options = options | {"return_all": True, "top_k": None}
        self._buffer = np.empty(2 * self.chunk, np.float32)
        self.reset()

    def reset(self) -> None:
        """Forget all audio, the rate and the smoothing: the next block is the first."""
        self._given_rate: float | None = None
        self._resampler: Any = None
        self._fed = 0  # samples at the rate they came in
        self._first = self._held = 0  # place in the stream of what the buffer begins with, and how much it holds
        self._next = 0  # place where the next window begins
        self._last: tuple[float, dict[str, Any]] | None = None  # end of the last window, and its smoothed result
        self._results: list[dict[str, Any]] = []  # not yet handed out
        self._errors: list[Exception] = []  # not yet raised
        self._is_closed = False

    @property
    def seconds(self) -> float:
        """Audio that was fed until now."""
        return self._fed / (self._given_rate or self.rate)

    def feed(self, block: Any, sampling_rate: float | None = None) -> list[dict[str, Any]]:
        """Hear a block.

        Args:
            block: of shape (samples,) or (samples, channels), of any length: floats of full scale 1, or integers,
                whose full scale is their type's. Channels are averaged.
            sampling_rate: of the block, in Hz; by default that of the blocks before, and of the first the model's.

        Returns:
            A result for each window that is full now, mostly none: `{"timestamp": (start, end), ...}` in seconds from
            the stream's beginning, with what the pipeline's `return_timestamps` gives beside it.

        Raises:
            ValueError: the stream is closed, the rate changed, or the block is no audio (the message says which, and
                when in the stream); then nothing of the block was heard. What the pipeline raises for a window is
                raised once the whole block is heard: the results of other windows come with the next call, and the
                stream goes on.
        """
        name = f"The block at {self.seconds:.2f} s"
        if self._is_closed:
            raise ValueError(f"{name} came after close(): call reset() for a new stream.")
        rate = sampling_rate if sampling_rate is not None else (self._given_rate or self.rate)
        if self._given_rate is not None and rate != self._given_rate:
            raise ValueError(
                f"{name} has {rate} Hz and those before had {self._given_rate:g} Hz: close() the stream and begin "
                "another, or call reset()."
            )
        waveform = _mono(block, rate, name)
        if self._given_rate is None:
            self._given_rate = float(rate)
            if rate != self.rate:
                self._resampler = soxr.ResampleStream(rate, self.rate, 1, dtype="float32", quality="HQ")
        for start in range(0, len(waveform), BLOCK_SAMPLES):
            piece = waveform[start : start + BLOCK_SAMPLES]
            self._fed += len(piece)
            self._hear(piece if self._resampler is None else self._resampler.resample_chunk(piece))
        return self._hand_out()

    def close(self) -> list[dict[str, Any]]:
        """End the stream.

        Returns:
            The last result, of a window that ends where the audio does (and reaches back over at least a second of it,
            where there is so much); none if a full window ended there, and at a second call.

        Raises:
            ValueError: all of the audio is shorter than 0.1 s, or the pipeline failed on the window.
        """
        if self._is_closed:
            return self._hand_out()
        self._is_closed = True
        if self._resampler is not None and self._given_rate is not None:
            rest = self._resampler.resample_chunk(np.empty(0, np.float32), last=True)
            # As long as the whole would be, resampled at once.
            missing = max(0, math.ceil(self._fed * self.rate / self._given_rate) - self._end)
            self._hear(np.pad(rest[:missing], (0, max(0, missing - len(rest)))))
        end = self._end
        full = self._next - self.hop + self.chunk  # where the last full window ended
        if end == 0 or (self._next > 0 and full >= end):
            return self._hand_out()
        if end < MINIMUM_SECONDS * self.rate:
            raise ValueError(
                f"The stream ended after {1000 * end / self.rate:.0f} ms of audio; at least "
                f"{1000 * MINIMUM_SECONDS:.0f} are needed."
            )
        start = min(self._next, max(0, end - self.shortest))
        self._judge(start, end)
        return self._hand_out()

    def run(self, blocks: Iterable[Any], sampling_rate: float | None = None) -> Iterator[dict[str, Any]]:
        """The results of blocks as they come, and at their end that of `close`; see `feed`."""
        for block in blocks:
            yield from self.feed(block, sampling_rate)
        yield from self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget the audio. The last result is only to be had from `close`, within the block."""
        self.reset()
        self._is_closed = True

    @property
    def _end(self) -> int:
        return self._first + self._held

    def _hear(self, waveform: np.ndarray) -> None:
        """Take in samples at the model's rate, and judge each window that they fill."""
        while len(waveform):
            if self._held == len(self._buffer):
                # What no window will reach back to goes; the last one of all may be longer than the hop leaves it.
                keep = max(self._first, min(self._next, self._end - self.shortest))
                kept = self._buffer[keep - self._first : self._held].copy()
                self._buffer[: len(kept)] = kept
                self._first, self._held = keep, len(kept)
            taken, waveform = np.split(waveform, [len(self._buffer) - self._held])
            self._buffer[self._held : self._held + len(taken)] = taken
            self._held += len(taken)
            while self._next + self.chunk <= self._end:
                start = self._next
                self._next += self.hop
                self._judge(start, start + self.chunk)

    def _judge(self, start: int, end: int) -> None:
        try:
            # A copy, as a backend may keep what it is given.
            result = self._judged(self._buffer[start - self._first : end - self._first].copy())
        except Exception as error:  # raised once the audio behind it is safe
            error.add_note(f"Of the stream's window from {start / self.rate:.2f} to {end / self.rate:.2f} s")
            self._errors.append(error)
            return
        result["timestamp"] = (start / self.rate, end / self.rate)
        self._results.append(self._smoothed(result) if self.smooth_s else result)

    def _judged(self, window: np.ndarray) -> dict[str, Any]:
        fixed = {"chunk_length_s": 0, "stride_length_s": 0, "return_timestamps": True, "on_error": "raise"}
        (result,) = self.classifier({"array": window, "sampling_rate": self.rate}, **self.options | fixed)
        return result

    def _smoothed(self, result: dict[str, Any]) -> dict[str, Any]:
        end = result["timestamp"][1]
        if self._last is not None:
            before, previous = self._last
            share = -math.expm1((before - end) / self.smooth_s)
            for name in result.keys() & previous.keys() - {"timestamp", "label", "set", "transcript"}:
                result[name] = _mixed(previous[name], result[name], share)
        if "primary" in result:
            scores = {row["label"]: row["score"] for row in result["primary"]}
            config = self.classifier.model.config
            result["label"] = max(config.scored_labels, key=scores.__getitem__)
            if "set" in result:
                result["set"] = set_of(config, scores, **self._sets)
        self._last = end, result
        shown = dict(result)
        if "primary" in shown:
            shown["primary"] = shown["primary"][: self.top_k]
        main = list(shown)[:2]  # the timestamp, and what the system has first
        return shown if self.return_all else {name: shown[name] for name in main}

    def _hand_out(self) -> list[dict[str, Any]]:
        if self._errors:
            first, *others = self._errors
            if others:
                first.add_note(f"and {len(others)} more windows of the block failed")
            self._errors = []
            raise first
        results, self._results = self._results, []
        return results


def _mono(block: Any, rate: Any, name: str) -> np.ndarray:
    """A block as float32 of shape (samples,). `read_audio` takes the shorter axis for channels."""
    if isinstance(block, torch.Tensor):
        block = block.detach().cpu()
        block = (block.float() if block.is_floating_point() else block).numpy()
    array = np.atleast_1d(np.asarray(block))
    if array.ndim > 2 or (array.ndim == 2 and not 1 <= array.shape[1] <= MOST_CHANNELS):
        raise ValueError(
            f"{name} has shape {array.shape}; expected (samples,) or (samples, channels) of at most {MOST_CHANNELS} "
            "channels."
        )
    # Of an empty block the rate is checked too.
    values = array.reshape(-1) if array.size else np.zeros(1, np.float32)
    checked = read_audio({"array": values, "sampling_rate": rate}, rate, name=name).waveform
    return checked[: array.size].reshape(array.shape).mean(axis=1) if array.ndim == 2 else checked[: array.size]


def _mixed(before: Any, now: Any, share: float) -> Any:
    """before + share * (now - before), of numbers and arrays, and of all numbers in dicts and in lists of scores."""
    if isinstance(now, dict):
        return {name: _mixed(before[name], value, share) for name, value in now.items()}
    if isinstance(now, list):
        old = {row["label"]: row["score"] for row in before}
        rows = [{"label": row["label"], "score": _mixed(old[row["label"]], row["score"], share)} for row in now]
        return sorted(rows, key=lambda row: row["score"], reverse=True)
    return before + share * (now - before)


__all__ = ["EmotionStream"]
