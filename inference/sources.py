"""Recordings of an archive by name: files, folders, addresses of an object store, rows of Parquet files."""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from sailer.audio_sailer import URL_PREFIXES
from sailer.inference.outputs import PredictionError
from sailer.inference.recordings import AUDIO_SUFFIXES, find_recordings

PARQUET = ".parquet"
_LOCK = threading.Lock()


def find_sources(paths: Iterable[str], audio_column: str = "audio") -> list[str]:
    """Names of all recordings that paths stand for, in their order and each once; see `source_of`.

    Args:
        paths: what `find_recordings` takes; addresses that fsspec knows (`s3://bucket/folder`, `gs://...`, `file://...`:
            a file, a folder or a glob); and Parquet files by either, whose rows are recordings `FILE.parquet#ROW`.
        audio_column: of Parquet files: bytes of audio files, or {bytes, path} as `datasets` stores them.

    Raises:
        FileNotFoundError: a path or address that is nowhere, or has no audio.
        PredictionError: an address that fsspec cannot open, a file that is no Parquet, or one without the column.
    """
    found: dict[str, None] = {}
    for path in map(str, paths):
        files = _find_stored(path) if is_stored(path) else find_recordings([path])
        for file in files:
            names = _rows(file, audio_column) if file.lower().endswith(PARQUET) else [file]
            found |= dict.fromkeys(names)
    return list(found)


def source_of(name: str, audio_column: str = "audio") -> Any:
    """What the pipeline hears for a name of `find_sources`; what is not a local file is read when it is prepared."""
    file, hash_sign, row = name.rpartition("#")
    if hash_sign and file.lower().endswith(PARQUET) and row.isdigit():
        return _Row(file, int(row), audio_column)
    return _Stored(name) if is_stored(name) else name


def is_stored(path: str) -> bool:
    """Whether a path is an address for fsspec; http is the pipeline's own, which bounds what it downloads."""
    return "://" in path and not path.lower().startswith(URL_PREFIXES)


class _Lazy(Mapping[str, Any]):
    """A recording as {path, bytes}, read when it is asked for, which is in a thread beside the model's work."""

    keys_ = ("path", "bytes")

    def read(self) -> bytes | str:
        """The bytes of its file, or a path."""
        raise NotImplementedError

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys_:
            raise KeyError(key)
        value = self.read()
        return value if isinstance(value, bytes) == (key == "bytes") else None

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)

    def __contains__(self, key: object) -> bool:
        return key in self.keys_


class _Stored(_Lazy):
    def __init__(self, address: str) -> None:
        self.address = address

    def read(self) -> bytes:
        system, path = _file_system(self.address)
        try:
            return system.cat_file(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"No such audio file: {self.address}") from error
        except Exception as error:  # each store has errors of its own
            raise OSError(f"{self.address} cannot be read: {type(error).__name__}: {error}") from error


class _Row(_Lazy):
    def __init__(self, file: str, row: int, column: str) -> None:
        self.file, self.row, self.column = file, row, column

    def read(self) -> bytes | str:
        starts = _open_parquet(self.file)[1]
        group = bisect_right(starts, self.row) - 1
        with _LOCK:  # neighbours come together: the group is read by one of them
            values = _group(self.file, group, self.column)
        value = values[self.row - starts[group]].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        return b"" if value is None else value


def _find_stored(address: str) -> list[str]:
    system, path = _file_system(address)
    try:
        if any(sign in path for sign in "*?["):
            files = sorted(system.glob(path))
        elif system.isdir(path):
            files = [file for file in sorted(system.find(path)) if _is_audio(file)]
        else:
            files = [path] if system.exists(path) else []
    except Exception as error:  # each store has errors of its own
        if isinstance(error, FileNotFoundError):
            files = []
        else:
            raise PredictionError(f"{address} cannot be opened: {type(error).__name__}: {error}") from error
    if not files:
        raise FileNotFoundError(f"{address}: nothing is there, or no audio and no Parquet file.")
    return [system.unstrip_protocol(file) for file in map(str, files)]


def _is_audio(file: str) -> bool:
    return any(file.lower().endswith(suffix) for suffix in (*AUDIO_SUFFIXES, PARQUET))


def _file_system(address: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(address)
    except (ValueError, ImportError, OSError) as error:
        raise PredictionError(f"{address} cannot be opened: {error}") from error


def _rows(file: str, column: str) -> list[str]:
    opened, starts = _open_parquet(file)
    schema = opened.schema_arrow
    if column not in schema.names:
        raise PredictionError(
            f"{file} has no column {column!r}; it has {schema.names}: name the one that holds the recordings with "
            "--audio_column."
        )
    kind = schema.field(column).type
    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or "bytes" in fields):
        raise PredictionError(
            f"The column {column!r} of {file} is {kind}, not audio files' bytes or {{bytes, path}}: name another with "
            "--audio_column."
        )
    return [f"{file}#{row}" for row in range(starts[-1])]


@lru_cache(maxsize=16)
def _open_parquet(file: str) -> tuple[pq.ParquetFile, list[int]]:
    """A Parquet file, and the first row of each of its groups and behind the last."""
    try:
        system, path = _file_system(file)
        opened = pq.ParquetFile(system.open(path, "rb"))
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"No such Parquet file: {file}") from error
        raise PredictionError(f"{file} is no Parquet file that can be read: {error}") from error
    sizes = (opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups))
    return opened, list(itertools.accumulate(sizes, initial=0))


@lru_cache(maxsize=2)
def _group(file: str, group: int, column: str) -> pa.ChunkedArray:
    return _open_parquet(file)[0].read_row_group(group, columns=[column]).column(column)
