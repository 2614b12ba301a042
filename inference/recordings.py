"""Audio files that paths, folders and globs stand for."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from sailer.audio_sailer import URL_PREFIXES
from sailer.inference.outputs import written_name

logger = logging.getLogger(__name__)

# M4A and MP4 are decoded where the av package is installed, and else get a row that says so.
AUDIO_SUFFIXES = {
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".m4a", ".mp4")
}


def find_recordings(paths: Iterable[str]) -> list[str]:
    """Audio files that paths, folders and globs stand for, in their order and each once; URLs stay.

    Of a folder every entry with an audio suffix is listed: links that lead nowhere, pipes and folders too, because
    what cannot be used is to be reported. Links to folders are not followed, which is logged.

    Raises:
        FileNotFoundError: a path that is nowhere, or has no audio.
    """
    found: dict[str, str] = {}
    for path in map(str, paths):
        if path.lower().startswith(URL_PREFIXES):
            found.setdefault(path, path)
            continue
        matches = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise FileNotFoundError(f"{path}: no such file or folder, and nothing matches it.")
        files = [file for match in matches for file in (_audio_below(match) if os.path.isdir(match) else [match])]
        if not files:
            raise FileNotFoundError(f"{path} has no audio files ({', '.join(sorted(AUDIO_SUFFIXES))}).")
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def _audio_below(folder: str) -> list[str]:
    def unreadable(error: OSError) -> None:
        logger.warning("%s cannot be searched: %s", written_name(str(error.filename)), error.strerror)

    found = []
    for place, folders, files in os.walk(Path(folder), onerror=unreadable):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if Path(name).suffix.lower() in AUDIO_SUFFIXES:
                found.append(path)
            elif os.path.islink(path) and os.path.isdir(path):
                logger.warning("%s is a link to a folder and not followed: name it to have it searched.", path)
    return sorted(found)
