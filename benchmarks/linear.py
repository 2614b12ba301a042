"""oneDNN's float32 product beside torch's own choice (MKL): at Whisper base's shapes, in its encoder, in all there is.

    python benchmarks/linear.py
    MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/linear.py    # MKL as slow as on processors that it does not favour

Rates are medians, the two taking turns. "encoder" is Whisper base's with random weights, "pipeline" goes from clips of
3.7 s to probabilities, "training" is a step (forward and backward) with no tower frozen, of 4 clips of 3.7 s. The
largest difference is that of the encoder's states, of any probability, and of a layer's gradient. The memory is what
the process holds more once oneDNN has run. Takes half a minute.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from os import environ
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn
from transformers import WhisperConfig, WhisperFeatureExtractor

from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline
from sailer.linear_sailer import LEAST_GAIN, is_available, measured_gain, onednn_linear

RATE = 16000
CHOICES = ("off", "on")
# Rows are the encoder's positions, 50 a second: of 1.3 s, 3.7 s, 15 s and eight clips of 4 s.
ROWS = (64, 185, 750, 1600)
LAYERS = {"attention": (512, 512), "fc1": (512, 2048), "fc2": (2048, 512)}
CLIPS = {"1 x 3.7 s": (1, 3.7), "1 x 15 s": (1, 15.0), "8 x 4 s": (8, 4.0)}
BASE = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "num_mel_bins": 80}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    if not is_available():
        raise SystemExit("This torch has no oneDNN: nothing to compare.")
    print_header()
    print_products(arguments.rounds)
    torch.manual_seed(0)
    model = SailerForAudioClassification(SailerConfig(audio_config=WhisperConfig(**BASE))).eval()
    processor = SailerProcessor(WhisperFeatureExtractor())
    inputs = processor(audio=noise(3.7, 0), sampling_rate=RATE)
    held = []
    for choice in ("off", "off", "on"):
        model.config.onednn_linear = choice
        encode(model, inputs)
        held.append(psutil.Process().memory_info().rss / 2**20)
    weights = sum(parameter.nbytes for parameter in model.sailer.audio_encoder.parameters()) / 2**20
    print(f"\nmemory: {held[-1] - held[-2]:.0f} MB more with oneDNN, of an encoder whose weights are {weights:.0f} MB")
    print(f"\n{'clips/s':24}{'off':>10}{'on':>10}{'on / off':>10}{'largest difference':>20}")
    for name, (number, seconds) in CLIPS.items():
        inputs = processor(audio=[noise(seconds, seed) for seed in range(number)], sampling_rate=RATE)
        compare(model, f"encoder, {name}", lambda inputs=inputs: encode(model, inputs), number, arguments.rounds)
    classifier = SpeechEmotionPipeline(model, processor, device="cpu")
    clips = [noise(3.7, seed) for seed in range(8)]
    for size in (1, 8):
        run = partial(scores, classifier, clips, size)
        compare(model, f"pipeline, batch {size}", run, len(clips), arguments.rounds)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.config.freeze_audio = False
    inputs = processor(audio=clips[:4], sampling_rate=RATE)
    compare(model, "training", lambda: train_step(model, inputs), 4, arguments.rounds)


def print_header() -> None:
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    held = environ.get("MKL_ENABLE_INSTRUCTIONS")
    print(
        f"{datetime.now():%Y-%m-%d}, {names[0] if names else platform.processor()}, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads" + (f", MKL held to {held}" if held else "")
    )
    gain = measured_gain()
    print(f"Measured gain {gain:.2f}: 'auto' is {'on' if gain >= LEAST_GAIN else 'off'} (on from {LEAST_GAIN}).")


def print_products(rounds: int) -> None:
    """Billions of floating-point operations per second, of the shapes that the encoder multiplies."""
    print(f"\n{'GFLOP/s':12}{'rows':>6}{'torch':>10}{'oneDNN':>10}{'ratio':>10}")
    for name, (width, outputs) in LAYERS.items():
        layer = nn.Linear(width, outputs).requires_grad_(False)
        for rows in ROWS:
            x = torch.rand(rows, width)
            repeats = max(1, 2**28 // (rows * width * outputs))

            def run(layer: nn.Module = layer, x: torch.Tensor = x, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    layer(x)

            def by_onednn(run: Callable = run, layer: nn.Module = layer) -> None:
                with onednn_linear("on", layer):
                    run()

            plain, fast = take_turns([run, by_onednn], rounds)
            work = 2e-9 * repeats * rows * width * outputs
            print(f"{name:12}{rows:6}{work / plain:10.0f}{work / fast:10.0f}{plain / fast:10.2f}")


def compare(
    model: SailerForAudioClassification, name: str, run: Callable[[], torch.Tensor], clips: int, rounds: int
) -> None:
    def with_choice(choice: str) -> torch.Tensor:
        model.config.onednn_linear = choice
        return run()

    results = [with_choice(choice) for choice in CHOICES]
    off, on = take_turns([lambda choice=choice: with_choice(choice) for choice in CHOICES], rounds)
    difference = (results[0] - results[1]).abs().max().item()
    print(f"{name:24}{clips / off:10.2f}{clips / on:10.2f}{off / on:10.2f}{difference:20.1e}")


def take_turns(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for place, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if turn > 0:  # the first one warms up
                seconds[place].append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def encode(model: SailerForAudioClassification, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model.sailer.audio_hidden_states(inputs["input_features"], inputs["attention_mask"])[0]


def scores(classifier: SpeechEmotionPipeline, clips: list[np.ndarray], batch_size: int) -> torch.Tensor:
    results = classifier(clips, batch_size=batch_size)
    return torch.tensor([[row["score"] for row in sorted(result, key=lambda row: row["label"])] for result in results])


def train_step(model: SailerForAudioClassification, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    model(**inputs, labels=torch.full((len(inputs["input_features"]), 9), 1 / 9)).loss.backward()
    gradient = model.sailer.audio_encoder.layers[0].fc1.weight.grad
    assert gradient is not None
    return gradient.clone()


def noise(seconds: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


if __name__ == "__main__":
    main()
