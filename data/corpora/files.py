"""Files of a corpus as people have them: text in any usual encoding, recordings named in another case or format."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sailer.data.corpora.audio_files import AUDIO_EXTENSIONS, walk_files
from sailer.data.schema import CorpusError, CorpusReport


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


def read_rows(path: Path, report: CorpusReport, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every line that is not blank.

    Each line is a row by itself, so that a quotation mark that is never closed spoils its own row alone.
    """
    for number, line in enumerate(read_text(path, report).split("\n"), start=1):
        if line.strip():
            cells = next(csv.reader((line,), delimiter=delimiter, skipinitialspace=True))
            yield number, [cell.strip() for cell in cells]


def find_entry(folder: Path, *names: str) -> Path | None:
    """The first of `names` that `folder` has, in any case."""
    entries = {entry.name.lower(): entry for entry in sorted(folder.iterdir(), reverse=True)}
    return next((entries[name.lower()] for name in names if name.lower() in entries), None)


def clip_id(file_name: str) -> str:
    """A file name without its extension, if that is one of audio."""
    path = PurePosixPath(file_name)
    return str(path.with_suffix("")) if path.suffix.lower() in AUDIO_EXTENSIONS else file_name


def leaves_folder(file_name: str) -> bool:
    """Whether a path written in a label file is absolute or climbs out of the folder that it is relative to."""
    path = PurePosixPath(file_name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or file_name[1:2] == ":"


class FileIndex:
    """The files under a folder by their relative path, whatever the case of the name and the extension.

    Args:
        folder: searched once, with its subfolders.
        extensions: in order of preference, where a file is there in several formats.
    """

    def __init__(self, folder: Path, extensions: tuple[str, ...] = AUDIO_EXTENSIONS) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        found = [path for path in walk_files(folder) if path.suffix.lower() in extensions]
        for path in sorted(found, key=lambda path: extensions.index(path.suffix.lower())):
            key = path.relative_to(folder).as_posix().lower()
            self._paths.setdefault(key, path)
            self._paths.setdefault(key.removesuffix(path.suffix.lower()), path)

    def find(self, file_name: str) -> Path | None:
        """The file of that relative path, else one of the same name in another case or format, else None.

        Raises:
            CorpusError: the path leaves the folder.
        """
        if leaves_folder(file_name):
            raise CorpusError(f"{file_name!r} leaves the folder {self.folder}: name the files inside it.")
        exact = self.folder / file_name
        key = PurePosixPath(file_name.replace("\\", "/")).as_posix().lower()
        known = self._paths.get(key) or self._paths.get(clip_id(key))
        return exact if known is not None and known != exact and exact.is_file() else known
