"""Rows of each epoch: samplers, whose keys carry the epoch, and the dataset that looks up an epoch's plan."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from sailer.data.augmentation import AugmentationSettings, plan_epoch
from sailer.data.schema import LabelSet

# Batches of like length are cut from so many steps' rows: at most 2 % of the corpus' lengths in each.
STEPS_PER_POOL = 50


class EpochSampler(torch.utils.data.Sampler[int]):
    """Keys `epoch * num_rows + row`: every row once per epoch, in an order that depends on (seed, epoch) alone.

    The epoch travels in the key because that is the one thing that reaches every process and every persistent worker.

    With `lengths` and `step` the rows of a training step are of like length, so that little of a batch is padding; see
    `like_length`. Steps are consecutive rows: however many processes and accumulated batches share a step, it holds
    the same clips.

    Args:
        num_rows: rows per epoch.
        seed: not negative; the order of the rows.
        shuffle: whether to shuffle them.
        lengths: of an epoch's rows, (num_rows,), by the epoch's number.
        step: rows of a training step, over all processes.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int = 0,
        shuffle: bool = True,
        lengths: Callable[[int], np.ndarray] | None = None,
        step: int = 1,
    ) -> None:
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle
        self.lengths, self.step = lengths, step
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass; accelerate and the Trainer call it."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        rows = np.arange(self.num_rows)
        if self.shuffle:
            generator = np.random.default_rng([self.seed, self.epoch])
            generator.shuffle(rows)
            if self.lengths is not None:
                rows = rows[like_length(self.lengths(self.epoch)[rows], self.step, generator)]
        return iter((self.epoch * self.num_rows + rows).tolist())


def like_length(lengths: np.ndarray, step: int, generator: np.random.Generator) -> np.ndarray:
    """An order in which each `step` consecutive items are of like length and the steps come at random.

    Items are taken about `STEPS_PER_POOL` steps at a time as they stand (shuffle them first), sorted, and cut into
    steps. What does not fill a step, of a length drawn at random, comes last.

    Args:
        lengths: (items,).
        step: items per step.
        generator: draws the order of the steps.

    Returns:
        (items,) positions in `lengths`.
    """
    full = len(lengths) // step
    pools = max(full // STEPS_PER_POOL, 1)
    edges = step * (full * np.arange(pools + 1) // pools)
    edges[-1] = len(lengths)
    steps, last = [], np.arange(0)
    for start, end in itertools.pairwise(edges):
        pool = start + np.argsort(lengths[start:end], kind="stable")
        if rest := len(pool) % step:
            begin = step * int(generator.integers(len(pool) // step + 1))
            last, pool = pool[begin : begin + rest], np.delete(pool, np.s_[begin : begin + rest])
        steps += list(pool.reshape(-1, step))
    return np.concatenate([*(steps[position] for position in generator.permutation(len(steps))), last])


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Positions by falling length, unknown (NaN) ones first: what may not fit in memory fails at once."""
    return np.argsort(-np.nan_to_num(np.asarray(lengths, dtype=np.float64), nan=np.inf), kind="stable")


class LongestFirst(torch.utils.data.Sampler[int]):
    """The rows of a split by falling `lengths` (rows,), for evaluation batches of like length."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.order = longest_first(lengths)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())


class PlannedDataset(torch.utils.data.Dataset):
    """Clips under augmentation; the plan of an epoch is made by whichever process first asks for one of its rows.

    An item is what the collator renders: `clips` (one or two canonical rows, in playing order), `gap` (seconds,
    positive for silence, negative for overlap), `speed` and the plan's targets (see `augmentation.plan_features`).

    Args:
        dataset: clips in the canonical row; the audio column may be missing where features are cached.
        settings: the augmentations.
        label_set: the primary label set of the clips.
        seed: of the plans.
        num_proc: processes that make a plan, outside of data loader workers.

    Raises:
        CorpusError: the settings do not fit the corpus (see `augmentation.plan_epoch`).
    """

    def __init__(
        self,
        dataset: Dataset,
        settings: AugmentationSettings,
        label_set: LabelSet | None = None,
        seed: int = 0,
        num_proc: int | None = None,
    ) -> None:
        self.dataset, self.settings, self.label_set = dataset, settings, label_set or LabelSet()
        self.seed, self.num_proc = seed, num_proc
        self._plans: OrderedDict[int, Dataset] = OrderedDict()
        self._durations: np.ndarray | None = None
        self._rows_per_epoch = len(self.plan(0))

    def __len__(self) -> int:
        """Rows per epoch, the same for every epoch."""
        return self._rows_per_epoch

    def __getitem__(self, key: int) -> dict[str, Any]:
        epoch, row = divmod(int(key), len(self))
        plan = self.plan(epoch)[row]
        clips = [self.dataset[plan["index"]]]
        if plan["partner"] >= 0:
            clips.insert(0 if plan["partner_first"] else 1, self.dataset[plan["partner"]])
        return {"clips": clips, **plan}

    def plan(self, epoch: int) -> Dataset:
        """The plan table of an epoch; with `augmentation_variants` K, that of epoch modulo K."""
        variants = self.settings.augmentation_variants
        epoch = epoch % variants if variants else epoch
        if epoch not in self._plans:
            in_worker = torch.utils.data.get_worker_info() is not None
            with without_progress_bars():
                plan = plan_epoch(
                    self.dataset,
                    self.settings,
                    self.label_set,
                    self.seed,
                    epoch,
                    num_proc=None if in_worker else self.num_proc,
                )
            self._plans[epoch] = plan
            # Two: a loader that reads ahead may ask for rows of the next epoch before the last of this one.
            while len(self._plans) > max(variants, 2):
                self._plans.popitem(last=False)
        return self._plans[epoch]

    def seconds(self, epoch: int) -> np.ndarray:
        """(rows,) how long each row of an epoch sounds; an unknown duration is the longest."""
        limit = self.settings.max_seconds
        if self._durations is None:
            self._durations = self.dataset.select_columns(["duration"]).with_format("numpy")["duration"][:]
            self._durations = np.minimum(np.nan_to_num(self._durations, nan=limit), limit)
        plan = self.plan(epoch).select_columns(["index", "partner", "gap", "speed"]).with_format("numpy")[:]
        own, other = self._durations[plan["index"]], self._durations[plan["partner"]]
        gap = np.maximum(plan["gap"], -np.minimum(own, other))
        heard = np.where(plan["partner"] < 0, own, np.minimum(own + gap + other, limit))
        return np.minimum(heard / plan["speed"], limit)

    def renderings(self) -> list[tuple[int, int, float, float]]:
        """Everything that is ever heard, each once: rows of the first clip and the second (-1: none), the gap and the
        speed.

        Raises:
            ValueError: every epoch has mixes or speeds of its own.
        """
        settings = self.settings
        if not settings.augmentation_variants:
            if settings.mixing_probability or settings.speed_perturbation:
                what, own = (
                    ("audio mixing", "mixes") if settings.mixing_probability else ("speed_perturbation", "speeds")
                )
                raise ValueError(
                    f"With {what} every epoch has {own} of its own, whose features cannot be kept. Set "
                    "augmentation_variants to the number of plans to cycle through, or cache_features to off."
                )
            return [(row, -1, 0.0, 1.0) for row in range(len(self.dataset))]
        found: dict[tuple[int, int, float, float], None] = {}
        for variant in range(settings.augmentation_variants):
            plan = self.plan(variant).with_format("numpy")
            index, partner, partner_first = (plan[name][:] for name in ("index", "partner", "partner_first"))
            first = np.where(partner_first, partner, index)
            second = np.where(partner_first, index, partner)
            played = (plan["gap"][:].tolist(), plan["speed"][:].tolist())
            found |= dict.fromkeys(zip(first.tolist(), second.tolist(), *played, strict=True))
        return list(found)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": OrderedDict()}


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence for a table that takes a second, once per epoch in every process."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
