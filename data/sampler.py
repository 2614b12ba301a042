"""Training rows of each epoch: a sampler whose keys carry the epoch, and the dataset that looks up its plan."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from sailer.data.augmentation import AugmentationSettings, plan_epoch
from sailer.data.schema import LabelSet


class EpochSampler(torch.utils.data.Sampler[int]):
    """Keys `epoch * num_rows + row`: every row once per epoch, in an order that depends on (seed, epoch) alone.

    The epoch travels in the key because that is the one thing that reaches every process and every persistent worker.

    Args:
        num_rows: rows per epoch.
        seed: not negative; the order of the rows.
        shuffle: whether to shuffle them.
    """

    def __init__(self, num_rows: int, seed: int = 0, shuffle: bool = True) -> None:
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass; accelerate and the Trainer call it."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        rows = np.arange(self.num_rows)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(rows)
        return iter((self.epoch * self.num_rows + rows).tolist())


class PlannedDataset(torch.utils.data.Dataset):
    """Clips under augmentation; the plan of an epoch is made by whichever process first asks for one of its rows.

    An item is what the collator renders: `clips` (one or two canonical rows, in playing order), `gap` (seconds,
    positive for silence, negative for overlap) and the plan's targets (see `augmentation.plan_features`).

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
            with _without_progress_bars():
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

    def renderings(self) -> list[tuple[int, int, float]]:
        """Everything that is ever heard, each once: rows of the first clip and the second (-1: none), and the gap.

        Raises:
            ValueError: every epoch has mixes of its own.
        """
        settings = self.settings
        if not settings.augmentation_variants:
            if settings.mixing_probability:
                raise ValueError(
                    "With audio mixing every epoch has mixes of its own, whose features cannot be kept. Set "
                    "augmentation_variants to the number of plans to cycle through, or cache_features to off."
                )
            return [(row, -1, 0.0) for row in range(len(self.dataset))]
        found: dict[tuple[int, int, float], None] = {}
        for variant in range(settings.augmentation_variants):
            plan = self.plan(variant).with_format("numpy")
            index, partner, partner_first = (plan[name][:] for name in ("index", "partner", "partner_first"))
            first = np.where(partner_first, partner, index)
            second = np.where(partner_first, index, partner)
            found |= dict.fromkeys(zip(first.tolist(), second.tolist(), plan["gap"][:].tolist(), strict=True))
        return list(found)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": OrderedDict()}


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Silence for a table that takes a second, once per epoch in every process."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
