"""`sailer train` that records what it trains on and what its loss was made of; a small corpus to train on.

As a script, for several processes: `torchrun ... recorded_training.py RECORD_DIR train RECIPE --option value ...`.
"""

import csv
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import soundfile
import torch

if __package__:
    from .sounds import noise
else:  # run as a script
    from sounds import noise

LABELS = ("Angry", "Contempt", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise", "Other")
MAJORITY = ("Neutral", "Happy", "Sad", "Angry")
ANNOTATORS = 5
WORDS = ("so", "happy", "leave", "me", "alone", "what", "a", "day", "home", "now")


@dataclass
class Record:
    """What one process trained on.

    `batches` are as the collator made them, each with its `items`: the planned rows. `losses` are the calls of the
    objective in training, in the order of the steps: `outputs` and `targets` by name, and the `losses` that it gave.
    """

    batches: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[str, dict[str, torch.Tensor]]] = field(default_factory=list)

    def items(self) -> list[dict[str, Any]]:
        return [item for batch in self.batches for item in batch["items"]]


@contextmanager
def recording() -> Iterator[Record]:
    """Look on at every training in this process while the block runs; nothing is changed."""
    from sailer.data.collator import SailerCollator
    from sailer.training.losses import SailerObjective

    record, collate, judge = Record(), SailerCollator.__call__, SailerObjective.forward

    def collate_and_record(self: SailerCollator, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(self, items)
        if "index" in items[0]:  # rows of a plan: not of validation, test or a pass that keeps states
            plain = [{**item, "clips": [clip["id"] for clip in item["clips"]]} for item in items]
            record.batches.append({**batch, "items": plain})
        return batch

    def judge_and_record(
        self: SailerObjective, outputs: Mapping[str, Any], targets: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        losses = judge(self, outputs, targets)
        if self.training:
            parts = {"outputs": outputs, "targets": targets, "losses": losses}
            record.losses.append(
                {part: {name: value.detach().clone() for name, value in parts[part].items()} for part in parts}
            )
        return losses

    with (
        patch.object(SailerCollator, "__call__", collate_and_record),
        patch.object(SailerObjective, "forward", judge_and_record),
    ):
        yield record


def write_corpus(folder: Path, train: int = 24, validation: int = 9, test: int = 10) -> Path:
    """A manifest of noises, none of the length of another: five annotators who mostly agree, every target there is.

    Every seventh clip has no consensus. Classes take turns, the four common ones twice as often.
    """
    random = np.random.default_rng(5)
    rows = []
    for split, clips in (("train", train), ("validation", validation), ("test", test)):
        for clip in range(clips):
            name = f"{split}-{clip:02d}"
            label = (*LABELS, *MAJORITY)[clip % 13]
            soundfile.write(folder / f"{name}.wav", noise(0.4 + 0.02 * clip, len(rows)), 16000, subtype="PCM_16")
            votes = [label] * 3 + [str(other) for other in random.choice(LABELS, ANNOTATORS - 3)]
            row = {
                "id": name,
                "audio": f"{name}.wav",
                "split": split,
                "transcript": " ".join(random.choice(WORDS, 1 + clip % 5)),
                "label": "no agreement" if clip % 7 == 6 else label,
                "votes": ";".join(votes),
                "secondary": "Amused;Excited" if clip % 2 else "Frustrated",
                "speaker": f"{split}-{clip % 4}",
                "sex": ("female", "male")[clip % 2],
                "age": 20 + clip,
            }
            row |= {name: 1 + (clip * step) % 7 for step, name in enumerate(("arousal", "valence", "dominance"), 1)}
            rows.append(row)
    with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder / "clips.csv"


def read_corpus(manifest: Path, split: str) -> list[dict[str, str]]:
    """The manifest's lines of a split."""
    with open(manifest, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def distributions(rows: list[dict[str, str]]) -> np.ndarray:
    """(clips, 9) shares of the annotators, counted from the manifest."""
    return np.array([[row["votes"].split(";").count(label) / ANNOTATORS for label in LABELS] for row in rows])


def main() -> int:
    """Train, and leave the record of this process in a folder."""
    from sailer.cli import main as sailer

    folder = Path(sys.argv[1])
    with recording() as record:
        status = sailer(sys.argv[2:])
    torch.save(vars(record), folder / f"record-{os.environ.get('RANK', '0')}.pt")
    return status


if __name__ == "__main__":
    sys.exit(main())
