"""What an export costs and how exact it is, on real speech.

    python benchmarks/export.py [MODEL] [--large]

Writes MODEL (a trained folder; by default Whisper base under random heads) in float32 and int8, and runs torch and
both files on RAVDESS clips, one at a time and in batches of eight. `--large` writes and runs a system of
Whisper-large-v3's size with random weights too, which takes 5.2 GB of disk and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoFeatureExtractor, WhisperFeatureExtractor

import sailer
from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor
from sailer.inference.export import FILES, export

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="a trained folder")
    parser.add_argument("--corpus", type=Path, default=SHARED / "corpora" / "ravdess", help="RAVDESS")
    parser.add_argument(
        "--backbone", type=Path, default=SHARED / "models" / "whisper-base-encoder", help="Whisper base"
    )
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--large", action="store_true", help="Whisper-large-v3's size too")
    arguments = parser.parse_args()
    print_header()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or random_system(arguments.backbone, Path(folder) / "system")
        measure(model, choose_clips(arguments.corpus, arguments.clips), Path(folder) / "exported")
        if arguments.large:
            write_large(Path(folder))


def measure(model: Path, clips: list[str], folder: Path) -> None:
    """Export `model` in every precision and compare its probabilities with torch's."""
    for precision in FILES:
        export(model, folder, precision=precision)
    runs: dict[tuple[str, int], np.ndarray] = {}
    for precision in ("torch", *FILES):
        options = {"backend": "torch"} if precision == "torch" else {"backend": "onnx", "precision": precision}
        classifier: Any = sailer.load(model if precision == "torch" else folder, **options)
        for size in (1, 8):
            runs[precision, size] = probabilities(classifier, clips, size)
    reference = runs["torch", 1]
    print(f"\nProbabilities of {len(clips)} clips (deviation over clips {reference.std(0).max():.2f}):")
    for precision in FILES:
        for size in (1, 8):
            compare(f"{precision}, batch {size} - torch float32", runs[precision, size], reference)
        compare(f"{precision}, batch 8 - batch 1", runs[precision, 8], runs[precision, 1])


def write_large(folder: Path) -> None:
    """Whisper-large-v3's encoder under fresh heads, written and run; the check after writing is the comparison."""
    torch.manual_seed(0)
    audio = AutoConfig.from_pretrained(ROOT / "backbone_configs" / "whisper-large-v3.json")
    system = SailerForAudioClassification(SailerConfig(audio_config=audio, heads=["primary", "attributes"]))
    system.save_pretrained(folder / "large")
    SailerProcessor(WhisperFeatureExtractor(feature_size=audio.num_mel_bins)).save_pretrained(folder / "large")
    parameters = sum(parameter.numel() for parameter in system.parameters())
    del system
    print(f"\nWhisper-large-v3's size ({parameters / 1e6:.0f} million random parameters):")
    started = time.perf_counter()
    export(folder / "large", folder / "large_exported")
    taken = time.perf_counter() - started
    for file in sorted((folder / "large_exported").glob("*.onnx*")):
        print(f"  {file.name}: {file.stat().st_size / 1e6:.1f} MB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"  loaded, written and checked in {taken:.0f} s; this process's memory at most {peak:.1f} GiB")


def random_system(backbone: Path, folder: Path) -> Path:
    """A system of every head, fresh, on a pre-trained backbone."""
    torch.manual_seed(0)
    heads = ["primary", "secondary", "attributes", "sex", "age"]
    system = SailerForAudioClassification.from_audio_text_pretrained(backbone, heads=heads)
    system.save_pretrained(folder)
    SailerProcessor(AutoFeatureExtractor.from_pretrained(backbone)).save_pretrained(folder)
    return folder


def choose_clips(corpus: Path, number: int) -> list[str]:
    """That many clips, spread evenly over the speakers and emotions."""
    files = sorted(path for path in corpus.rglob("*") if path.suffix in (".ogg", ".wav"))
    if len(files) < number:
        raise SystemExit(f"{corpus} has {len(files)} clips and {number} are wanted: name RAVDESS with --corpus.")
    return [str(files[(index * len(files) // number + index % 7) % len(files)]) for index in range(number)]


def probabilities(classifier: Any, clips: list[str], batch_size: int) -> np.ndarray:
    """(clips, labels)."""
    results = [{row["label"]: row["score"] for row in rows} for rows in classifier(clips, batch_size=batch_size)]
    return np.array([[result[label] for label in sorted(result)] for result in results])


def compare(what: str, one: np.ndarray, other: np.ndarray) -> None:
    """One line on how far probabilities (clips, labels) are apart."""
    same = (one.argmax(1) == other.argmax(1)).mean()
    print(f"  {what}: largest difference {np.abs(one - other).max():.1e}, same first class for {same:.1%}")


def print_header() -> None:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnx", "onnxruntime"))
    print(f"{datetime.now():%Y-%m-%d}, {os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}; {packages}")


if __name__ == "__main__":
    main()
