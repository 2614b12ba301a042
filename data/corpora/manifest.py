"""Anyone's corpus: a CSV, TSV, JSON Lines or Parquet file with a row per clip or per annotation, in canonical rows."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from sailer.data.corpora import corpus
from sailer.data.corpora.files import FileIndex, Problems, attach_recordings, read_text
from sailer.data.corpora.mapping import TableOptions, TableReader
from sailer.data.corpora.splits import assign_splits, by_split, take_rows
from sailer.data.schema import CorpusError, CorpusReport, LabelSet

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@corpus("manifest", reads_folder=False, shared_options=TableOptions)
def load(
    path: Path | None,
    *,
    label_set: LabelSet,
    audio: bool,
    strict: bool,
    report: CorpusReport,
    delimiter: str | None = None,
    **table_options: Any,
) -> dict[str, dict[str, Any]]:
    """Columns of the canonical row per split, from one table whose columns a small mapping names.

    A clip with a label but no votes gets one vote for it; one with votes but no label gets their plurality. Labels
    match in any case and spacing. For the other parameters see `sailer.data.corpora`.

    Args:
        path: the table, or a folder that holds exactly one.
        delimiter: of a CSV or TSV file, instead of a comma or tab.
        **table_options: see `TableOptions`.

    Raises:
        CorpusError: no such table, a mapping that does not fit it, or what `strict` refuses; the message names the
            line, the value and the known ones.
    """
    options = TableOptions(**table_options)
    file = _table_file(path)
    problems = Problems(file, strict, report)
    table, lines = _read(file, delimiter, problems)
    unit = "row" if file.suffix.lower() == ".parquet" else "line"
    reader = TableReader(table, options, label_set, problems, where=lambda row: f"{unit} {lines[row]}")
    if audio and "audio" not in reader.columns:
        raise CorpusError(
            f"{file} has no column said to be audio: name it in `columns`, or pass audio=False for the labels alone."
        )
    clips, split, first_rows = reader.read()
    has_column = "split" in reader.columns
    clips["split"] = assign_splits(split, clips["speaker"], has_column, options.split_fractions, report)
    if audio:
        folder = Path(options.audio_folder or file.parent).expanduser()
        if not folder.is_dir():
            raise CorpusError(f"audio_folder {folder} is not a folder.")
        names = [_relative(str(table[reader.columns["audio"]][row] or "").strip(), folder) for row in first_rows]
        index = FileIndex(folder)
        kept = attach_recordings(clips, names, index, minimum_seconds=options.minimum_seconds, problems=problems)
        clips = take_rows(clips, kept)
    elif options.minimum_seconds > 0:
        raise CorpusError("minimum_seconds needs the recordings: leave it out, or load with audio=True.")
    return by_split(clips, clips.pop("split"), options.splits)


def _table_file(path: Path | None) -> Path:
    if path is None:
        raise CorpusError(f"Corpus 'manifest' is read from a file: give its path (one of {', '.join(EXTENSIONS)}).")
    path = path.expanduser()
    if path.is_dir():
        tables = [file for file in sorted(path.iterdir()) if file.suffix.lower() in EXTENSIONS]
        if len(tables) != 1:
            names = [file.name for file in tables]
            raise CorpusError(f"The folder {path} holds {len(tables)} tables {names}: give the path of one.")
        return tables[0]
    if not path.is_file():
        raise CorpusError(f"The manifest {path} does not exist. Check the path.")
    if path.suffix.lower() not in EXTENSIONS:
        raise CorpusError(f"The manifest {path} is none of {', '.join(EXTENSIONS)}: convert it to one of them.")
    return path


def _read(file: Path, delimiter: str | None, problems: Problems) -> tuple[dict[str, list[Any]], list[int]]:
    """Column -> values, and the line (or row, from 1) of each."""
    form = file.suffix.lower()
    if form == ".parquet":
        from pyarrow import ArrowInvalid, parquet

        try:
            table = parquet.read_table(file).to_pydict()
        except (ArrowInvalid, OSError) as error:
            raise CorpusError(f"{file} is not a Parquet file that can be read: {error}") from None
        lines = list(range(1, 1 + max(map(len, table.values()), default=0)))
    elif form in (".jsonl", ".ndjson"):
        table, lines = _read_json_lines(read_text(file, problems.report), problems)
    else:
        text = read_text(file, problems.report)
        table, lines = _read_csv(text, delimiter or ("\t" if form == ".tsv" else ","), problems)
    if not lines:
        raise CorpusError(f"The manifest {file} has no rows.")
    return table, lines


def _read_json_lines(text: str, problems: Problems) -> tuple[dict[str, list[Any]], list[int]]:
    rows, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                row = f"{line[:60]!r} ({error.msg})"
            if isinstance(row, dict):
                rows.append(row)
                lines.append(number)
            else:
                problems.add(f"line {number}", f"not a JSON object: {row}", "malformed row")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}, lines


def _read_csv(text: str, delimiter: str, problems: Problems) -> tuple[dict[str, list[Any]], list[int]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    rows, lines = [], []
    line = 1
    try:
        for cells in reader:
            if not header:
                header = [cell.strip() for cell in cells]
            elif len(cells) == len(header):
                rows.append(cells)
                lines.append(line)
            elif any(cell.strip() for cell in cells):
                problems.add(f"line {line}", f"{len(cells)} cells under {len(header)} columns", "malformed row")
            line = reader.line_num + 1
    except csv.Error as error:
        raise CorpusError(f"{problems.source}, line {line}: {error}. Close its quotation marks.") from None
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise CorpusError(f"{problems.source} has two columns of the same name: {sorted(twice)}. Rename one.")
    return {name: [cells[column] for cells in rows] for column, name in enumerate(header)}, lines


def _relative(name: str, folder: Path) -> str:
    """An absolute path inside the folder as one relative to it; any other as it is."""
    return (
        os.path.relpath(name, folder) if os.path.isabs(name) and Path(name).is_relative_to(folder.absolute()) else name
    )
