"""The canonical row: what every corpus loader returns and everything downstream reads."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

PRIMARY_LABELS = ("Angry", "Contempt", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise", "Other")
MAJORITY_LABELS = ("Neutral", "Happy", "Sad", "Angry")
SECONDARY_LABELS = (
    *("Angry", "Sad", "Happy", "Amused", "Neutral", "Frustrated", "Depressed", "Surprise", "Concerned", "Disgust"),
    *("Disappointed", "Excited", "Confused", "Annoyed", "Fear", "Contempt", "Other"),
)
ATTRIBUTES = ("arousal", "valence", "dominance")

NO_AGREEMENT = -1
UNLABELLED = -100


class CorpusError(ValueError):
    """A corpus, file or row that cannot be read as asked; the message names it and the way out."""


@dataclass(frozen=True, init=False)
class LabelSet:
    """The primary emotions of a system: all of them, the majority classes, and the classes that are scored.

    Args:
        labels: class names; their order is the order of every votes vector and of the logits.
        majority: classes whose annotations are dropped and whose clips are mixed with minority ones.
        scored: classes that decisions choose from and metrics average over; by default all but "Other".

    Raises:
        CorpusError: a duplicate label, or a majority or scored class that is not among the labels.
    """

    labels: tuple[str, ...]
    majority: tuple[str, ...]
    scored: tuple[str, ...]

    def __init__(
        self,
        labels: Sequence[str] = PRIMARY_LABELS,
        majority: Sequence[str] = MAJORITY_LABELS,
        scored: Sequence[str] | None = None,
    ) -> None:
        if scored is None:
            scored = [label for label in labels if label != "Other"]
        for name, value in (("labels", labels), ("majority", majority), ("scored", scored)):
            object.__setattr__(self, name, tuple(value))
        if len(set(self.labels)) != len(self.labels) or not self.labels:
            raise CorpusError(f"The label set {list(self.labels)} is empty or names a class twice.")
        for name in ("majority", "scored"):
            unknown = [label for label in getattr(self, name) if label not in self.labels]
            if unknown:
                raise CorpusError(f"{name} classes {unknown} are not among the labels {list(self.labels)}.")

    @property
    def minority(self) -> tuple[str, ...]:
        """Scored classes that are not majority classes, in label order."""
        return tuple(label for label in self.labels if label in self.scored and label not in self.majority)

    def indices(self, names: Sequence[str]) -> list[int]:
        """Positions of `names` in the label order."""
        return [self.labels.index(name) for name in names]

    def index(self, name: str) -> int:
        """Position of one label.

        Raises:
            CorpusError: the label is unknown; the message lists the known ones.
        """
        if name not in self.labels:
            raise CorpusError(f"Unknown label {name!r}; the label set is {list(self.labels)}.")
        return self.labels.index(name)


@dataclass
class CorpusReport:
    """What a loader left out (reason -> clip ids or files) and what it noticed; nothing is skipped silently."""

    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, item: str) -> None:
        """Count `item` as left out for `reason`."""
        self.left_out.setdefault(reason, []).append(item)

    def note(self, message: str) -> None:
        """Record something the user should know that left nothing out."""
        self.notes.append(message)

    def lines(self, examples: int = 3) -> list[str]:
        """One line per reason (with a count and a few examples), then the notes."""
        lines = []
        for reason, items in self.left_out.items():
            shown = ", ".join(items[:examples]) + (", ..." if len(items) > examples else "")
            lines.append(f"left out {len(items)}: {reason} ({shown})")
        return lines + self.notes

    def log(self, corpus: str) -> None:
        """Log every line, as a warning where clips were left out."""
        for line in self.lines():
            logger.log(logging.WARNING if line.startswith("left out") else logging.INFO, "%s: %s", corpus, line)


def canonical_features(label_set: LabelSet | None = None) -> Any:
    """`datasets.Features` of the canonical row for a label set."""
    from datasets import Features, List, Value

    number_of_labels = len((label_set or LabelSet()).labels)
    return Features(
        {
            "id": Value("string"),
            "audio": {"path": Value("string"), "bytes": Value("binary")},
            "duration": Value("float32"),
            "transcript": Value("string"),
            "votes": List(Value("float32"), length=number_of_labels),
            "secondary_votes": List(Value("float32"), length=len(SECONDARY_LABELS)),
            "attributes": List(Value("float32"), length=len(ATTRIBUTES)),
            "label": Value("int16"),
            "speaker": Value("string"),
            "sex": Value("string"),
            "age": Value("float32"),
        }
    )


def build_dataset(columns: Mapping[str, Sequence[Any] | np.ndarray], label_set: LabelSet | None = None) -> Any:
    """Canonical `datasets.Dataset` from columns; the optional ones may be missing and become "unknown".

    Args:
        columns: column name -> values of equal length. `id` is required. `audio` holds {"path", "bytes"} mappings
            or None (labels only). votes (clips, labels), secondary_votes (clips, 17) and attributes (clips, 3) may be
            arrays.
        label_set: the primary label set.

    Raises:
        CorpusError: no id column, an unknown column, unequal lengths, a duplicate id, a vector of the wrong width,
            a negative vote, or a label outside the label set; the message names the clip.
    """
    import pyarrow as pa
    from datasets import Dataset

    label_set = label_set or LabelSet()
    features = canonical_features(label_set)
    if "id" not in columns:
        raise CorpusError(f"No 'id' column among {sorted(columns)}: every clip needs a unique id.")
    unknown = sorted(set(columns) - set(features))
    if unknown:
        raise CorpusError(f"Columns {unknown} are not part of the canonical row, which has {list(features)}.")
    ids = [str(value) for value in columns["id"]]
    unequal = {name: len(values) for name, values in columns.items() if len(values) != len(ids)}
    if unequal:
        raise CorpusError(f"{len(ids)} ids but other columns have other lengths: {unequal}.")
    if len(set(ids)) != len(ids):
        twice = next(value for value, count in Counter(ids).items() if count > 1)
        raise CorpusError(f"Clip id {twice!r} occurs twice: ids must be unique within a split.")

    labels = np.asarray(columns.get("label", np.full(len(ids), UNLABELLED)), dtype=np.int16).reshape(-1)
    wrong = ((labels < 0) & (labels != NO_AGREEMENT) & (labels != UNLABELLED)) | (labels >= len(label_set.labels))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise CorpusError(f"Clip {ids[row]!r} has label {labels[row]}; the label set is {list(label_set.labels)}.")

    def vectors(name: str, width: int, default: float) -> pa.Array:
        values = np.asarray(columns.get(name, np.full((len(ids), width), default)), dtype=np.float32)
        if values.size and (values.ndim != 2 or values.shape[1] != width):
            raise CorpusError(f"Column {name!r} has shape {values.shape}, expected ({len(ids)}, {width}).")
        bad = (values < 0) | (np.isinf(values))
        if name == "attributes":
            bad |= values > 1
        else:
            bad |= np.isnan(values)
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise CorpusError(f"Clip {ids[row]!r} has an impossible {name} vector {values[row].tolist()}.")
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), type=pa.float32()), width)

    def scalars(name: str, default: Any) -> Sequence[Any] | np.ndarray:
        return columns.get(name, [default] * len(ids))

    audio = [item or {"path": None, "bytes": None} for item in scalars("audio", None)]
    both = [i for i, item in enumerate(audio) if item.get("path") and item.get("bytes")]
    if both:
        raise CorpusError(f"Clip {ids[both[0]]!r} has both an audio path and audio bytes; set one of the two.")
    schema = features.arrow_schema
    arrays = {
        "id": pa.array(ids, pa.string()),
        "audio": pa.array(
            [{"path": i.get("path") or None, "bytes": i.get("bytes") or None} for i in audio],
            type=schema.field("audio").type,
        ),
        "duration": pa.array(np.asarray(scalars("duration", np.nan), dtype=np.float32)),
        "transcript": pa.array([value or "" for value in scalars("transcript", "")], pa.string()),
        "votes": vectors("votes", len(label_set.labels), 0.0),
        "secondary_votes": vectors("secondary_votes", len(SECONDARY_LABELS), 0.0),
        "attributes": vectors("attributes", len(ATTRIBUTES), np.nan),
        "label": pa.array(labels),
        "speaker": pa.array([value or "" for value in scalars("speaker", "")], pa.string()),
        "sex": pa.array([value or "" for value in scalars("sex", "")], pa.string()),
        "age": pa.array(np.asarray(scalars("age", np.nan), dtype=np.float32)),
    }
    table = pa.table({name: arrays[name].cast(schema.field(name).type) for name in features})
    return Dataset(table.replace_schema_metadata(schema.metadata))
