"""Corpora in the canonical row, their labels, augmentation plans and batches."""

from sailer.data.corpora import load_corpus
from sailer.data.schema import (
    ATTRIBUTES,
    MAJORITY_LABELS,
    NO_AGREEMENT,
    PRIMARY_LABELS,
    SECONDARY_LABELS,
    UNLABELLED,
    CorpusError,
    CorpusReport,
    LabelSet,
)

__all__ = [
    "ATTRIBUTES",
    "MAJORITY_LABELS",
    "NO_AGREEMENT",
    "PRIMARY_LABELS",
    "SECONDARY_LABELS",
    "UNLABELLED",
    "CorpusError",
    "CorpusReport",
    "LabelSet",
    "load_corpus",
]
