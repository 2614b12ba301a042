"""Votes -> targets (distribution, consensus, agreement, entropy), and free text -> classes (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from sailer.data.schema import NO_AGREEMENT, PRIMARY_LABELS, SECONDARY_LABELS, UNLABELLED, CorpusError

if TYPE_CHECKING:
    from datasets import Dataset

_MISSPELT = {"dissapointed": "disappointed"}
_FREE_TEXT = "other"


def distribution(votes: np.ndarray) -> np.ndarray:
    """Each clip's votes as shares, (clips, labels) counts -> (clips, labels) rows that sum to 1; NaN without votes."""
    votes = np.asarray(votes, dtype=np.float64)
    total = votes.sum(axis=-1, keepdims=True)
    return np.divide(votes, total, out=np.full_like(votes, np.nan), where=total > 0)


def shuffle_labels(rows: Dataset, seed: int) -> Dataset:
    """The rows with everything that was annotated moved to other rows at random: audio and labels no longer match."""
    from datasets import concatenate_datasets

    order = np.random.default_rng(seed).permutation(len(rows))
    annotated = ["votes", "secondary_votes", "attributes", "label"]
    annotated += ["teacher"] * ("teacher" in rows.column_names)
    labels = rows.select_columns(annotated).select(order).flatten_indices()
    return concatenate_datasets([rows.remove_columns(annotated), labels], axis=1)


def consensus(votes: np.ndarray) -> np.ndarray:
    """The plurality class, (clips, labels) -> (clips,) int16: -1 where first place is shared, -100 without votes."""
    votes = np.asarray(votes, dtype=np.float64)
    # Counts mixed or spread as fractions tie only up to rounding.
    first = np.isclose(votes, votes.max(axis=-1, keepdims=True), rtol=1e-5, atol=0)
    label = np.where(first.sum(axis=-1) == 1, votes.argmax(axis=-1), NO_AGREEMENT)
    return np.where(votes.sum(axis=-1) > 0, label, UNLABELLED).astype(np.int16)


def agreement(votes: np.ndarray) -> np.ndarray:
    """The share of a clip's votes that its most frequent class has, (clips, labels) -> (clips,); NaN without votes."""
    return distribution(votes).max(axis=-1)


def entropy(votes: np.ndarray) -> np.ndarray:
    """Entropy of each clip's votes in nats, (clips, labels) -> (clips,): 0 when all agree, NaN without votes."""
    shares = distribution(votes)
    return -np.sum(shares * np.log(shares, out=np.zeros_like(shares), where=shares != 0), axis=-1)


def fleiss_kappa(votes: np.ndarray) -> float:
    """Agreement between annotators beyond chance, over the clips that have at least two votes; NaN if there are none.

    Fleiss (1971), with each clip's own number of annotators: the mean share of agreeing pairs of votes against the
    share expected from the classes' frequencies.
    """
    votes = np.asarray(votes, dtype=np.float64)
    votes = votes[votes.sum(axis=-1) >= 2]
    if not len(votes):
        return float("nan")
    total = votes.sum(axis=-1)
    observed = np.mean(((votes**2).sum(axis=-1) - total) / (total * (total - 1)))
    expected = np.sum((votes.sum(axis=0) / votes.sum()) ** 2)
    return float((observed - expected) / (1 - expected)) if expected < 1 else 1.0


@cache
def primary_label(text: str) -> str:
    """The primary class that an annotator's answer names: `text` in any case and spacing, "Other-..." being Other.

    Raises:
        CorpusError: neither one of the nine nor an "Other-...".
    """
    key = _key(text)
    if key.startswith(_FREE_TEXT):
        return "Other"
    if key not in _PRIMARY_KEYS:
        raise CorpusError(f"unknown primary emotion {text!r}; known are {list(PRIMARY_LABELS)} and 'Other-...'")
    return _PRIMARY_KEYS[key]


@cache
def secondary_labels(text: str) -> tuple[str, ...]:
    """The secondary classes in a comma-separated answer, each once, in the order of `SECONDARY_LABELS`.

    A tag that is one of the 17, or "Other-" and one of the 17, in any case and spacing, is that class. Any other text
    is Other: a comma inside a free text makes its second half a tag of its own, which is Other as its first half was.
    """
    found = set()
    for tag in text.split(","):
        key = _key(tag)
        if key:
            found.add(_SECONDARY_KEYS.get(_key(key.removeprefix(f"{_FREE_TEXT}-")), "Other"))
    return tuple(label for label in SECONDARY_LABELS if label in found)


def match_label(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` is, ignoring case and spaces, or None."""
    key = _key(name)
    return next((label for label in known if _key(label) == key), None)


def _key(text: str) -> str:
    key = "".join(text.split()).casefold()
    return _MISSPELT.get(key, key)


_PRIMARY_KEYS = {_key(label): label for label in PRIMARY_LABELS}
_SECONDARY_KEYS = {_key(label): label for label in SECONDARY_LABELS}
