"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; it becomes `path` when the block ends, and is gone when the block fails.

    It gets the permissions of any new file, also where the writer has others (safetensors' files are private).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        beside.touch()
        usual = beside.stat().st_mode
        yield beside
        beside.chmod(usual)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside `folder` to fill; it takes that one's place, if there is one, when the block ends."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside, previous = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    try:
        beside.mkdir()
        yield beside
        if folder.exists():
            os.replace(folder, previous)
        os.replace(beside, folder)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def adding_to_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside `folder` to fill; its files replace those of `folder`, one by one, when the block ends
    well, and whatever else `folder` holds stays."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
        yield Path(staging)
        for path in sorted(Path(staging).rglob("*")):
            target = folder / path.relative_to(staging)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                path.replace(target)


def write_json(figures: Mapping[str, Any] | Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write figures as JSON, which has no NaN: what is not defined becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float | np.floating):
            return float(value) if math.isfinite(value) else None
        return value

    with replacing(path) as beside:
        beside.write_text(json.dumps(plain(figures), indent=1) + "\n")
