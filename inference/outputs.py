"""What `sailer predict` leaves on disk: a table with a row per recording and the embeddings; both survive a kill.

A file that is there already is gone on with where it is ours; any other is refused and stays untouched.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from sailer.configuration_sailer import ATTRIBUTES, SailerConfig
from sailer.data.atomic import replacing

UNDECIDED = "undecided"
SEPARATOR = ";"
DECIMALS = 6
ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
# What a line of UTF-8 cannot hold: control characters, line ends, bytes that are not UTF-8; and what looks escaped.
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|\\(?=x[0-9a-f]{2})")


class PredictionError(ValueError):
    """A prediction that cannot start or go on; the message names the path or option and the way out."""


def written_name(file: str) -> str:
    r"""A file's name as outputs have it: itself, but for what a line of UTF-8 cannot hold, written as bytes `\xHH`.

    A newline is `\x0a`, and a byte that is not UTF-8 for instance `\xff`. A backslash before what looks like one of
    these is `\x5c`, so that no two names are written alike; `named_file` is the way back.
    """

    def escaped(match: re.Match[str]) -> str:
        errors = "surrogateescape" if "\udc80" <= match[0] <= "\udcff" else "surrogatepass"
        return "".join(f"\\x{byte:02x}" for byte in match[0].encode("utf-8", errors))

    return UNWRITABLE.sub(escaped, file)


def named_file(written: str) -> str:
    """The file that `written_name` has written so."""
    content = ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), written.encode("utf-8"))
    return content.decode("utf-8", "surrogateescape")


def columns_of(config: SailerConfig, has_transcripts: bool, has_sets: bool = False) -> list[str]:
    """A row's columns for what a system has heads for."""
    columns = ["label", "score", *["set"] * has_sets, *config.labels] if "primary" in config.heads else []
    if "attributes" in config.heads:
        columns += ATTRIBUTES
    if "secondary" in config.heads:
        columns += [_secondary(label) for label in config.secondary_labels]
    if "sex" in config.heads:
        columns += config.sex_labels
    return columns + ["age"] * ("age" in config.heads) + ["transcript"] * has_transcripts


def row_of(result: Mapping[str, Any], min_confidence: float) -> dict[str, Any]:
    """What the pipeline's `return_all=True` gives, by column; see `columns_of`. The labels of a set stand in one cell,
    between semicolons."""
    scores = by_label(result.get("primary", []))
    row: dict[str, Any] = {}
    if scores:
        score = scores[result["label"]]
        row = {"label": result["label"] if score >= min_confidence else UNDECIDED, "score": score}
        row |= {"set": SEPARATOR.join(result["set"])} if "set" in result else {}
    row |= scores | by_label(result.get("attributes", {})) | by_label(result.get("sex", []))
    row |= {_secondary(label): score for label, score in by_label(result.get("secondary", [])).items()}
    row |= {name: result[name] for name in ("age", "transcript") if name in result}
    return {name: round(value, DECIMALS) if isinstance(value, float) else value for name, value in row.items()}


def by_label(values: Mapping[str, float] | Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Scores of a head by label, in their order."""
    return dict(values) if isinstance(values, Mapping) else {row["label"]: row["score"] for row in values}


class RowFile:
    """A table to which rows are appended, a line each; what an interruption left of a last line is dropped.

    Args:
        path: file to go on with, or to begin; nothing is written before `begin` or `append`.
        columns: of each row.
        format: "csv" or "jsonl".
        keep: files whose rows stay; all by default.

    Raises:
        PredictionError: the file holds something else; it is left as it is.
    """

    def __init__(self, path: Path, columns: Sequence[str], format: str, keep: Collection[str] | None = None) -> None:
        self.path, self.columns, self.format = path, list(columns), format
        rows = self.read() if os.path.lexists(path) else []
        self._kept = rows if keep is None else [row for row in rows if row["file"] in keep]
        self._is_begun = False
        self.files = {row["file"] for row in self._kept}
        self.failed = {row["file"] for row in self._kept if row.get("error")}

    def begin(self) -> None:
        """Write the header and the rows that stay."""
        header = [self.columns] if self.format == "csv" else []
        lines: list[Mapping[str, Any] | Sequence[str]] = [*header, *self._kept]
        with replacing(self.path) as beside:
            beside.write_text("".join(map(self._line, lines)), encoding="utf-8", newline="")
        self._is_begun, self._kept = True, []

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows at once, so that no interruption loses them."""
        rows = list(rows)
        if not self._is_begun:
            self.begin()
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write("".join(map(self._line, rows)))
        self.files.update(row["file"] for row in rows)
        self.failed.update(row["file"] for row in rows if row.get("error"))

    def read(self) -> list[dict[str, Any]]:
        """The whole rows of the file; a CSV's values are strings."""
        try:
            if not self.path.is_file():
                raise ValueError("it is no file")
            # Not read as text, which would take a lone carriage return for a line's end.
            whole, newline, torn = self.path.read_bytes().decode("utf-8").rpartition("\n")
            lines = (whole + newline).split("\n")[:-1]
            rows = self._rows(lines, torn)
            for row in rows:
                if not isinstance(row.get("file"), str) or not set(row) <= set(self.columns):
                    raise ValueError("its rows have other columns")
        except Exception as error:  # what others wrote may fail in any way
            raise PredictionError(
                f"{self.path} exists and is not what a stopped run left ({error}); choose another output."
            ) from error
        return rows

    def _rows(self, lines: list[str], torn: str) -> list[dict[str, Any]]:
        if self.format == "jsonl":
            begun = '{"file": "'
            if not (torn.startswith(begun) or begun.startswith(torn)):
                raise ValueError(f"it ends in {torn[:20]!r}")
            return [json.loads(line) for line in lines]
        if not lines and not torn:
            return []
        usual = csv.field_size_limit(max(map(len, lines), default=0) + 1)  # a transcript may be longer than 128 kB
        try:
            header, *rest = csv.reader(lines) if lines else [[torn]]
        finally:
            csv.field_size_limit(usual)
        if header != self.columns:
            raise ValueError(f"its columns are {str(header[:4])[:80]}...")
        return [dict(zip(header, values, strict=True)) for values in rest]

    def _line(self, row: Mapping[str, Any] | Sequence[str]) -> str:
        values = [row.get(name) for name in self.columns] if isinstance(row, Mapping) else row
        values = [_on_a_line(value) if isinstance(value, str) else value for value in values]
        if self.format == "jsonl":
            filled = {name: value for name, value in zip(self.columns, values, strict=True) if value is not None}
            return json.dumps(filled, ensure_ascii=False) + "\n"
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        return line.getvalue()


class EmbeddingFile:
    """Embeddings by file: kept in a journal while they come, saved as one matrix at the end of a run.

    A .npz holds `files` (n,) and `embeddings` (n, width), float32; a .safetensors holds `embeddings`, and the files as
    a JSON list in its metadata.

    Args:
        path: file to write, or to add to; nothing is written before `begin`.
        keep: files that the run has rows for: the embeddings of these stay.

    Raises:
        PredictionError: the file holds something else, or embeddings of another run; it is left as it is.
    """

    def __init__(self, path: Path, keep: Collection[str]) -> None:
        self.path = path
        self.embeddings = self._load() if os.path.lexists(path) else {}
        others = sorted(set(self.embeddings).difference(keep))
        if others:
            raise PredictionError(
                f"{path} exists and holds embeddings of {len(others)} recordings that this run has no row for (such "
                f"as {others[0]}); choose another file for --embeddings."
            )
        self._journal = RowFile(path.with_name(f"{path.name}.part"), ["file", "embedding"], "jsonl", keep)
        for row in self._journal.read() if os.path.lexists(self._journal.path) else []:
            if row["file"] in keep:
                self.embeddings[row["file"]] = _vector(row["embedding"], self._journal.path)

    def begin(self) -> None:
        """Begin the journal."""
        self._journal.begin()

    def append(self, file: str, embedding: np.ndarray) -> None:
        """Keep one embedding of shape (width,)."""
        self.embeddings[file] = embedding.astype(np.float32)
        self._journal.append([{"file": file, "embedding": self.embeddings[file].tolist()}])

    def save(self, keep: Collection[str]) -> None:
        """Write the matrix, of the files in `keep`, and end the journal."""
        files = [file for file in self.embeddings if file in keep]
        matrix = np.stack([self.embeddings[file] for file in files]) if files else np.zeros((0, 0), np.float32)
        with replacing(self.path) as beside:
            if self.path.suffix == ".npz":
                with beside.open("wb") as file:
                    np.savez(file, files=np.array(files, dtype=str), embeddings=matrix)
            else:
                save_file({"embeddings": matrix}, beside, metadata={"files": json.dumps(files)})
        self._journal.path.unlink()

    def _load(self) -> dict[str, np.ndarray]:
        try:
            if not self.path.is_file():
                raise ValueError("it is no file")
            if self.path.suffix == ".npz":
                with np.load(self.path) as stored:
                    files, matrix = stored["files"].tolist(), stored["embeddings"]
            else:
                with safe_open(self.path, framework="np") as stored:
                    files, matrix = json.loads((stored.metadata() or {})["files"]), stored.get_tensor("embeddings")
            if matrix.ndim != 2 or matrix.dtype != np.float32 or not all(isinstance(file, str) for file in files):
                raise ValueError("its arrays have other shapes")
            return dict(zip(files, matrix, strict=True))
        except Exception as error:  # what others wrote may fail in any way
            raise PredictionError(
                f"{self.path} exists and is not what a run left ({type(error).__name__}: {error}); choose another "
                "file for --embeddings."
            ) from error


def _vector(values: Any, path: Path) -> np.ndarray:
    try:
        vector = np.array(values, np.float32)
    except (TypeError, ValueError) as error:
        raise PredictionError(f"{path} holds an embedding that is none ({error}); delete it.") from error
    if vector.ndim != 1:
        raise PredictionError(f"{path} holds an embedding of shape {vector.shape}; delete it.")
    return vector


def _on_a_line(text: str) -> str:
    # A row must stay on its line, and be UTF-8.
    return " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")


def _secondary(label: str) -> str:
    return label if label.startswith("secondary_") else f"secondary_{label}"
