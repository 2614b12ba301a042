"""MSP-Podcast's label files in all their forms -> a table of annotators' answers and a table of consensus rows."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sailer.data.corpora.audio_files import AUDIO_EXTENSIONS
from sailer.data.corpora.files import Problems, clip_id, find_entry, leaves_folder, read_rows, read_text
from sailer.data.corpora.splits import split_name
from sailer.data.labels import match_label, primary_label, secondary_labels
from sailer.data.schema import NO_AGREEMENT, PRIMARY_LABELS, SECONDARY_LABELS, UNLABELLED, CorpusError, CorpusReport

CONSENSUS_NAMES = tuple(
    f"{stem}.{form}" for form in ("csv", "json") for stem in ("labels_consensus", "labels_concensus")
)
DETAILED_NAMES = ("labels_detailed.csv", "labels_detailed.json", "labels.txt")
EMOTION_CODES = {
    **{"N": "Neutral", "H": "Happy", "S": "Sad", "A": "Angry", "C": "Contempt"},
    **{"U": "Surprise", "D": "Disgust", "F": "Fear", "O": "Other"},
}
NO_AGREEMENT_CODE = "X"
CONSENSUS_FIELDS = ("FileName", "EmoClass", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Gender", "Split_Set")

# File, annotator, primary, secondary, (arousal, valence, dominance), and the place to name if it cannot be read.
_Answer = tuple[str, str, str, str, tuple[Any, ...], str]
_UNKNOWN = ("", "na", "n/a", "none", "null", "unknown")
# "WORKER; primary; secondary; A:5.0; V:4.0; D:4.0;" where the secondary field can be missing.
_DETAIL = re.compile(r"([^;]+);(.*?);\s*A:([^;]*);\s*V:([^;]*);\s*D:([^;]*);?\s*")


@dataclass
class Annotations:
    """Annotators' answers, one row each.

    Args:
        clips: ids of the clips that have answers, in the order of their first one.
        clip: (rows,) positions in `clips`.
        primary: (rows,) positions in `PRIMARY_LABELS`.
        secondary: (rows,) positions in `tags`.
        tags: (distinct answers, 17) which secondary emotions each distinct answer names.
        attributes: (rows, 3) arousal, valence, dominance from 1 to 7; NaN if unknown.
    """

    clips: list[str]
    clip: np.ndarray
    primary: np.ndarray
    secondary: np.ndarray
    tags: np.ndarray
    attributes: np.ndarray

    def totals(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per clip: votes (clips, 9), secondary votes (clips, 17) and mean attributes (clips, 3)."""

        def count(weights: np.ndarray | None = None) -> np.ndarray:
            return np.bincount(self.clip, weights, minlength=len(self.clips))

        width = len(PRIMARY_LABELS)
        votes = np.bincount(self.clip * width + self.primary, minlength=len(self.clips) * width).reshape(-1, width)
        secondary = np.stack([count(self.tags[self.secondary, tag]) for tag in range(len(SECONDARY_LABELS))], axis=1)
        known = ~np.isnan(self.attributes)
        sums = np.stack([count(np.where(known, self.attributes, 0)[:, k]) for k in range(3)], axis=1)
        numbers = np.stack([count(known[:, k]) for k in range(3)], axis=1)
        means = np.divide(sums, numbers, out=np.full_like(sums, np.nan), where=numbers > 0)
        return votes, secondary, means


@dataclass
class Consensus:
    """The clips of a corpus as it publishes them, one row each.

    Args:
        names: file names as written.
        labels: positions in `PRIMARY_LABELS`, -1 for no agreement, -100 where no class is given.
        attributes: arousal, valence, dominance from 1 to 7 of each; NaN if unknown.
        speakers, sexes: "" if unknown.
        splits: train, validation, test, test1, ...; None if it says NA.
    """

    names: list[str]
    labels: list[int]
    attributes: list[tuple[float, ...]]
    speakers: list[str]
    sexes: list[str]
    splits: list[str | None]


def read_annotations(folder: Path, *, strict: bool, report: CorpusReport) -> Annotations | None:
    """The annotators' answers from the detailed labels, in whichever form the folder has them; None if it has none.

    A row that cannot be read is refused, or left out and counted. A number outside 1 to 7 is refused, or unknown and
    counted. An answer that a named annotator gives twice for a clip counts once; two different answers both count.

    Raises:
        CorpusError: a file of another form, or what `strict` refuses; the message names file and line.
    """
    path = find_entry(folder, *DETAILED_NAMES)
    if path is None:
        return None
    problems = Problems(path, strict, report)
    rows = {".csv": _detailed_csv, ".json": _detailed_json, ".txt": _detailed_text}[path.suffix.lower()](problems)
    clip_of: dict[str, int] = {}
    tag_of: dict[str, int] = {}
    worker_of: dict[str, int] = {}
    clip, primary, secondary, worker = array("i"), array("b"), array("i"), array("i")
    attributes = tuple(array("f") for _ in range(3))
    tags: list[list[bool]] = []
    for file, name, major, second, values, where in rows:
        try:
            label = PRIMARY_LABELS.index(primary_label(major))
        except CorpusError as error:
            problems.add(where, f"cannot read the annotator's row: {error}", "malformed annotator row")
            continue
        for column, value in zip(attributes, values, strict=True):
            column.append(_scale_value(value, where, problems))
        if file not in clip_of:
            clip_of[file] = len(clip_of)
        if second not in tag_of:
            tag_of[second] = len(tags)
            tags.append([tag in secondary_labels(second) for tag in SECONDARY_LABELS])
        clip.append(clip_of[file])
        primary.append(label)
        secondary.append(tag_of[second])
        # An annotator without a name is nobody's double.
        worker.append(-1 - len(worker) if name.lower() in _UNKNOWN else worker_of.setdefault(name, len(worker_of)))
    ids: dict[str, int] = {}
    of_id = np.array([ids.setdefault(clip_id(file), len(ids)) for file in clip_of], dtype=np.int64)
    table = Annotations(
        clips=list(ids),
        clip=of_id[np.asarray(clip)] if clip else np.zeros(0, dtype=np.int64),
        primary=np.asarray(primary),
        secondary=np.asarray(secondary),
        tags=np.asarray(tags, dtype=bool).reshape(-1, len(SECONDARY_LABELS)),
        attributes=np.stack([np.asarray(column) for column in attributes], axis=1),
    )
    return _without_doubles(table, np.asarray(worker), problems)


def read_consensus(folder: Path, *, strict: bool, report: CorpusReport) -> Consensus:
    """The clips from the consensus file in either form, or else from the headings of labels.txt.

    Raises:
        CorpusError: neither file, or what `strict` refuses: an unknown class or split, a number outside 1 to 7, a name
            that leaves the folder, a file named twice with different content; the message names file and line.
    """
    path = find_entry(folder, *CONSENSUS_NAMES, "labels.txt")
    if path is None:
        raise CorpusError(f"{folder} has none of {[*CONSENSUS_NAMES, 'labels.txt']}: its clips are unknown.")
    problems = Problems(path, strict, report)
    rows = {".csv": _consensus_csv, ".json": _consensus_json, ".txt": _consensus_text}[path.suffix.lower()](problems)
    table = Consensus([], [], [], [], [], [])
    first: dict[str, dict[str, str]] = {}
    given: set[str] = set()
    repeated = 0
    for file, fields, where in rows:
        given.update(fields)
        name = clip_id(file)
        if leaves_folder(file) or not file:
            problems.add(where, f"{file!r} is not the name of a file in the corpus", "file name outside the corpus")
        elif name in first and first[name] == fields:
            repeated += 1
        elif name in first:
            problems.add(where, f"{file} occurs twice with different content", "second row of a clip")
        else:
            first[name] = fields
            try:
                split = split_name(fields.get("split_set", ""))
            except CorpusError as error:
                problems.add(where, f"Split_Set: {error}", "unknown split, taken as NA")
                split = None
            label = _published_label(fields.get("emoclass", ""), where, problems)
            table.names.append(file)
            table.labels.append(label)
            table.attributes.append(
                tuple(
                    _scale_value(fields.get(key, ""), where, problems, labelled=label != UNLABELLED)
                    for key in ("emoact", "emoval", "emodom")
                )
            )
            table.speakers.append(_known(fields.get("spkrid", "")))
            sex = fields.get("gender", "").lower()
            table.sexes.append(sex if sex in ("female", "male") else "")
            table.splits.append(split)
    if repeated:
        report.note(f"{path.name} repeats {repeated} rows with equal content: read once.")
    absent = [field for field in CONSENSUS_FIELDS[1:] if field.lower() not in given]
    if absent and first:
        report.note(f"{path.name} does not give {', '.join(absent)}: unknown for every clip.")
    return table


def _without_doubles(table: Annotations, worker: np.ndarray, problems: Problems) -> Annotations:
    import pandas as pd

    answers = pd.DataFrame({"clip": table.clip, "worker": worker, "primary": table.primary})
    answers["secondary"] = table.secondary
    for k in range(3):
        answers[k] = table.attributes[:, k]
    double = answers.duplicated().to_numpy()
    if double.any():
        problems.report.note(f"{problems.source.name} repeats {int(double.sum())} annotators' rows: each counts once.")
    differing = int(answers[~double].duplicated(["clip", "worker"]).sum())
    if differing:
        problems.report.note(
            f"{problems.source.name} has {differing} further answers of an annotator to the same clip: all count."
        )
    rows = np.flatnonzero(~double)
    return Annotations(
        table.clips, table.clip[rows], table.primary[rows], table.secondary[rows], table.tags, table.attributes[rows]
    )


def _detailed_csv(problems: Problems) -> Iterator[_Answer]:
    """Rows of labels_detailed.csv in either of its forms."""
    rows = read_rows(problems.source, problems.report)
    header = [cell.lower() for cell in next(rows, (0, []))[1]]
    columns = ("filename", "workers", "emoclass_major", "emoclass_second", "emoact", "emoval", "emodom")
    if header[:2] == ["filename", "emodetail"]:
        for number, cells in rows:
            # A cell that holds a comma should be quoted; where it is not, it was split.
            yield from _detail(cells[0], ",".join(cells[1:]), f"line {number}", problems)
    elif set(columns) <= set(header):
        file, worker, major, second, *values = map(header.index, columns)
        for number, cells in rows:
            if len(cells) == len(header):
                numbers = tuple(cells[value] for value in values)
                yield cells[file], cells[worker], cells[major], cells[second], numbers, f"line {number}"
            else:
                problems.add(
                    f"line {number}", f"{len(cells)} cells under {len(header)} columns", "malformed annotator row"
                )
    else:
        raise CorpusError(
            f"{problems.source} has the columns {header}; expected 'FileName,EmoDetail' or {', '.join(columns)}."
        )


def _detailed_json(problems: Problems) -> Iterator[_Answer]:
    for file, workers in _read_json(problems).items():
        if isinstance(workers, dict) and isinstance(workers.get("Workers"), list):
            answers = [
                (answer.get("Name") if isinstance(answer, dict) else "", answer) for answer in workers["Workers"]
            ]
        else:
            answers = list(workers.items()) if isinstance(workers, dict) else [("", workers)]
        for name, answer in answers:
            where = f"clip {file}, annotator {name}"
            if isinstance(answer, dict) and "EmoClass_Major" in answer:
                second = answer.get("EmoClass_Second") or ""
                second = ",".join(second) if isinstance(second, list) else second
                values = tuple(answer.get(key) for key in ("EmoAct", "EmoVal", "EmoDom"))
                yield file, str(name or "").strip(), str(answer["EmoClass_Major"]), str(second), values, where
            else:
                problems.add(where, f"{str(answer)[:80]} has no EmoClass_Major", "malformed annotator row")


def _detailed_text(problems: Problems) -> Iterator[_Answer]:
    file = ""
    for number, line in _lines(problems):
        heading = _heading(line)
        if heading:
            file = heading
        elif file:
            yield from _detail(file, line, f"line {number}", problems)
        else:
            problems.add(f"line {number}", "an annotator's row before any clip", "malformed annotator row")


def _detail(file: str, text: str, where: str, problems: Problems) -> Iterator[_Answer]:
    """The one row of an EmoDetail text, or none and a problem."""
    match = _DETAIL.fullmatch(text)
    answers = match[2].split(";") if match else []
    if match and len(answers) <= 2:
        yield file, match[1].strip(), answers[0], answers[1] if len(answers) == 2 else "", match.group(3, 4, 5), where
    else:
        problems.add(
            where,
            f"{text!r} does not have the form 'WORKER; primary; secondary; A:number; V:number; D:number;'",
            "malformed annotator row",
        )


def _consensus_csv(problems: Problems) -> Iterator[tuple[str, dict[str, str], str]]:
    """File, fields by lower-case name, and place of each row."""
    rows = read_rows(problems.source, problems.report)
    header = [cell.lower() for cell in next(rows, (0, []))[1]]
    if "filename" not in header:
        raise CorpusError(f"{problems.source} has the columns {header}; expected {', '.join(CONSENSUS_FIELDS)}.")
    for number, cells in rows:
        if len(cells) == len(header):
            fields = dict(zip(header, cells, strict=True))
            yield fields.pop("filename"), fields, f"line {number}"
        else:
            problems.add(
                f"line {number}", f"{len(cells)} cells under {len(header)} columns", "malformed consensus row"
            )


def _consensus_json(problems: Problems) -> Iterator[tuple[str, dict[str, str], str]]:
    for file, value in _read_json(problems).items():
        entry = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(entry, dict):
            fields = {key.lower(): "" if item is None else str(item).strip() for key, item in entry.items()}
            yield file, fields, f"clip {file}"
        else:
            problems.add(f"clip {file}", f"{str(entry)[:80]} is not an object of fields", "malformed consensus row")


def _consensus_text(problems: Problems) -> Iterator[tuple[str, dict[str, str], str]]:
    for number, line in _lines(problems):
        file = _heading(line)
        match = _DETAIL.fullmatch(line) if file else None
        if match:
            values = zip(("emoclass", "emoact", "emoval", "emodom"), match.group(2, 3, 4, 5), strict=True)
            yield file, {key: value.strip() for key, value in values}, f"line {number}"
        elif file:
            problems.add(f"line {number}", f"{line!r} is not 'FILE; class; A:; V:; D:;'", "malformed consensus row")


def _lines(problems: Problems) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(read_text(problems.source, problems.report).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _heading(line: str) -> str:
    """The file name that a block of labels.txt begins with; "" for an annotator's line."""
    name = line.partition(";")[0].strip()
    return name if name.lower().endswith(AUDIO_EXTENSIONS) else ""


def _read_json(problems: Problems) -> dict[str, Any]:
    """A JSON object whose keys may not occur twice with different content."""
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            result = {}
            for key, value in pairs:
                if key not in result:
                    result[key] = value
                elif result[key] == value:
                    repeated.append(key)
                else:
                    problems.add(f"name {key!r}", "occurs twice with different content", "second entry of a name")
        return result

    try:
        content = json.loads(read_text(problems.source, problems.report), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"{problems.source}, line {error.lineno}: not valid JSON ({error.msg}). Fetch it again."
        ) from None
    if not isinstance(content, dict):
        raise CorpusError(f"{problems.source} holds a {type(content).__name__}, not an object with an entry per file.")
    if repeated:
        problems.report.note(f"{problems.source.name} repeats {len(repeated)} entries with equal content: read once.")
    return content


def _published_label(code: str, where: str, problems: Problems) -> int:
    if code.upper() == NO_AGREEMENT_CODE:
        return NO_AGREEMENT
    if code.lower() in (*_UNKNOWN, "nan"):
        return UNLABELLED
    label = EMOTION_CODES.get(code.upper()) or match_label(code, PRIMARY_LABELS)
    if label is None:
        known = [*EMOTION_CODES, NO_AGREEMENT_CODE]
        problems.add(where, f"EmoClass {code!r} is none of {known}", "unknown EmoClass, the clip is unlabelled")
        return UNLABELLED
    return PRIMARY_LABELS.index(label)


def _known(text: str) -> str:
    return "" if text.lower() in _UNKNOWN else text


def _scale_value(value: Any, where: str, problems: Problems, labelled: bool = True) -> float:
    """A rating from 1 to 7; NaN if it is left empty, or was refused and `strict` is not set."""
    try:
        return _rating(value)
    except (TypeError, ValueError):
        if labelled or str(value).lower() != "nan":
            reason = "attribute that is no number from 1 to 7, taken as unknown"
            problems.add(where, f"attribute {value!r} is not a number from 1 to 7", reason)
        return float("nan")


@cache
def _rating(value: Any) -> float:
    if value is None or str(value).strip().lower() in _UNKNOWN:
        return float("nan")
    number = float(value)
    if not 1 <= number <= 7:
        raise ValueError
    return number
