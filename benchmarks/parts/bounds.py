"""What nobody can save: decoding, log-mel, and the encoder's operations at the rate of oneDNN's float32 product."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .clips import RATE


def layer_shapes(config: Any) -> list[tuple[int, int, int]]:
    """Inputs, outputs and number of the linear layers of a Whisper encoder's configuration."""
    width, inner, layers = config.d_model, config.encoder_ffn_dim, config.encoder_layers
    return [(width, width, 4 * layers), (width, inner, layers), (inner, width, layers)]


def operations(config: Any, positions: int) -> tuple[float, float]:
    """Floating-point operations of a clip of so many positions in the encoder: of its linear layers, and of the rest
    (attention's two products and the two convolutions)."""
    width, layers = config.d_model, config.encoder_layers
    linear = sum(2.0 * positions * wide * out * number for wide, out, number in layer_shapes(config))
    attention = 4.0 * positions**2 * width * layers
    convolutions = 2 * 2 * positions * 3 * config.num_mel_bins * width + 2 * positions * 3 * width**2
    return linear, attention + convolutions


def product_rate(config: Any, rows: int, turns: int = 5) -> float:
    """Operations per second of oneDNN's float32 product over the encoder's linear layers at so many rows, taken in
    the order and number in which the encoder has them; the median of some turns."""
    import torch

    multiply: Any = torch.ops.mkldnn._linear_pointwise
    layers = []
    for wide, out, number in layer_shapes(config):
        layers += [(torch.randn(rows, wide), torch.randn(out, wide), torch.randn(out))] * number
    total = sum(2.0 * rows * wide * out * number for wide, out, number in layer_shapes(config))
    seconds = []
    with torch.inference_mode():
        for turn in range(turns + 1):
            start = time.perf_counter()
            for x, weight, bias in layers:
                multiply(x, weight, bias, "none", [], "")
            if turn > 0:
                seconds.append(time.perf_counter() - start)
    return total / statistics.median(seconds)


def bound(folder: Path, batch_size: int) -> Callable[[list[str]], dict[str, float]]:
    """Seconds of decoding, of log-mel and of the encoder's operations, for clips in batches of like length."""
    import soundfile

    from sailer import SailerConfig, SailerProcessor

    tower: Any = SailerConfig.from_pretrained(folder).audio_config
    processor = SailerProcessor.from_pretrained(folder)

    def measure(clips: list[str]) -> dict[str, float]:
        start = time.perf_counter()
        waves = sorted((soundfile.read(clip, dtype="float32")[0] for clip in clips), key=len)
        decoded = time.perf_counter()
        batches = list(_batches(waves, batch_size))
        for batch in batches:
            processor(audio=batch, sampling_rate=RATE)
        prepared = time.perf_counter()
        encoding = work = 0.0
        rates: dict[int, float] = {}
        for batch in batches:
            positions = [len(wave) // 320 for wave in batch]
            rows = sum(positions)
            rate = rates.setdefault(round(rows, -2), product_rate(tower, rows))
            done = sum(sum(operations(tower, number)) for number in positions)
            work += done
            encoding += done / rate
        return {
            "decoding": decoded - start,
            "log-mel": prepared - decoded,
            "encoder": encoding,
            "gigaflops": work / encoding / 1e9,
            "operations": work / len(clips) / 1e9,
        }

    return measure


def _batches(waves: list[Any], size: int) -> Iterator[list[Any]]:
    # As the pipeline's: no more than 30 s at once on a CPU.
    while waves:
        number = min(size, max(1, int(30 * RATE / len(waves[min(size, len(waves)) - 1]))))
        yield waves[:number]
        waves = waves[number:]
