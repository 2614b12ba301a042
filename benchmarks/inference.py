"""Inference, as ratios in one run: the pipeline, the authors' code with the same weights, and the encoder alone.

    python benchmarks/inference.py [--options]

Every side is a process of its own, idle while another works; rounds take turns, and medians are compared. The sides,
each from files to probabilities: `authors` is PyPI's hyperion-voxprofile in an environment that this script makes once
(CUDA calls patched out; it takes one clip at a time and pads it to 15 s); `pipeline` is SpeechEmotionPipeline; `bound`
is what nobody can save: decoding, log-mel and the bare encoder at the clips' own lengths, sorted by length where they
are batched. `--options` measures bfloat16, dynamic int8 and torch.compile too. The weights are Whisper base's (random
where --backbone is not there) under random heads. Memory is the highest of each process over the short clips. Takes
about four minutes.
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

SHARED = Path(__file__).resolve().parents[2] / "shared"
PEER_PACKAGES = ("transformers==4.46.3", "huggingface_hub<1", "numpy<2.3", "loralib", "librosa", "soundfile")
PEER = "hyperion-voxprofile==0.1.0"
RATE, SECONDS = 16000, 15
PIPELINES = {"pipeline, batch 1": 1, "pipeline, batch 8": 8}
BOUNDS = {"bound, batch 1": 1, "bound, batch 8": 8}
PADDED = "pipeline, padded to 15 s as the authors' models are"
OPTIONS = ("bfloat16", "dynamic int8", "torch.compile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=SHARED / "corpora" / "ravdess", help="RAVDESS")
    parser.add_argument(
        "--backbone", type=Path, default=SHARED / "models" / "whisper-base-encoder", help="Whisper base"
    )
    parser.add_argument("--peer_env", type=Path, default=Path.home() / ".cache" / "sailer" / "hyperion-voxprofile")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", action="store_true", help="measure bfloat16, int8 and torch.compile too")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    peer_python = make_peer(arguments.peer_env)
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder), peer_python)


# ---- the parent


def measure(arguments: argparse.Namespace, folder: Path, peer_python: Path) -> None:
    """Prepare clips and weights in `folder`, run all sides, print."""
    clips = choose_clips(arguments.corpus, arguments.clips)
    long = write_long_clips(clips, folder / "long", number=max(2, arguments.clips // 8))
    (folder / "clips.json").write_text(json.dumps({"short": list(map(str, clips)), "long": list(map(str, long))}))
    backbone = arguments.backbone if arguments.backbone.is_dir() else None
    (folder / "backbone.json").write_text(json.dumps(None if backbone is None else str(backbone.resolve())))
    make = [peer_python, __file__, "--worker", "make checkpoint", folder]
    subprocess.run(list(map(str, make)), check=True, capture_output=True)
    convert_checkpoint(folder)

    sides = {"authors": Side("authors", folder, peer_python)}
    sides |= {name: Side(name, folder) for name in (*BOUNDS, *PIPELINES, PADDED)}
    outputs = {name: sides[name].run("outputs") for name in ("authors", PADDED, *PIPELINES)}
    sides.pop(PADDED).close()
    for name in BOUNDS:
        sides[name].run("short")  # warm-up; the others have had theirs
    seconds = take_turns(sides, "short", arguments.rounds)
    memory = {name: side.run("memory") for name, side in sides.items()}
    long_seconds = take_turns(sides, "long", arguments.rounds, warm_up=True)
    for name, side in sides.items():
        if name != "pipeline, batch 8":
            side.close()

    print_header(arguments, clips, backbone)
    durations = {"short": len(clips), "long": len(long)}
    print(f"\n{'':22}{'clips/s':>9}{'x authors':>11}{'x bound':>9}{'peak MB':>9}{'x authors':>11}{'15 s clips/s':>14}"
          f"{'x authors':>11}{'x bound':>9}")  # fmt: skip
    for name in sides:
        bound = name.replace("pipeline", "bound") if name.startswith("pipeline") else None
        cells = [f"{name:22}", f"{durations['short'] / seconds[name]:9.2f}"]
        cells += [ratio(seconds, "authors", name, 11), ratio(seconds, bound, name, 9)]
        cells += [f"{memory[name]:9.0f}", f"{memory[name] / memory['authors']:11.2f}"]
        cells += [f"{durations['long'] / long_seconds[name]:14.2f}"]
        cells += [ratio(long_seconds, "authors", name, 11), ratio(long_seconds, bound, name, 9)]
        print("".join(cells))
    print("\nProbabilities, largest difference over all clips and classes (and clips with the same first class):")
    compare("padded pipeline - authors", outputs[PADDED], outputs["authors"])
    compare("batch 8 - batch 1", outputs["pipeline, batch 8"], outputs["pipeline, batch 1"])
    compare("masked - padded", outputs["pipeline, batch 1"], outputs[PADDED])
    if arguments.options:
        measure_options(sides["pipeline, batch 8"], folder, outputs["pipeline, batch 8"], len(clips), arguments.rounds)
    sides["pipeline, batch 8"].close()


def measure_options(plain: Side, folder: Path, outputs: np.ndarray, clips: int, rounds: int) -> None:
    """Precision and compilation, at batch 8, beside the plain pipeline."""
    print("\nOptions, at batch 8 (torch.compile's time to compile is not counted):")
    for option in OPTIONS:
        try:
            side = Side(f"pipeline, {option}", folder)
            changed = side.run("outputs")
            seconds = take_turns({"plain": plain, option: side}, "short", rounds)
            gain, memory = seconds["plain"] / seconds[option], side.run("memory")
            print(f"{option}: {clips / seconds[option]:.2f} clips/s, {gain:.2f} x float32, peak {memory:.0f} MB")
            compare("  probabilities against float32", changed, outputs)
            side.close()
        except RuntimeError as error:
            print(f"{option}: not here ({str(error).strip().splitlines()[-1][:150]})")


class Side:
    """A process that does one side's work when asked, and nothing otherwise."""

    def __init__(self, name: str, folder: Path, python: Path | str = sys.executable) -> None:
        self.name, self.log = name, folder / f"{name.replace(' ', '_').replace('/', '_')}.log"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [str(python), __file__, "--worker", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=environment,
            text=True,
        )
        self._answer()  # ready

    def run(self, task: str) -> Any:
        """Seconds for "short" or "long", megabytes for "memory", an array (clips, labels) for "outputs"."""
        print(task, file=self.process.stdin, flush=True)
        answer = self._answer()
        return np.array(answer) if task == "outputs" else answer

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


def take_turns(sides: dict[str, Side], task: str, rounds: int, warm_up: bool = False) -> dict[str, float]:
    """Median seconds of each side over rounds in which all take their turn."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + warm_up):
        for name, side in sides.items():
            seconds = side.run(task)
            if index >= warm_up:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


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

    folder.mkdir()
    paths = [folder / f"{index}.flac" for index in range(number)]
    for index, path in enumerate(paths):
        parts = [soundfile.read(clips[(index * 5 + part) % len(clips)])[0] for part in range(8)]
        soundfile.write(path, np.concatenate(parts)[: SECONDS * RATE], RATE)
    return paths


def convert_checkpoint(folder: Path) -> None:
    """The authors' checkpoint as two systems: padded as theirs is, and at the clips' own lengths."""
    from transformers import WhisperFeatureExtractor

    from sailer import SailerForAudioClassification, SailerProcessor
    from sailer.hub.conversion import convert

    model = SailerForAudioClassification.from_pretrained(convert(folder / "checkpoint", folder / "padded"))
    model.config.attend_to_padding = False
    model.save_pretrained(folder / "masked")
    SailerProcessor(WhisperFeatureExtractor()).save_pretrained(folder / "masked")


def make_peer(folder: Path) -> Path:
    """Python of an environment with the authors' code, made once."""
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.is_file():
        print(f"Installing {PEER} into {folder} (once)...", flush=True)
        torch = f"torch=={version('torch').split('+')[0]}"
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, torch, *PEER_PACKAGES], check=True)
        subprocess.run([*install, "--no-deps", PEER], check=True)
        stamp.touch()
    return python


def print_header(arguments: argparse.Namespace, clips: list[Path], backbone: Path | None) -> None:
    import soundfile

    mean = statistics.mean(soundfile.info(clip).duration for clip in clips)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ", ".join(f"{name} {version(name)}" for name in ("sailer", "torch", "transformers"))
    hardware = f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}"
    print(f"{datetime.now():%Y-%m-%d}, {hardware}; {packages}; against {PEER}")
    print("python " + " ".join([*sys.argv]))
    weights = "released" if backbone else "random"
    print(
        f"{len(clips)} RAVDESS clips (mean {mean:.2f} s), Whisper base ({weights} weights), float32, 15 s clips beside"
    )
    print(f"medians of {arguments.rounds} rounds")


def ratio(seconds: dict[str, float], baseline: str | None, name: str, width: int) -> str:
    return f"{seconds[baseline] / seconds[name]:{width}.2f}" if baseline in seconds else " " * width


def compare(what: str, one: np.ndarray, other: np.ndarray) -> None:
    """One line on how far probabilities (clips, labels) are apart."""
    same = (one.argmax(1) == other.argmax(1)).mean()
    print(f"{what}: {np.abs(one - other).max():.1e} ({same:.0%}); for scale, they vary by {other.std(0).max():.1e}")


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
    if side == "authors":
        classify = authors(folder)
    elif side in BOUNDS:
        classify = bound(folder, BOUNDS[side])
    else:
        classify = ours(folder, side)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer("ready")
    for line in sys.stdin:
        task = line.strip()
        if task == "memory":
            answer(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        elif task == "outputs":
            answer(classify(clips["short"]))
        else:
            start = time.perf_counter()
            classify(clips[task])
            answer(time.perf_counter() - start)


def ours(folder: Path, side: str) -> Callable[[list[str]], list[list[float]]]:
    import torch

    from sailer import SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline

    mode = "padded" if side == PADDED else "masked"
    dtype = torch.bfloat16 if "bfloat16" in side else torch.float32
    model = SailerForAudioClassification.from_pretrained(folder / mode, dtype=dtype).eval()
    if "int8" in side:
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    if "compile" in side:
        model.sailer.audio_encoder.compile(dynamic=True)
    processor = SailerProcessor.from_pretrained(folder / mode)
    classifier = SpeechEmotionPipeline(
        model=model, processor=processor, device="cpu", batch_size=PIPELINES.get(side, 8)
    )
    labels = model.config.labels

    def classify(clips: list[str]) -> list[list[float]]:
        results = [{row["label"]: row["score"] for row in result} for result in classifier(clips)]
        return [[result[label] for label in labels] for result in results]

    return classify


def bound(folder: Path, batch_size: int) -> Callable[[list[str]], None]:
    import soundfile
    import torch
    from transformers import WhisperFeatureExtractor

    from sailer import SailerForAudioClassification

    encoder = SailerForAudioClassification.from_pretrained(folder / "masked").eval().sailer.audio_encoder
    extractor = WhisperFeatureExtractor()

    @torch.inference_mode()
    def encode(clips: list[str]) -> None:
        waves = [soundfile.read(clip, dtype="float32")[0] for clip in clips]
        if batch_size > 1:
            waves.sort(key=len)
        for start in range(0, len(waves), batch_size):
            batch = waves[start : start + batch_size]
            features = extractor(batch, sampling_rate=RATE, padding="longest", return_tensors="pt")["input_features"]
            encoder(features)

    return encode


def authors(folder: Path) -> Callable[[list[str]], list[list[float]]]:
    import soundfile
    import torch

    wrapper = authors_class(folder)
    model = wrapper.from_pretrained(str(folder / "checkpoint")).eval()

    @torch.no_grad()
    def classify(clips: list[str]) -> list[list[float]]:
        results = []
        for clip in clips:
            wave = torch.from_numpy(soundfile.read(clip, dtype="float32")[0])
            results.append(model(wave[None])[0].softmax(-1)[0].tolist())
        return results

    return classify


def authors_class(folder: Path) -> Any:
    """Their class, without CUDA and without downloads."""
    import torch
    import transformers

    settings = json.loads((folder / "backbone.json").read_text())
    size = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "vocab_size": 51865}
    size |= {f"{part}_attention_heads": 8 for part in ("encoder", "decoder")}
    size |= {f"{part}_ffn_dim": 2048 for part in ("encoder", "decoder")}

    def backbone(name: str, max_source_positions: int, **_: Any) -> Any:
        config = transformers.WhisperConfig(**size, max_source_positions=max_source_positions)
        (folder / "checkpoint").mkdir(exist_ok=True)
        (folder / "checkpoint" / "backbone_config.json").write_text(config.to_json_string(use_diff=False))
        model = transformers.WhisperModel(config)
        if settings is not None and not (folder / "checkpoint" / "model.safetensors").exists():
            from safetensors.torch import load_file

            stored = load_file(Path(settings) / "model.safetensors")
            tensors = {name.removeprefix("model.encoder."): tensor.float() for name, tensor in stored.items()}
            tensors["embed_positions.weight"] = tensors["embed_positions.weight"][:max_source_positions]
            model.encoder.load_state_dict(tensors)
        return model

    def extractor(name: str, chunk_length: int) -> Any:
        return transformers.WhisperFeatureExtractor(chunk_length=chunk_length)

    torch.Tensor.cuda = lambda self, *arguments, **options: self
    transformers.WhisperModel.from_pretrained = staticmethod(backbone)
    transformers.AutoFeatureExtractor.from_pretrained = staticmethod(extractor)
    from vox_profile.model.emotion.whisper_emotion import WhisperWrapper

    return WhisperWrapper


def make_checkpoint(folder: Path) -> None:
    """A checkpoint in the authors' format, written by their code: pre-trained encoder, random heads."""
    import torch

    model = authors_class(folder)(pretrain_model="whisper_base", finetune_method="frozen", output_class_num=9)
    with torch.no_grad():
        model.emotion_layer[2].weight.mul_(256)  # so that probabilities differ between clips
    model.save_pretrained(folder / "checkpoint")


if __name__ == "__main__":
    main()
