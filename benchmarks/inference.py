"""Inference in every backend and precision beside the authors' code, as ratios in one run.

    python benchmarks/inference.py [--system FOLDER] [--folder KEPT] [--sides NAME...]

Every side is a process of its own, idle while another works; rounds take turns, and medians are compared. The sides,
each from files to probabilities: `authors` is PyPI's hyperion-voxprofile in an environment that this script makes once
(CUDA calls patched out; it takes one clip at a time and pads it to 15 s); the others are `sailer.load` in a backend
and precision, at the clips' own lengths, batches with two threads that decode ahead. The bound is what nobody can save
in float32: decoding, log-mel, and the encoder's floating-point operations at the rate that oneDNN's product has at the
encoder's own shapes, measured too.
The weights are Whisper base's (random where --backbone is not there) under random heads. With `--system`, a trained
RAVDESS system, the backends' probabilities on --accuracy_clips of its clips are compared with torch's in float32.
Memory is the highest of each process, start-up runs from the process's start to its first result, with an export that
is there already. Takes about five minutes; less with some of the sides, or with `--folder`, where a first run leaves
what is made once (`--rounds 0` does nothing else).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from parts.bounds import bound
from parts.clips import SECONDS, choose_clips, write_long_clips
from parts.peers import PEER, authors, make_checkpoint, make_peer
from parts.sides import Side, take_turns

SHARED = Path(__file__).resolve().parents[2] / "shared"
# By name: backend, precision, batch size.
SIDES: dict[str, tuple[str, str, int]] = {
    "torch float32, batch 1": ("torch", "float32", 1),
    "torch float32": ("torch", "float32", 8),
    "torch bfloat16": ("torch", "bfloat16", 8),
    "onnx float32": ("onnx", "float32", 8),
    "onnx int8": ("onnx", "int8", 8),
    "openvino float32": ("openvino", "float32", 8),
    "openvino bfloat16": ("openvino", "bfloat16", 8),
    "openvino int8": ("openvino", "int8", 8),
}
PLAIN = "torch float32"
PADDED = "torch, padded to 15 s as the authors' models are"
FILES = {
    "torch": "*.safetensors",
    "onnx float32": "onnx/model.onnx*",
    "onnx int8": "onnx_int8/model_int8.onnx*",
    "openvino": "onnx/model.onnx*",
    "openvino int8": "openvino_int8/openvino_model.*",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=SHARED / "corpora" / "ravdess", help="RAVDESS")
    parser.add_argument(
        "--backbone", type=Path, default=SHARED / "models" / "whisper-base-encoder", help="Whisper base"
    )
    parser.add_argument("--peer_env", type=Path, default=Path.home() / ".cache" / "sailer" / "hyperion-voxprofile")
    parser.add_argument("--system", type=Path, help="a trained RAVDESS system, for how exact the backends are")
    parser.add_argument("--accuracy_clips", type=int, default=240)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES], metavar="NAME", help="some of them")
    parser.add_argument("--folder", type=Path, help="keeps weights and exports for the next run")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    peer_python = make_peer(arguments.peer_env)
    with tempfile.TemporaryDirectory() as temporary:
        measure(arguments, arguments.folder or Path(temporary), peer_python)


# ---- the parent


def measure(arguments: argparse.Namespace, folder: Path, peer_python: Path) -> None:
    """Prepare clips and weights in `folder`, run the sides, print."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = choose_clips(arguments.corpus, arguments.clips)
    long = write_long_clips(clips, folder / "long", number=max(2, arguments.clips // 8))
    sets = {"short": clips, "long": long, "accuracy": choose_clips(arguments.corpus, arguments.accuracy_clips)}
    (folder / "clips.json").write_text(json.dumps({name: list(map(str, paths)) for name, paths in sets.items()}))
    backbone = arguments.backbone if arguments.backbone.is_dir() else None
    (folder / "backbone.json").write_text(json.dumps(None if backbone is None else str(backbone.resolve())))
    (folder / "system.json").write_text(json.dumps(arguments.system and str(arguments.system.resolve())))
    is_made = (folder / "masked" / "config.json").is_file()
    if not is_made:
        make = [peer_python, __file__, "--worker", "make checkpoint", folder]
        subprocess.run(list(map(str, make)), check=True, capture_output=True)
        convert_checkpoint(folder)
    print_header(arguments, clips, backbone)

    script, sides, absent = Path(__file__), {}, []
    if arguments.rounds:
        sides["authors"] = Side("authors", script, folder, peer_python)
    for name in arguments.sides:
        try:
            if not is_made:
                Side(name, script, folder).close()  # what is made once is there then
            if arguments.rounds:
                sides[name] = Side(name, script, folder)
        except RuntimeError as error:
            absent.append(f"{name}: not here ({str(error).strip().splitlines()[-1][:150]})")
    if not arguments.rounds:
        print(f"{folder} has weights and exports.", *absent, sep="\n")
        return
    padded, theirs = (side.run("outputs") for side in (Side(PADDED, script, folder), sides["authors"]))
    seconds = {name: take_turns(sides, name, arguments.rounds, warm_up=True) for name in ("short", "long")}
    memory = {name: side.run("memory") for name, side in sides.items()}
    sides["bound"] = Side("bound", script, folder)
    parts = {name: sides["bound"].run(name) for name in ("short", "long")}
    bounds = {name: sum(part[step] for step in ("decoding", "log-mel", "encoder")) for name, part in parts.items()}

    print(f"\n{'':23}{'clips/s':>9}{'x authors':>11}{'x bound':>9}{'15 s: /s':>10}{'x authors':>11}{'x bound':>9}"
          f"{'peak MB':>9}{'disk MB':>9}{'start s':>9}")  # fmt: skip
    for name in ("authors", *(name for name in SIDES if name in sides)):
        row = f"{name:23}"
        for task, number, wide in (("short", len(clips), 9), ("long", len(long), 10)):
            taken = seconds[task]
            row += f"{number / taken[name]:{wide}.2f}{taken['authors'] / taken[name]:11.2f}"
            row += f"{bounds[task] / taken[name]:9.2f}"
        print(row + f"{memory[name]:9.0f}{size_on_disk(name, folder):9.0f}{sides[name].start_up:9.1f}")
    for task, part in parts.items():
        number = len(sets[task])
        told = ", ".join(f"{step} {1000 * part[step] / number:.1f} ms" for step in ("decoding", "log-mel", "encoder"))
        print(f"bound, {task}: {number / bounds[task]:.2f} clips/s: {told} a clip ({part['operations']:.1f} G"
              f" operations at {part['gigaflops']:.0f} GFLOP/s)")  # fmt: skip
    print(*absent, sep="\n")
    print("Probabilities, largest difference over all clips and classes (and clips with the same first class):")
    compare("torch, padded - authors", np.array(padded), np.array(theirs))
    if arguments.system is not None:
        print(f"On {arguments.system.name}, {arguments.accuracy_clips} clips, against torch in float32:")
        exact = np.array((sides.get(PLAIN) or Side(PLAIN, script, folder)).run("accuracy"))
        for name in SIDES:
            if name in sides and name != PLAIN:
                compare(f"  {name}", np.array(sides[name].run("accuracy")), exact)
    for side in sides.values():
        side.close()


def size_on_disk(side: str, folder: Path) -> float:
    """Megabytes of a side's weights."""
    if side == "authors":
        return sum(path.stat().st_size for path in (folder / "checkpoint").glob("*.safetensors")) / 1e6
    pattern = FILES.get(side) or FILES[side.split()[0]]
    return sum(path.stat().st_size for path in (folder / "masked").glob(pattern)) / 1e6


def convert_checkpoint(folder: Path) -> None:
    """The authors' checkpoint as two systems: padded as theirs is, and at the clips' own lengths."""
    from transformers import WhisperFeatureExtractor

    from sailer import SailerForAudioClassification, SailerProcessor
    from sailer.hub.conversion import convert

    model = SailerForAudioClassification.from_pretrained(convert(folder / "checkpoint", folder / "padded"))
    model.config.attend_to_padding = False
    model.save_pretrained(folder / "masked")
    SailerProcessor(WhisperFeatureExtractor()).save_pretrained(folder / "masked")


def print_header(arguments: argparse.Namespace, clips: list[Path], backbone: Path | None) -> None:
    import soundfile

    mean = statistics.mean(soundfile.info(clip).duration for clip in clips)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    names = ("sailer", "torch", "transformers", "onnxruntime", "openvino")
    packages = ", ".join(f"{name} {version(name)}" for name in names if found(name))
    hardware = f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}"
    print(f"{datetime.now():%Y-%m-%d}, {hardware}; {packages}; against {PEER}")
    print("python " + " ".join([*sys.argv]))
    weights = "released" if backbone else "random"
    print(
        f"{len(clips)} RAVDESS clips (mean {mean:.2f} s), Whisper base ({weights} weights), {SECONDS} s clips beside, "
        f"batch 8 where not told; medians of {arguments.rounds} rounds",
        flush=True,
    )


def found(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def compare(what: str, one: np.ndarray, other: np.ndarray) -> None:
    """One line on how far probabilities (clips, labels) are apart."""
    same, apart = (one.argmax(1) == other.argmax(1)).mean(), np.abs(one - other)
    most = f"{apart.max():.1e}, 99.9 % within {np.quantile(apart, 0.999):.1e}"
    print(f"{what}: {most} ({same:.1%}); for scale, they vary by {other.std(0).max():.1e}")


# ---- the sides; imports are theirs alone, because the authors' code runs with other packages


def work(side: str, directory: str) -> None:
    """Answer the tasks on stdin, each with a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not come between
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    folder = Path(directory)
    if side == "make checkpoint":
        make_checkpoint(folder)
        return
    clips = json.loads((folder / "clips.json").read_text())
    if side == "bound":
        classify: Callable = bound(folder / "masked", 8)
    else:
        classify = authors(folder) if side == "authors" else ours(folder, side)
        classify(clips["short"][:1])

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer("ready")
    for line in sys.stdin:
        task = line.strip()
        if task == "memory":
            answer(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        elif task == "outputs":
            answer(classify(clips["short"]))
        elif task == "accuracy":
            answer(ours(folder, side, json.loads((folder / "system.json").read_text()))(clips[task]))
        elif side == "bound":
            answer(classify(clips[task]))
        else:
            start = time.perf_counter()
            classify(clips[task])
            answer(time.perf_counter() - start)


def ours(folder: Path, side: str, system: str | None = None) -> Callable[[list[str]], list[list[float]]]:
    """The pipeline of a side, on the benchmark's weights or on a trained system."""
    import sailer

    backend, precision, batch_size = SIDES.get(side, ("torch", "float32", 8))
    source = system or folder / ("padded" if side == PADDED else "masked")
    cache = folder / "cache"
    classifier = sailer.load(
        source,
        backend=backend,
        precision=precision,
        cache_dir=cache,
        device="cpu",
        batch_size=batch_size,
        num_workers=2 if batch_size > 1 else 0,
    )
    labels = classifier.model.config.labels

    def classify(clips: list[str]) -> list[list[float]]:
        results = [{row["label"]: row["score"] for row in result} for result in classifier(clips)]
        return [[result[label] for label in labels] for result in results]

    return classify


if __name__ == "__main__":
    main()
