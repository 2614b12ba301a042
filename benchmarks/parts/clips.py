"""Recordings for the benchmarks: clips of RAVDESS, and longer ones made of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

RATE, SECONDS = 16000, 15
RAVDESS = Path(__file__).resolve().parents[3] / "shared" / "corpora" / "ravdess"


def system_parser(description: str | None, clips: int) -> argparse.ArgumentParser:
    """For a benchmark of a trained system on so many clips of RAVDESS."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = Path("outputs/ravdess_whisper_base_best")
    parser.add_argument("model", nargs="?", type=Path, default=trained, metavar="MODEL", help="a trained folder")
    parser.add_argument("--corpus", type=Path, default=RAVDESS, help="RAVDESS")
    parser.add_argument("--clips", type=int, default=clips)
    return parser


def choose_clips(corpus: Path, number: int) -> list[Path]:
    """That many clips, spread evenly over the speakers and emotions."""
    files = sorted(path for path in corpus.rglob("*") if path.suffix in (".ogg", ".wav"))
    if len(files) < number:
        raise SystemExit(f"{corpus} has {len(files)} clips and {number} are wanted: name RAVDESS with --corpus.")
    # Equal steps would meet the same emotion of each speaker, because all have as many clips.
    return [files[(index * len(files) // number + index % 7) % len(files)] for index in range(number)]


def write_long_clips(clips: list[Path], folder: Path, number: int) -> list[Path]:
    """Clips of exactly 15 s, of short ones in a row."""
    import soundfile

    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}.flac" for index in range(number)]
    for index, path in enumerate(paths):
        parts = [soundfile.read(clips[(index * 5 + part) % len(clips)])[0] for part in range(8)]
        soundfile.write(path, np.concatenate(parts)[: SECONDS * RATE], RATE)
    return paths
