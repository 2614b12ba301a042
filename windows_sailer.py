"""A recording on its way through the pipeline: cut into windows, prepared ahead of the model, outputs as they come."""

from __future__ import annotations

import math
import numbers
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

Number = TypeVar("Number", int, float)

SHORTEST_LAST_WINDOW = 1.0
# Errors whose text is meant for whoever passed the recording; of others the kind is told too.
ITEM_ERRORS = (ValueError, TypeError, OSError, ImportError)


@dataclass
class Clip:
    """One input on its way through the pipeline: its windows, and their outputs as they arrive."""

    windows: list[np.ndarray] = field(default_factory=list)
    timestamps: list[tuple[float, float]] = field(default_factory=list)
    text: str | None = None
    warning: str | None = None
    error: Exception | None = None
    texts: dict[int, str] = field(default_factory=dict)
    outputs: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return self.error is not None or len(self.outputs) == len(self.timestamps)

    @property
    def message(self) -> str:
        """What the error says; never empty."""
        told = isinstance(self.error, ITEM_ERRORS) and str(self.error)
        return str(self.error) if told else f"{type(self.error).__name__}: {self.error}"


def cut_windows(
    samples: int, rate: int, chunk_length_s: float, stride_length_s: float | tuple[float, float] | None
) -> list[tuple[int, int]]:
    """First and last sample of each window: all but the last are a chunk long and start a chunk less strides apart.

    Raises:
        ValueError: a length that is no number or negative, or strides that leave nothing of a window at this rate.
    """
    chunk = round(at_least("chunk_length_s", chunk_length_s, 0) * rate)
    strides = chunk_length_s / 6 if stride_length_s is None else stride_length_s
    if not isinstance(strides, (list, tuple)):
        strides = (strides, strides)
    if len(strides) != 2:
        raise ValueError(f"stride_length_s is {stride_length_s}; give one number of seconds, or two: left and right.")
    left, right = strides
    step = (
        chunk
        - round(at_least("stride_length_s", left, 0) * rate)
        - round(at_least("stride_length_s", right, 0) * rate)
    )
    if chunk > 0 and step <= 0:
        raise ValueError(
            f"stride_length_s ({left} and {right} s) leaves nothing of a window of {chunk_length_s} s; choose less."
        )
    if chunk == 0 or samples <= chunk:
        return [(0, samples)]
    windows = [(start, min(start + chunk, samples)) for start in range(0, samples - chunk + step, step)]
    start, end = windows[-1]
    shortest = min(chunk, round(SHORTEST_LAST_WINDOW * rate))
    return [*windows[:-1], (min(start, end - shortest), end)]


def run_ahead(prepare: Callable[[Any], Clip], items: Iterable[Any], workers: int, batch_size: int) -> Iterator[Clip]:
    """`prepare` of each item, in order; with workers in threads, some items ahead."""
    if workers == 0:
        yield from map(prepare, items)
        return
    pending: deque[Future[Clip]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            pending.append(pool.submit(prepare, item))
            if len(pending) > workers + batch_size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def at_least(option: str, value: Number, least: float) -> Number:
    """`value`; raises ValueError by the option's name where it is no finite number, or less than `least`."""
    if not isinstance(value, numbers.Real) or not least <= value < math.inf:
        raise ValueError(f"{option} is {value!r}; it must be at least {least}.")
    return value


def count_of(option: str, value: int, least: int) -> int:
    """`value`; raises ValueError by the option's name where it is no whole number, or less than `least`."""
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{option} is {value!r}; it must be a whole number.")
    return at_least(option, value, least)


__all__ = ["ITEM_ERRORS", "Clip", "at_least", "count_of", "cut_windows", "run_ahead"]
