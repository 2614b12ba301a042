"""Files of a corpus as people have them: text in any usual encoding, recordings named in another case or format."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from sailer.data.corpora.audio_files import AUDIO_EXTENSIONS, audio_reference, read_durations, walk_files
from sailer.data.schema import CorpusError, CorpusReport


@dataclass
class Problems:
    """What is wrong in one source of labels: raised if `strict`, else counted in the report.

    Args:
        source: the file, folder or dataset that messages name.
        strict: raise on the first problem.
        report: counts them otherwise.
    """

    source: Path
    strict: bool
    report: CorpusReport

    def add(self, where: str, what: str, reason: str) -> None:
        """`what` is wrong at `where`; `reason` says in the report what was counted and what became of it."""
        if self.strict:
            raise CorpusError(
                f"{self.source}, {where}: {what}. Correct it, or load with strict=False, which counts it instead."
            )
        self.report.leave_out(f"{reason} ({self.source.name})", where)


def decode_text(data: bytes) -> tuple[str, bool]:
    """Text without byte-order mark and carriage returns, and whether it had to be read as Latin-1."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text, latin = data.decode(encoding), False
    except UnicodeDecodeError:
        text, latin = data.decode("latin-1"), True
    return text.replace("\r\n", "\n").replace("\r", "\n"), latin


def read_text(path: Path, report: CorpusReport) -> str:
    """Text of a label file; one that is not UTF-8 is read as Latin-1, which the report notes."""
    text, latin = decode_text(path.read_bytes())
    if latin:
        report.note(f"{path} is not UTF-8: read as Latin-1.")
    return text


def read_rows(path: Path, report: CorpusReport) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every line of a CSV file that is not blank.

    Each line is a row by itself, so that a quotation mark that is never closed spoils its own row alone.
    """
    for number, line in enumerate(read_text(path, report).split("\n"), start=1):
        if line.strip():
            cells = next(csv.reader((line,), skipinitialspace=True)) if '"' in line else line.split(",")
            yield number, [cell.strip() for cell in cells]


def find_entry(folder: Path, *names: str) -> Path | None:
    """The first of `names` that `folder` has, in any case."""
    entries = {entry.name.lower(): entry for entry in sorted(folder.iterdir(), reverse=True)}
    return next((entries[name.lower()] for name in names if name.lower() in entries), None)


def clip_id(file_name: str) -> str:
    """A file name without its extension, if that is one of audio."""
    stem, _, extension = file_name.rpartition(".")
    return stem if stem and f".{extension.lower()}" in AUDIO_EXTENSIONS else file_name


def leaves_folder(file_name: str) -> bool:
    """Whether a path written in a label file is absolute or climbs out of the folder that it is relative to."""
    parts = file_name.replace("\\", "/").split("/")
    return file_name.startswith(("/", "\\")) or ".." in parts or file_name[1:2] == ":"


class FileIndex:
    """The files under a folder by their relative path, whatever the case of the name and the extension.

    Args:
        folder: searched with its subfolders, once, when a name is not there as written.
        extensions: in order of preference, where a file is there in several formats.
    """

    def __init__(self, folder: Path, extensions: tuple[str, ...] = AUDIO_EXTENSIONS) -> None:
        self.folder, self.extensions = folder, extensions

    @cached_property
    def _paths(self) -> dict[str, Path]:
        found = [path for path in walk_files(self.folder) if path.suffix.lower() in self.extensions]
        paths: dict[str, Path] = {}
        for path in sorted(found, key=lambda path: self.extensions.index(path.suffix.lower())):
            key = path.relative_to(self.folder).as_posix().lower()
            paths.setdefault(key, path)
            paths.setdefault(key.removesuffix(path.suffix.lower()), path)
        return paths

    def names(self) -> list[str]:
        """Relative paths of the files, one for each name without its extension."""
        preferred: dict[str, str] = {}
        for key, path in self._paths.items():
            preferred.setdefault(clip_id(key), path.relative_to(self.folder).as_posix())
        return sorted(preferred.values())

    def find(self, file_name: str) -> Path | None:
        """The file of that relative path, else one of the same name in another case or format, else None."""
        exact = self.folder / file_name
        if exact.is_file():
            return exact
        key = PurePosixPath(file_name.replace("\\", "/")).as_posix().lower()
        return self._paths.get(key) or self._paths.get(clip_id(key))


def attach_recordings(
    columns: dict[str, Any], names: Sequence[str], index: FileIndex, *, minimum_seconds: float, problems: Problems
) -> list[int]:
    """Set `audio` and `duration` of the clips whose recording can be used.

    Args:
        columns: canonical columns; `audio` and `duration` are replaced.
        names: the recording of each clip, relative to the index's folder.
        index: where they are.
        minimum_seconds: shorter ones are left out and counted.
        problems: refuses or counts what is missing, outside the folder or unusable.

    Returns:
        The rows to keep, in order.
    """
    strict, report = problems.strict, problems.report
    found: dict[int, Path] = {}
    missing = []
    for row, name in enumerate(names):
        if leaves_folder(name):
            problems.add(f"clip {columns['id'][row]}", f"{name!r} leaves the folder {index.folder}", "path outside it")
        elif path := index.find(name):
            found[row] = path
        else:
            missing.append(name)
    if missing and strict:
        raise CorpusError(
            f"{len(missing)} of {len(names)} recordings that {problems.source} lists are missing in {index.folder}: "
            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}. Complete the folder, load with strict=False to "
            "leave them out, or with audio=False for the labels alone."
        )
    for name in missing:
        report.leave_out("recording missing", name)
    columns["audio"], columns["duration"] = [None] * len(names), [float("nan")] * len(names)
    durations = read_durations(list(found.values()), strict=strict, report=report)
    rows = []
    for (row, path), duration in zip(found.items(), durations, strict=True):
        if duration is not None and duration < minimum_seconds:
            report.leave_out(f"shorter than {minimum_seconds} s", names[row])
        elif duration is not None:
            columns["audio"][row], columns["duration"][row] = audio_reference(path), duration
            rows.append(row)
    return rows
