"""The input side of training alone, in clips a second: 16-bit WAV files -> batches, in data loader workers.

    python benchmarks/loader.py

writes clips of MSP-Podcast's durations (2.75 to 11 s, 5.8 s in the mean) to a temporary folder and reads them in the
Trainer's way, with Whisper's log-mel features made by transformers' extractor on the padded batch, by ours clip by
clip, and left to the device. How much of a batch is speech stands beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from datasets import Dataset
from transformers import WhisperFeatureExtractor

from sailer import SailerProcessor
from sailer.data.augmentation import AugmentationSettings
from sailer.data.collator import SailerCollator
from sailer.data.rendering import Item, render
from sailer.data.sampler import EpochSampler, PlannedDataset
from sailer.data.schema import LabelSet, build_dataset

RATE = 16000


class StockCollator:
    """Log-mel as transformers' extractor makes it of a padded batch; no targets, which take no time."""

    def __init__(self, extractor: WhisperFeatureExtractor) -> None:
        self.extractor = extractor

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        waveforms = [render(item, RATE, 15.0) for item in items]
        options = {"sampling_rate": RATE, "padding": "longest", "truncation": False, "return_attention_mask": True}
        return dict(self.extractor(waveforms, return_tensors="pt", **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=3200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2, help="processes that read, one core each")
    arguments = parser.parse_args()
    processor = SailerProcessor(WhisperFeatureExtractor(feature_size=80))
    log_mel = SailerCollator(processor, LabelSet(), ["primary", "secondary", "attributes"])
    waveforms = SailerCollator(processor, LabelSet(), ["primary", "secondary", "attributes"], log_mel=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = write_clips(Path(folder), arguments.clips)
        print(f"{len(rows)} clips of {np.mean(rows['duration']):.2f} s, {arguments.workers} workers")
        print(f"{'features':34}{'batches':14}{'clips/s':>9}{'speech':>8}")
        for name, collator, alike in (
            ("log-mel, transformers, padded", StockCollator(processor.feature_extractor), False),
            ("log-mel, clip by clip", log_mel, False),
            ("log-mel, clip by clip", log_mel, True),
            ("waveforms, for the device", waveforms, True),
        ):
            speed, speech = measure(rows, collator, alike, arguments.batch_size, arguments.workers)
            print(f"{name:34}{'like length' if alike else 'random':14}{speed:9.0f}{speech:8.1%}", flush=True)


def write_clips(folder: Path, count: int) -> Dataset:
    """Canonical rows of noise in 16-bit WAV files."""
    generator = np.random.default_rng(0)
    seconds = np.clip(generator.lognormal(np.log(5.4), 0.42, count), 2.75, 11)
    for index, duration in enumerate(seconds):
        samples = generator.normal(0, 3000, round(duration * RATE)).clip(-32768, 32767).astype(np.int16)
        soundfile.write(folder / f"{index}.wav", samples, RATE)
    return build_dataset(
        {
            "id": [str(index) for index in range(count)],
            "audio": [{"path": str(folder / f"{index}.wav"), "bytes": None} for index in range(count)],
            "duration": seconds,
            "votes": np.eye(9)[generator.integers(0, 9, count)],
        }
    )


def measure(
    rows: Dataset, collator: StockCollator | SailerCollator, alike: bool, batch_size: int, workers: int
) -> tuple[float, float]:
    """Clips a second once the workers run, and the share of the batches' frames that is speech."""
    dataset = PlannedDataset(rows, AugmentationSettings())
    lengths = dataset.seconds if alike else None
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        sampler=EpochSampler(len(dataset), lengths=lengths, step=batch_size),
        collate_fn=collator,
        num_workers=workers,
    )
    heard = frames = 0
    started = counted = 0.0
    for number, batch in enumerate(loader):
        mask = batch["attention_mask"]
        heard, frames = heard + int(mask.sum()), frames + mask.numel()
        if number == 2 * workers:
            started = time.perf_counter()
        elif number > 2 * workers:
            counted += len(mask)
    return counted / (time.perf_counter() - started), heard / frames


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    main()
