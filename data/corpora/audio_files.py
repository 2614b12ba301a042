"""Audio files of a corpus: finding them and reading their durations from the headers, without decoding them."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import soundfile
from tqdm.auto import tqdm

from sailer.data.schema import CorpusError, CorpusReport

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff")
MINIMUM_SECONDS = 0.1

# The longest page that an Ogg file can have (RFC 3533), and the slack that a WAV header's sizes are given.
_OGG_PAGE_BYTES = 65307
_WAV_SLACK_BYTES = 1024
# Writers that cannot seek back leave a size near 2 or 4 GiB in the header of a WAV file: it says nothing.
_WAV_UNKNOWN_BYTES = 0x7FFF0000


def walk_files(folder: str | Path) -> list[Path]:
    """Every file under `folder`, sorted; linked folders are followed, each real folder is entered once."""
    files, entered = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(parent))
        files += [Path(parent, name) for name in names]
    return sorted(files)


def is_audio(path: Path) -> bool:
    """Whether a file's extension, in any case, is one of audio; hidden files (such as macOS's `._x.wav`) are not."""
    return path.suffix.lower() in AUDIO_EXTENSIONS and not path.name.startswith(".")


def find_audio(folder: str | Path) -> list[Path]:
    """Every audio file under `folder`, sorted."""
    return [path for path in walk_files(folder) if is_audio(path)]


def audio_reference(path: str | Path) -> dict[str, str | None]:
    """The canonical audio column's value for a file on disk."""
    return {"path": os.path.abspath(path), "bytes": None}


def read_durations(
    sources: Sequence[str | Path | bytes | memoryview],
    *,
    strict: bool,
    report: CorpusReport,
    progress: bool = True,
    names: Sequence[str] | None = None,
) -> list[float | None]:
    """Seconds of each audio file, read from the headers by parallel threads.

    Args:
        sources: paths, or the bytes of files.
        strict: raise on the first file that cannot be used; otherwise its duration is None and the report counts it.
        report: counts the files left out, by reason.
        progress: show a progress bar.
        names: what to call each source in messages; by default its path.

    Raises:
        CorpusError: a file is missing, zero-length, not audio, truncated or shorter than `MINIMUM_SECONDS`, and
            `strict` is set.
    """
    durations: list[float | None] = []
    with ThreadPoolExecutor() as pool:
        results = tqdm(
            pool.map(_duration_or_problem, sources),
            total=len(sources),
            desc="Reading audio headers",
            unit="file",
            disable=not progress,
        )
        for name, (seconds, problem) in zip(names or map(str, sources), results, strict=True):
            if problem and strict:
                pool.shutdown(wait=False, cancel_futures=True)
                raise CorpusError(
                    f"Audio file {name} is {problem}. Replace it, or load with strict=False to leave such files out."
                )
            if problem:
                report.leave_out(f"audio file {problem}", name)
            durations.append(seconds)
    return durations


def _duration_or_problem(source: str | Path | bytes | memoryview) -> tuple[float | None, str]:
    """The duration in seconds and "", or None and what is wrong with the file."""
    if not isinstance(source, str | Path):
        return _inspect(io.BytesIO(source))
    try:
        with open(source, "rb") as raw:
            return _inspect(raw, os.fspath(source))
    except OSError:
        return None, "missing"


def _inspect(raw: BinaryIO, path: str | None = None) -> tuple[float | None, str]:
    size = raw.seek(0, os.SEEK_END)
    if size == 0:
        return None, "zero-length (0 bytes)"
    raw.seek(0)
    try:
        # libsndfile reads a path faster than a Python file.
        with soundfile.SoundFile(path or raw) as file:
            seconds = file.frames / file.samplerate
            complete = _is_complete(raw, size, file)
    except (OSError, soundfile.SoundFileError):
        return None, "not readable as audio, or damaged"
    if not complete:
        return None, "truncated"
    if seconds < MINIMUM_SECONDS:
        return None, f"shorter than the minimum of {MINIMUM_SECONDS} s"
    return seconds, ""


def _is_complete(raw: BinaryIO, size: int, file: soundfile.SoundFile) -> bool:
    """Whether the file holds all that its headers promise: libsndfile itself opens a truncated one without a word."""
    if file.format in ("WAV", "WAVEX"):
        raw.seek(0)
        identifier, promised = struct.unpack("<4sI", raw.read(8))
        return identifier != b"RIFF" or promised <= size + _WAV_SLACK_BYTES or promised > _WAV_UNKNOWN_BYTES
    if file.format == "OGG":
        raw.seek(max(0, size - _OGG_PAGE_BYTES))
        return _ends_ogg_stream(raw.read())
    if file.frames:
        # An MP3's number of frames may be an estimate, hence not its very last one.
        file.seek(int((file.frames - 1) * (0.9 if file.format in ("MP3", "MPEG") else 1)))
        return len(file.read(1)) == 1
    return True


def _ends_ogg_stream(tail: bytes) -> bool:
    """Whether the last page in a file's last bytes is whole and marked as the end of its stream (RFC 3533)."""
    page = tail[max(0, tail.rfind(b"OggS")) :]
    header = 27
    if len(page) < header or not page[5] & 4:
        return False
    segments = page[26]
    return len(page) >= header + segments + sum(page[header : header + segments])
