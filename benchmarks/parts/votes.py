"""RAVDESS, whose clips have one acted emotion each, as a corpus with the challenge's rarity and annotators' votes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import DatasetDict

from sailer.data.labels import consensus
from sailer.data.schema import LabelSet
from sailer.data.synthetic import simulate_votes
from sailer.data.synthetic.emotions import TRAIN_COUNTS

TEST_ACTORS, VALIDATION_ACTORS = 6, 2


def draw_actors(seed: int, actors: int) -> dict[str, list[int]]:
    """Which of RAVDESS's actors 1 to `actors` test, validate and train: another draw for each seed, half of each split
    being men (odd numbers) and half women."""
    rng = np.random.default_rng(seed)
    men, women = (rng.permutation(np.arange(first, actors + 1, 2)) for first in (1, 2))
    order = [int(actor) for pair in zip(men, women, strict=True) for actor in pair]
    cut = TEST_ACTORS + VALIDATION_ACTORS
    return {
        "test_actors": sorted(order[:TEST_ACTORS]),
        "validation_actors": sorted(order[TEST_ACTORS:cut]),
        "train_actors": sorted(order[cut:]),
    }


def with_votes(corpus: DatasetDict, label_set: LabelSet, *, seed: int, annotators: int, fewest: int) -> DatasetDict:
    """The corpus with fewer training clips, whose votes are simulated and whose labels are their consensus.

    As many clips of each emotion are kept as the challenge's training set has in proportion to the commonest, but at
    least `fewest` (or all). Validation and test keep all clips, and the acted emotion as their label.

    Args:
        corpus: RAVDESS in canonical rows.
        label_set: its primary emotions.
        seed: of the choice of the clips and of the votes.
        annotators: the fewest votes of a clip; it has up to two more.
        fewest: clips of an emotion that are kept at least.
    """
    rows = corpus["train"]
    kept = _choose(np.asarray(rows["label"]), label_set, seed, fewest)
    emotions = [label_set.labels[label] for label in np.asarray(rows["label"])[kept]]
    votes = simulate_votes(emotions, label_set, annotators, seed)
    columns: Mapping[str, Any] = {"votes": votes.tolist(), "label": consensus(votes).tolist()}
    chosen = rows.select(kept).flatten_indices()
    for name, values in columns.items():
        feature = chosen.features[name]
        chosen = chosen.remove_columns(name).add_column(name, values, feature=feature)
    return DatasetDict(corpus | {"train": chosen.select_columns(rows.column_names)})


def _choose(labels: np.ndarray, label_set: LabelSet, seed: int, fewest: int) -> np.ndarray:
    """Places of the clips that are kept, in order."""
    rng = np.random.default_rng([seed, len(labels)])
    places = {name: np.flatnonzero(labels == label_set.index(name)) for name in label_set.labels}
    commonest = max((name for name in places if len(places[name])), key=lambda name: TRAIN_COUNTS[name])
    kept = []
    for name, found in places.items():
        share = TRAIN_COUNTS[name] / TRAIN_COUNTS[commonest]
        wanted = max(fewest, round(share * len(places[commonest])))
        kept.append(rng.permutation(found)[:wanted])
    return np.sort(np.concatenate(kept))
