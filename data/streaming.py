"""Training clips that are heard as they are streamed: whole batches, shared out evenly over processes and workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from sailer.data.sampler import PlannedDataset
from sailer.data.schema import CorpusError

# Beside the canonical columns of a streamed split: where each recording is.
SHARD, ROW = "shard", "row"


class Recordings(Protocol):
    """Where a streamed split's recordings are, such as `sailer.data.corpora.hub_stream.StreamSource`."""

    def recordings(self, shard: int, first: int) -> Iterator[dict[str, Any]]:
        """The recordings of a shard from its row `first` on, as {path, bytes}."""
        ...


class StreamedClips(torch.utils.data.IterableDataset):
    """Batches of an epoch's items, as `PlannedDataset` has them, whose recordings come from a stream.

    The order of the shards is new each epoch, a function of seed and epoch; their rows, one shard after the other, are
    cut into as many equal parts as there are processes, and those into one for each data loader worker. So every
    process has as many batches as any other, and every clip is heard once an epoch (where the processes do not divide
    their number, the first ones of the epoch fill up the last process). Clips are shuffled among `buffer` neighbours.

    Args:
        planned: its rows have the columns `shard` and `row`; no clip is mixed with another.
        source: of the recordings.
        batch_size: clips of a batch of one process.
        seed: of the order.
        index, size: this process, and how many train.
        buffer: clips that wait, encoded, to be drawn from.
    """

    def __init__(
        self,
        planned: PlannedDataset,
        source: Recordings,
        batch_size: int,
        seed: int = 0,
        index: int = 0,
        size: int = 1,
        buffer: int = 1000,
    ) -> None:
        self.planned, self.source, self.batch_size = planned, source, batch_size
        self.seed, self.index, self.size, self.buffer = seed, index, size, buffer
        self.epoch = 0
        places = planned.dataset.select_columns([SHARD, ROW]).with_format("numpy")[:]
        self._shards, self._rows = places[SHARD], places[ROW]

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next pass."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        """Batches of this process, the same in all processes and epochs."""
        return math.ceil(math.ceil(len(self.planned) / self.size) / self.batch_size)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        batches = np.array_split(np.arange(len(self)), workers)[worker]
        if not len(batches):
            return
        own = self._own()[batches[0] * self.batch_size : (batches[-1] + 1) * self.batch_size]
        items = self._shuffled(self._items(own), np.random.default_rng([self.seed, self.epoch, self.index, worker]))
        while batch := list(islice(items, self.batch_size)):
            yield batch

    def _own(self) -> np.ndarray:
        """The plan's rows that this process hears in this epoch, in the order of the stream."""
        plan = self.planned.plan(self.epoch).select_columns(["index"]).with_format("numpy")[:]["index"]
        order = np.random.default_rng([self.seed, self.epoch]).permutation(int(self._shards.max()) + 1)
        sequence = np.lexsort((self._rows[plan], np.argsort(order)[self._shards[plan]]))
        each = math.ceil(len(sequence) / self.size)
        return sequence[np.arange(self.index * each, (self.index + 1) * each) % len(sequence)]

    def _items(self, own: np.ndarray) -> Iterator[dict[str, Any]]:
        shard, row = -1, 0
        stream: Iterator[dict[str, Any]] = iter(())
        for position in own.tolist():
            item = self.planned[self.epoch * len(self.planned) + position]
            clip = item["clips"][0]
            if clip[SHARD] != shard or clip[ROW] < row:
                shard, row = clip[SHARD], clip[ROW]
                stream = self.source.recordings(shard, row)
            recording = next(islice(stream, clip[ROW] - row, None), None)
            if recording is None:
                raise CorpusError(
                    f"Clip {clip['id']!r} is no longer in shard {shard} of the stream: the dataset was changed while "
                    "it was read. Start afresh."
                )
            row = clip[ROW] + 1
            yield {**item, "clips": [{**clip, "audio": recording}]}

    def _shuffled(self, items: Iterator[dict[str, Any]], generator: np.random.Generator) -> Iterator[dict[str, Any]]:
        waiting = list(islice(items, self.buffer))
        for item in items:
            drawn = int(generator.integers(len(waiting)))
            yield waiting[drawn]
            waiting[drawn] = item
        generator.shuffle(waiting)
        yield from waiting
