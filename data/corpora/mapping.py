"""Columns as a user has them -> canonical columns, by a small mapping from a recipe; what several loaders share."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sailer.data.corpora import label_indices, nearest
from sailer.data.corpora.files import Problems, clip_id
from sailer.data.corpora.splits import split_name
from sailer.data.labels import consensus, match_label
from sailer.data.schema import (
    ATTRIBUTES,
    NO_AGREEMENT,
    SECONDARY_LABELS,
    UNLABELLED,
    CorpusError,
    CorpusReport,
    LabelSet,
)

COLUMN_KEYS = (
    *("id", "audio", "duration", "transcript", "label", "votes", "secondary", "attributes"),
    *("speaker", "sex", "age", "split", "annotator"),
)
NO_AGREEMENT_NAME = "no agreement"
_SEXES = {"f": "female", "female": "female", "w": "female", "m": "male", "male": "male"}
_SHARED_KEYS = ("duration", "transcript", "speaker", "sex", "age", "split")
_CLIP_FIELDS = ("id", "row", "votes", "secondary_votes", "attributes", "label", *_SHARED_KEYS)
_DROPPED = object()


def label_positions(
    names: Sequence[str],
    label_set: LabelSet,
    report: CorpusReport,
    label_names: Mapping[str, str | None] | None = None,
) -> dict[str, int | None]:
    """Where a corpus's own emotion names stand in a label set, in the order of `names`.

    Args:
        names: the corpus's names.
        label_set: the primary emotions wanted.
        report: notes what counts as Other.
        label_names: corpus name -> label, or None to drop the emotion. A name that is not mentioned is the label of
            the same name (ignoring case and spaces), else "Other" where the label set has it.

    Raises:
        CorpusError: `label_names` has a name that the corpus or the label set has not, or a name finds no place.
    """
    wanted: dict[str, str | None] = {name: match_label(name, label_set.labels) or name for name in names}
    for name, label in (label_names or {}).items():
        if name not in wanted:
            raise CorpusError(f"label_names: {name!r} is none of the corpus's {list(names)}{nearest(name, names)}.")
        wanted[name] = None if label is None else _known_label(name, label, label_set)
    indices = label_indices(dict.fromkeys(label for label in wanted.values() if label), label_set, report)
    for name, label in wanted.items():
        if label is not None and indices[label] is None:
            raise CorpusError(
                f"Emotion {name!r} has no place in the label set {list(label_set.labels)}: add it or 'Other' there, "
                f"or give the option label_names: {{{name}: a label of the set}} (null drops its clips and votes)."
            )
    return {name: None if label is None else indices[label] for name, label in wanted.items()}


@dataclass(frozen=True)
class TableOptions:
    """The options of a corpus that is read from a table of anyone's making (`manifest`, `hub`):

        columns:
          audio: file                # the recording, relative to the table
          transcript: text
          label: emotion             # the clip's class; or, in rows per annotation, the annotator's answer
          votes: {Angry: n_angry, Sad: n_sad}   # or one column that lists the annotators' answers
          secondary: others          # a list, or names separated by commas, semicolons or bars
          attributes: {arousal: act, valence: val, dominance: dom}
          speaker: who
          split: part
        label_names: {ang: Angry, xxx: no agreement, oth: null}
        attribute_scale: [1, 5]

    Args:
        columns: canonical key -> column, of id, audio, duration, transcript, label, votes, secondary, attributes,
            speaker, sex, age, split and annotator. By default the columns that bear these names.
        rows: "clip" or "annotation" for one row per annotator's answer; by default the latter if an annotator column
            is named.
        label_names: names in the table -> label, "no agreement", or null to leave such clips and votes out.
        attribute_scale: the lowest and highest rating.
        split_names: names in the table -> train, validation, test, ...
        split_fractions: without a split column, the share of clips of each split but train, such as
            {validation: 0.1, test: 0.1}; no speaker is in two. By default all clips are in train.
        audio_folder: what the recordings' paths are relative to, and may not leave; by default the table's folder.
        splits: which to load; by default all.
        minimum_seconds: leave out shorter clips.
    """

    columns: Mapping[str, Any] | None = None
    rows: str | None = None
    label_names: Mapping[Any, str | None] | None = None
    attribute_scale: Sequence[float] = (1, 7)
    split_names: Mapping[Any, str] | None = None
    split_fractions: Mapping[str, float] | None = None
    audio_folder: str | Path | None = None
    splits: Sequence[str] | str | None = None
    minimum_seconds: float = 0.0


def check_columns(columns: Mapping[str, Any] | None, present: Sequence[str], source: str) -> dict[str, Any]:
    """A recipe's `columns` mapping after checking it against the columns that are there.

    By default every column that bears the name of a key is taken for it, and columns arousal, valence and dominance
    for the attributes.

    Raises:
        CorpusError: an unknown key, a column that is not there, or no column to tell the clips by.
    """
    if columns is None:
        columns = {key: key for key in COLUMN_KEYS if key in present and key != "attributes"}
        attributes = {name: name for name in ATTRIBUTES if name in present}
        columns |= {"attributes": attributes} if attributes else {}
    named = {"votes": (), "secondary": SECONDARY_LABELS, "attributes": ATTRIBUTES}
    for key, value in columns.items():
        if key not in COLUMN_KEYS:
            raise CorpusError(
                f"columns: unknown key {key!r}{nearest(key, COLUMN_KEYS)}; known are {list(COLUMN_KEYS)}."
            )
        parts = value if isinstance(value, Mapping) else {key: value}
        if (isinstance(value, Mapping) and key not in named) or (key == "attributes" and parts is not value):
            shape = "a mapping such as {arousal: EmoAct}" if key == "attributes" else "one column"
            raise CorpusError(f"columns: {key} is {value!r}; it takes {shape}.")
        for part, column in parts.items():
            if isinstance(value, Mapping) and named[key] and part not in named[key]:
                raise CorpusError(f"columns: {key} has no {part!r}{nearest(part, named[key])}; known: {named[key]}.")
            if column not in present:
                raise CorpusError(
                    f"{source} has no column {column!r}, which is to be {key}{nearest(column, present)}; it has "
                    f"{list(present)}. Name its columns in the option `columns`."
                )
    if "id" not in columns and "audio" not in columns:
        raise CorpusError(
            f"{source} has the columns {list(present)}, of which none is said to be the clip's audio or id: "
            "name them in the option `columns`, such as {audio: file, label: emotion}."
        )
    return dict(columns)


@dataclass
class TableReader:
    """Reads rows of a table into canonical columns.

    Args:
        table: column -> values.
        options: how it is read.
        label_set: the primary emotions.
        problems: refuses or counts what cannot be read; it names the table.
        where: names a row in messages.

    Attributes:
        columns: the options' columns after `check_columns`: `votes` and `secondary` have one column that lists names,
            or a mapping of names to columns of counts, `attributes` a mapping of their names to columns.
        rows: "clip" or "annotation".

    Raises:
        CorpusError: an impossible mapping or setting.
    """

    table: Mapping[str, Sequence[Any]]
    options: TableOptions
    label_set: LabelSet
    problems: Problems
    where: Callable[[int], str]
    columns: dict[str, Any] = field(init=False)
    rows: str = field(init=False)

    def __post_init__(self) -> None:
        self.columns = check_columns(self.options.columns, list(self.table), str(self.problems.source))
        self.rows = self.options.rows or ("annotation" if "annotator" in self.columns else "clip")
        if self.rows not in ("clip", "annotation"):
            raise CorpusError(f"rows is {self.rows!r}; it is 'clip' or 'annotation'.")
        scale = self.options.attribute_scale
        if len(scale) != 2 or not float(scale[0]) < float(scale[1]):
            raise CorpusError(f"attribute_scale is {scale!r}; give the lowest and the highest rating.")
        self._names = {str(name): label for name, label in (self.options.label_names or {}).items()}
        for name, label in self._names.items():
            if label is not None and label != NO_AGREEMENT_NAME:
                _known_label(name, label, self.label_set)
        counted = self.columns.get("votes")
        for name in counted if isinstance(counted, Mapping) else ():
            if str(name) not in self._names and match_label(str(name), self.label_set.labels) is None:
                raise CorpusError(
                    f"columns: votes has {name!r}{nearest(name, self.label_set.labels)}, which is no label of "
                    f"{list(self.label_set.labels)}; say with label_names which it is."
                )
        self._splits = {str(name): split_name(split) for name, split in (self.options.split_names or {}).items()}
        self._seen: set[str] = set()

    def read(self) -> tuple[dict[str, Any], list[str | None], list[int]]:
        """Canonical columns but `audio`, the split that each clip names (None without one), and its first row."""
        groups: dict[str, list[int]] = {}
        for row, clip in enumerate(self._ids()):
            if clip:
                groups.setdefault(clip, []).append(row)
            else:
                self.problems.add(self.where(row), "the row names no clip", "row without a clip")
        groups = self._without_doubles(groups)
        clips = [clip for clip in (self._clip(name, rows) for name, rows in groups.items()) if clip is not None]
        unused = [name for name in self._names if name not in self._seen]
        if unused:
            self.problems.report.note(f"label_names: {', '.join(unused)} occur in no row.")
        columns: dict[str, Any] = {name: [clip[name] for clip in clips] for name in _CLIP_FIELDS}
        for name, width in (("votes", len(self.label_set.labels)), ("secondary_votes", 17), ("attributes", 3)):
            columns[name] = np.array(columns[name], dtype=np.float64).reshape(-1, width)
        if self.rows == "annotation" or "label" not in self.columns:
            columns["label"] = consensus(columns["votes"])
        return columns, columns.pop("split"), columns.pop("row")

    def _ids(self) -> list[str]:
        if "id" in self.columns:
            return [_text(value) for value in self.table[self.columns["id"]]]
        audio = self.table[self.columns["audio"]]
        if not any(isinstance(value, Mapping) for value in audio):
            return [clip_id(_text(value).replace("\\", "/")) for value in audio]
        # Recordings inside a dataset keep at most a bare file name, which need not be unique.
        names = [clip_id(PurePosixPath(_text((value or {}).get("path"))).name) for value in audio]
        unique = all(names) and (self.rows == "annotation" or len(set(names)) == len(names))
        return names if unique else [f"row-{row:07d}" for row in range(len(names))]

    def _without_doubles(self, groups: dict[str, list[int]]) -> dict[str, list[int]]:
        """Rows with equal content are read once; unequal rows of a clip are refused unless each is an annotation."""
        used = [column for value in self.columns.values() for column in _parts(value)]
        kept: dict[str, list[int]] = {}
        repeated = 0
        for clip, rows in groups.items():
            distinct: dict[tuple[str, ...], int] = {}
            for row in rows:
                # Without an annotator's name two equal answers may be two annotators'.
                anonymous = (str(row),) if self.rows == "annotation" and "annotator" not in self.columns else ()
                content = (*(_text(self.table[column][row]) for column in used), *anonymous) if len(rows) > 1 else ()
                if content in distinct:
                    repeated += 1
                elif self.rows == "clip" and distinct:
                    self.problems.add(
                        self.where(row),
                        f"clip {clip!r} was already at {self.where(rows[0])} with different content (if each row is "
                        "one annotator's answer, say rows: annotation)",
                        "second row of a clip",
                    )
                else:
                    distinct[content] = row
            kept[clip] = list(distinct.values())
        if repeated:
            self.problems.report.note(f"{self.problems.source} repeats {repeated} rows with equal content: read once.")
        return kept

    def _clip(self, clip: str, rows: list[int]) -> dict[str, Any] | None:
        """The canonical values of one clip, or None if it is left out."""
        labels = {row: self._label(row) for row in rows}
        answers = [row for row, label in labels.items() if label is not _DROPPED]
        if not answers:
            return None
        votes, secondary = np.zeros(len(self.label_set.labels)), np.zeros(len(SECONDARY_LABELS))
        for row in answers:
            if "votes" in self.columns:
                votes += self._counts(row, "votes", self.label_set.labels)
            elif labels[row] >= 0:
                votes[labels[row]] += 1
            if "secondary" in self.columns:
                tags = self._counts(row, "secondary", SECONDARY_LABELS)
                secondary += np.minimum(tags, 1) if self.rows == "annotation" else tags
        ratings = np.array([self._attributes(row) for row in answers])
        rated = ~np.isnan(ratings)
        sums, numbers = np.where(rated, ratings, 0).sum(axis=0), rated.sum(axis=0)
        shared = {key: self._shared(key, clip, rows) for key in _SHARED_KEYS}
        sex = _text(shared["sex"]).lower()
        if sex and sex not in _SEXES:
            self.problems.report.leave_out("sex that is neither female nor male, taken as unknown", clip)
        return {
            "id": clip,
            "row": rows[0],
            "duration": self._number(shared["duration"], "duration", rows[0]),
            "transcript": " ".join(_text(shared["transcript"]).split()),
            "votes": votes,
            "secondary_votes": secondary,
            "attributes": np.divide(sums, numbers, out=np.full(len(ATTRIBUTES), np.nan), where=numbers > 0),
            "label": labels[answers[0]],
            "speaker": _text(shared["speaker"]),
            "sex": _SEXES.get(sex, ""),
            "age": self._number(shared["age"], "age", rows[0]),
            "split": self._split(shared["split"], rows[0]),
        }

    def _shared(self, key: str, clip: str, rows: list[int]) -> Any:
        """A value that all rows of a clip share, or None."""
        values = [self.table[self.columns[key]][row] for row in rows] if key in self.columns else []
        given = [value for value in values if _text(value)]
        if len({_text(value) for value in given}) > 1:
            self.problems.add(
                self.where(rows[0]),
                f"the rows of clip {clip!r} differ in {key}: {given[:3]}",
                f"clip whose rows differ in {key}, the first is taken",
            )
        return given[0] if given else None

    def _label(self, row: int) -> Any:
        """A label's position, -1, -100 where none is given, or _DROPPED."""
        text = _text(self.table[self.columns["label"]][row]) if "label" in self.columns else ""
        return self._position(text, row, self.label_set.labels) if text else UNLABELLED

    def _position(self, text: str, row: int, known: Sequence[str]) -> Any:
        self._seen.add(text)
        # label_names speak of primary emotions: a name that is a secondary one already stays that.
        is_secondary = known is SECONDARY_LABELS and match_label(text, known)
        name = text if is_secondary else self._names.get(text, text)
        if name is None:
            self.problems.report.leave_out(f"label or vote {text!r}, dropped by label_names", self.where(row))
            return _DROPPED
        label = match_label(name, (*known, NO_AGREEMENT_NAME))
        if label is None:
            names = [*known, *self._names]
            self.problems.add(
                self.where(row),
                f"unknown label {text!r}{nearest(text, names)}; known are {names}. Say with label_names which it is",
                f"unknown label {text!r}",
            )
            return _DROPPED
        return NO_AGREEMENT if label == NO_AGREEMENT_NAME else list(known).index(label)

    def _counts(self, row: int, key: str, known: Sequence[str]) -> np.ndarray:
        """Counts over `known` from a column that lists names or counts them, or from a column for each name."""
        column = self.columns[key]
        if isinstance(column, Mapping):
            value: Any = {name: self.table[part][row] for name, part in column.items()}
        else:
            value = _listed(self.table[column][row])
        if not isinstance(value, Mapping):
            numeric = len(value) == len(known) and all(isinstance(item, int | float) for item in value)
            value = dict(zip(known, value, strict=True)) if numeric else Counter(filter(None, map(_text, value)))
        counts = np.zeros(len(known))
        for name, count in value.items():
            number = self._number(count, f"{key} of {name}", row)
            if number < 0 or math.isinf(number):
                self.problems.add(self.where(row), f"{key} of {name} is {count!r}", "impossible number of votes")
            elif number > 0:
                position = self._position(_text(name), row, known)
                if position is not _DROPPED and position >= 0:
                    counts[position] += number
        return counts

    def _attributes(self, row: int) -> list[float]:
        low, high = map(float, self.options.attribute_scale)
        values = []
        for name in ATTRIBUTES:
            column = self.columns.get("attributes", {}).get(name)
            value = math.nan if column is None else self._number(self.table[column][row], name, row)
            if not math.isnan(value) and not low <= value <= high:
                self.problems.add(
                    self.where(row),
                    f"{name} is {value:g}, outside attribute_scale [{low:g}, {high:g}]",
                    "attribute outside its scale, taken as unknown",
                )
                value = math.nan
            values.append((value - low) / (high - low))
        return values

    def _number(self, value: Any, key: str, row: int) -> float:
        if not _text(value):
            return math.nan
        try:
            return float(value)
        except (TypeError, ValueError):
            self.problems.add(self.where(row), f"{key} is {value!r}, not a number", "not a number, taken as unknown")
            return math.nan

    def _split(self, value: Any, row: int) -> str | None:
        text = _text(value)
        try:
            return self._splits[text] if text in self._splits else split_name(text)
        except CorpusError as error:
            self.problems.add(self.where(row), f"{error}; say with split_names which it is", "unknown split")
            return None


def _known_label(name: str, label: str, label_set: LabelSet) -> str:
    if label not in label_set.labels:
        raise CorpusError(
            f"label_names: {name!r} is to be {label!r}, which is not in the label set {list(label_set.labels)}"
            f"{nearest(label, label_set.labels)}."
        )
    return label


def _parts(value: Any) -> list[str]:
    return list(value.values()) if isinstance(value, Mapping) else [value]


def _text(value: Any) -> str:
    """A cell as text: "" for what counts as missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def _listed(value: Any) -> Any:
    """A cell of several names: a list or mapping, its JSON, or text separated by commas, semicolons or bars."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return [value]
    if isinstance(value, str):
        return re.split(r"[,;|]", value)
    return [] if value is None or (isinstance(value, float) and math.isnan(value)) else value
