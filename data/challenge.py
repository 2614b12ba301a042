"""Decisions and attributes in, the files of the challenge on MSP-Podcast out, checked against its list of files.

Categorical: `FileName,EmoClass` with the one-letter codes of the eight scored classes. Attributes:
`FileName,EmoAct,EmoVal,EmoDom` on the scale from 1 to 7. A row for each file of the test set.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sailer.data.atomic import replacing
from sailer.data.corpora.files import read_rows
from sailer.data.corpora.msp_labels import EMOTION_CODES
from sailer.data.schema import CorpusError, CorpusReport

KINDS = ("categorical", "attributes")
HEADERS = {"categorical": ["FileName", "EmoClass"], "attributes": ["FileName", "EmoAct", "EmoVal", "EmoDom"]}
CODES = {label: code for code, label in EMOTION_CODES.items() if label != "Other"}
SCALE = (1.0, 7.0)


def read_file_list(path: str | Path) -> list[str]:
    """Names of the files that a submission must have: the column FileName of a CSV, or a line each.

    Raises:
        CorpusError: it cannot be read, is empty or names a file twice; the message has the line.
    """
    path = Path(path)
    rows = list(read_rows(path, CorpusReport()))
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    column = header.index("filename") if "filename" in header else 0
    if len(header) > 1 and "filename" not in header:
        raise CorpusError(f"{path} has the columns {rows[0][1]} and no FileName: name that column so.")
    lines: dict[str, int] = {}
    for number, cells in rows[1:] if "filename" in header else rows:
        name = cells[column] if len(cells) > column else ""
        if not name:
            raise CorpusError(f"{path}, line {number}: no file is named.")
        if name in lines:
            raise CorpusError(f"{path}, line {number}: {name} was named in line {lines[name]} already.")
        lines[name] = number
    if not lines:
        raise CorpusError(f"{path} names no files.")
    return list(lines)


def write_submission(
    kind: str,
    path: str | Path,
    predictions: Mapping[str, str | Sequence[float]],
    file_list: Sequence[str] | None = None,
) -> Path:
    """Write a challenge file, in the order of the list, and check it as `check_submission` does.

    Args:
        kind: "categorical" or "attributes".
        path: CSV to write.
        predictions: file name -> class name, or arousal, valence and dominance in [0, 1].
        file_list: what must be there; by default what is predicted.

    Raises:
        CorpusError: an unknown kind, a class without a code, a value out of its range, a file that is not in the list
            or missing; nothing is written then.
    """
    if kind not in KINDS:
        raise CorpusError(f"submission is {kind!r}; choose one of {list(KINDS)}.")
    names = list(predictions if file_list is None else file_list)
    rows = []
    for name in [*names, *(name for name in predictions if name not in set(names))]:
        if name not in predictions:
            continue
        said = predictions[name]
        if isinstance(said, str):
            rows.append([name, CODES.get(said, said)])
        else:
            rows.append([name, *(f"{SCALE[0] + (SCALE[1] - SCALE[0]) * float(value):.6f}" for value in said)])
    with replacing(path) as beside:
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADERS[kind])
            writer.writerows(rows)
        check_submission(kind, beside, names, Path(path).name)
    return Path(path)


def check_submission(kind: str, path: str | Path, file_list: Sequence[str], name: str | None = None) -> None:
    """See that a challenge file has each file of the list once, with a legal code or values from 1 to 7.

    Raises:
        CorpusError: it does not; the message names the first line at fault, or the files that are missing.
    """
    shown = name or str(path)
    rows = list(read_rows(Path(path), CorpusReport()))
    if not rows or rows[0][1] != HEADERS[kind]:
        raise CorpusError(f"{shown} must begin with {','.join(HEADERS[kind])}.")
    wanted, seen = set(file_list), set()
    for number, cells in rows[1:]:
        if len(cells) != len(HEADERS[kind]):
            raise CorpusError(f"{shown}, line {number}: {len(cells)} cells, expected {','.join(HEADERS[kind])}.")
        file, values = cells[0], cells[1:]
        if file not in wanted:
            raise CorpusError(f"{shown}, line {number}: {file} is not in the list of files.")
        if file in seen:
            raise CorpusError(f"{shown}, line {number}: {file} is there twice.")
        seen.add(file)
        if kind == "categorical" and values[0] not in CODES.values():
            raise CorpusError(f"{shown}, line {number}: {values[0]!r} for {file}; the codes are {CODES}.")
        if kind == "attributes":
            _check_values(values, f"{shown}, line {number}: {file}")
    missing = [file for file in file_list if file not in seen]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise CorpusError(f"{shown} lacks {len(missing)} of the {len(file_list)} files of the list: {some}.")


def _check_values(values: Sequence[str], place: str) -> None:
    try:
        numbers = np.array(values, dtype=float)
    except ValueError as error:
        raise CorpusError(f"{place} has {values}, which are no numbers.") from error
    if not ((numbers >= SCALE[0]) & (numbers <= SCALE[1])).all():  # False for NaN
        raise CorpusError(f"{place} has {values}; the values are from 1 to 7.")
