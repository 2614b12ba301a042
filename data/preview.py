"""Augmented clips to listen to, with their targets, and what augmentation does to the distribution of classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from sailer.data.atomic import adding_to_folder
from sailer.data.labels import distribution
from sailer.data.rendering import clips_of, render, transcript_of
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import ATTRIBUTES, SECONDARY_LABELS

TARGETS_FILE = "targets.json"
DISTRIBUTION_FILE = "class_distribution.png"


def preview(dataset: PlannedDataset, n: int, output_dir: str | Path, sampling_rate: int = 16000) -> Path:
    """Write the first epoch's first `n` augmented clips as WAV files, their targets, and a chart of the classes.

    Mixes come first, then clips that lost annotations or their transcript, then others.

    Args:
        dataset: the training clips under augmentation, with their audio.
        n: how many clips; all there are, if that is less.
        output_dir: where `targets.json`, `class_distribution.png` and the WAV files go.
        sampling_rate: of the WAV files, in Hz.

    Returns:
        The folder.
    """
    plan = dataset.plan(0).with_format("numpy")[:]
    votes = np.asarray(dataset.dataset.select_columns(["votes"]).with_format("numpy")["votes"][:])
    unchanged = (plan["votes"] == votes[plan["index"]]).all(axis=1) & ~plan["drop_text"]
    order = np.lexsort((unchanged, plan["partner"] < 0))
    with adding_to_folder(output_dir) as folder:
        descriptions = []
        for number, row in enumerate(order[:n].tolist()):
            item = dataset[row]
            file = f"{number:03d}.wav"
            soundfile.write(folder / file, render(item, sampling_rate, dataset.settings.max_seconds), sampling_rate)
            descriptions.append({"file": file, **_description(item, dataset.label_set.labels)})
        text = json.dumps(descriptions, indent=2, ensure_ascii=False)
        (folder / TARGETS_FILE).write_text(text + "\n", encoding="utf-8")
        before, after = np.nanmean(distribution(votes), axis=0), np.nanmean(plan["target"], axis=0)
        _plot(before, after, dataset.label_set.labels, folder / DISTRIBUTION_FILE)
    return Path(output_dir)


def _description(item: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    clips, gap = clips_of(item)

    def shares(values: Sequence[float], names: Sequence[str]) -> dict[str, float]:
        return {name: round(value, 4) for name, value in zip(names, values, strict=True) if value == value}

    return {
        "clips": [clip["id"] for clip in clips],
        "silence_seconds": round(max(gap, 0.0), 4),
        "overlap_seconds": round(max(-gap, 0.0), 4),
        "speed": round(item["speed"], 4),
        "transcript": transcript_of(item),
        "kept_votes": shares(item["votes"], labels),
        "target": shares(item["target"], labels),
        "hard_target": shares(item["hard_target"], labels),
        "secondary_target": shares(item["secondary_target"], SECONDARY_LABELS),
        "attribute_target": shares(item["attribute_target"], ATTRIBUTES),
    }


def _plot(before: np.ndarray, after: np.ndarray, labels: Sequence[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(labels))
    for offset, shares, name in ((-0.2, before, "corpus"), (0.2, after, "one augmented epoch")):
        bars = axes.bar(places + offset, 100 * shares, width=0.4, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks(places, labels, rotation=30, ha="right")
    axes.set_ylabel("share of the targets (%)")
    axes.set_title("Distribution of classes before and after augmentation")
    axes.legend()
    figure.savefig(path, dpi=150)
