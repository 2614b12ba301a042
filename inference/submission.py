"""`sailer predict --submission`: the recordings of a list are judged, and become the challenge's file."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sailer.configuration_sailer import ATTRIBUTES
from sailer.data.challenge import read_file_list, write_submission
from sailer.inference.outputs import PredictionError, written_name

logger = logging.getLogger(__name__)


def choose_recordings(found: Sequence[str], file_list: str | Path) -> list[str]:
    """Of the recordings, those that the list names; how many are left out is logged.

    Raises:
        CorpusError: the list cannot be read, or names a file twice.
        PredictionError: a listed file is not among the recordings, or two recordings have its name.
    """
    by_name: dict[str, list[str]] = {}
    for path in found:
        by_name.setdefault(Path(path).name, []).append(path)
    names = read_file_list(file_list)
    lost = [name for name in names if name not in by_name]
    if lost:
        some = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
        raise PredictionError(f"{file_list} names {len(lost)} files that are not among the recordings: {some}.")
    for name in names:
        if len(by_name[name]) > 1:
            raise PredictionError(f"{name} of {file_list} is there twice: {by_name[name][0]} and {by_name[name][1]}.")
    if len(found) > len(names):
        logger.info("%d of %d recordings are not in %s and left out.", len(found) - len(names), len(found), file_list)
    return [by_name[name][0] for name in names]


def submit(kind: str, table: Path, recordings: Sequence[str], file_list: str | Path | None) -> Path:
    """Write the challenge's file, `TABLE_KIND.csv`, from the table of `sailer predict`.

    Args:
        kind: "categorical" or "attributes".
        table: CSV or JSON Lines.
        recordings: those that belong in it.
        file_list: what it must have; by default the recordings.

    Raises:
        CorpusError: see `write_submission`.
        PredictionError: a recording could not be used, or the system has no head for it.
    """
    with table.open(newline="", encoding="utf-8") as file:
        is_csv = file.read(1) != "{"
        file.seek(0)
        rows = {row["file"]: row for row in (csv.DictReader(file) if is_csv else map(json.loads, file))}
    wanted = ["label"] if kind == "categorical" else list(ATTRIBUTES)
    said: dict[str, Any] = {}
    for recording in recordings:
        row, name = rows[written_name(recording)], Path(recording).name
        if row.get("error"):
            raise PredictionError(f"{recording} could not be used ({row['error']}): the submission would lack it.")
        if not set(wanted) <= set(row):
            raise PredictionError(f"The system has no head for a submission of kind {kind!r}.")
        if name in said:
            raise PredictionError(f"{name} is there twice, and a submission names files without their folders.")
        said[name] = row["label"] if kind == "categorical" else [float(row[column]) for column in wanted]
    path = table.with_name(f"{table.stem}_{kind}.csv")
    return write_submission(kind, path, said, None if file_list is None else read_file_list(file_list))
