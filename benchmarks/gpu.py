"""What a GPU hour gives: training steps of the paper's systems and their encoders alone, at their real sizes.

    python benchmarks/gpu.py [--steps 20] [--output_dir FOLDER]

It takes torch and transformers alone (the Hub files are read from this checkout), so that it runs on a bare machine.
The weights are random, the clips noise of MSP-Podcast's durations (2.75 to 11 s, 5.8 s in the mean), in batches of
like length as the recipes have them. A step is what the Trainer does: waveforms to the device, log-mel there, bfloat16
autocast, plain KL, backward, AdamW; one more is taken, up to the loss and without dropout, with every wait of the host
for the device forbidden, and the benchmark fails if there is one. Floating-point operations are counted by torch as
they run; their share is of the rate of a large bfloat16 product, measured too. Hours are those of 15 epochs of 84,260
clips, without the input side, which works in other processes.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, WhisperFeatureExtractor

ROOT = Path(__file__).resolve().parents[1]
RATE, CLIPS, EPOCHS = 16000, 84_260, 15
LABELS = 9
# By name: speech encoder, text encoder, whether the speech encoder is trained, rows a batch.
TRAINED: dict[str, tuple[str, str | None, bool, int]] = {
    "Whisper large-v3 and RoBERTa large, frozen": ("whisper-large-v3", "roberta-large", False, 32),
    "Whisper large-v3, frozen": ("whisper-large-v3", None, False, 32),
    "WavLM large and RoBERTa large, WavLM trained": ("wavlm-large", "roberta-large", True, 8),
    "WavLM large, trained": ("wavlm-large", None, True, 8),
}
ENCODERS = ("whisper-large-v3", "wavlm-large")


def main() -> None:
    """Print a table of training, one of encoders, and what they were made on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each system")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that the script works")
    parser.add_argument("--configs", type=Path, default=ROOT / "backbone_configs", help="folder of the sizes")
    parser.add_argument("--output_dir", type=Path, help="also write gpu.json there")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA GPU here (--device cpu shows that the script works)")
    import_hub_files()
    torch.set_float32_matmul_precision("high")
    device = torch.device(arguments.device)
    peak = product_rate(device)
    on = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{datetime.now():%Y-%m-%d}, {on}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"A large bfloat16 product runs at {peak / 1e12:.0f} TFLOP/s.")
    rows = [train(name, *system, arguments.configs, arguments.steps, device, peak) for name, system in TRAINED.items()]
    show(rows, "training step", hours=True)
    alone = [
        encode(name, seconds, arguments.configs, arguments.steps, device, peak)
        for name in ENCODERS
        for seconds in (None, 30.0)
    ]
    show(alone, "encoder alone, bfloat16, no gradients", hours=False)
    waiting = [f"{row['name']}: {row['waits']}" for row in rows + alone if row["waits"]]
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        (arguments.output_dir / "gpu.json").write_text(json.dumps({"device": on, "peak": peak, "rows": rows + alone}))
    if waiting:
        raise SystemExit("\n".join(["error: the host waits for the device in", *waiting]))


def import_hub_files() -> None:
    """Have `sailer` mean this checkout, whatever its folder is called."""
    place = tempfile.mkdtemp()
    (Path(place) / "sailer").symlink_to(ROOT)
    sys.path.insert(0, place)


def product_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large bfloat16 product, the best of ten."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = min(clocked(lambda: a @ b, device) for _ in range(10))
    return 2 * size**3 / best


def clocked(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def durations(batches: int, size: int) -> Iterator[np.ndarray]:
    """Seconds of the clips of as many batches of like length, spread over the corpus's durations; shuffled."""
    generator = np.random.default_rng(0)
    seconds = np.clip(generator.lognormal(np.log(5.4), 0.42, batches * size * 8), 2.75, 11)
    chosen = np.sort(seconds).reshape(-1, size)[4::8]
    yield from generator.permutation(chosen)


def train(
    name: str,
    audio: str,
    text: str | None,
    is_trained: bool,
    size: int,
    configs: Path,
    steps: int,
    device: torch.device,
    peak: float,
) -> dict[str, Any]:
    """Time `steps` steps of a system; rows a batch as in the paper's recipes."""
    from sailer.configuration_sailer import SailerConfig
    from sailer.modeling_sailer import SailerForAudioClassification

    fresh(device)
    config = SailerConfig(
        audio_config=read(configs, audio),
        text_config=None if text is None else read(configs, text),
        audio_layers="weighted" if "wavlm" in audio else "last",
        freeze_audio=not is_trained,
        freeze_text=True,
        heads=["primary"],
    )
    torch.manual_seed(0)
    with device:
        model = SailerForAudioClassification(config).to(device).train()  # WavLM makes one parameter on the CPU
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
    log_mel = log_mel_of(config.audio_config, device)
    batches = [make_batch(seconds, config, device) for seconds in durations(steps, size)]

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16):
            return model(**log_mel(inputs)).loss

    def step(batch: dict[str, torch.Tensor]) -> None:
        forward(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for batch in batches[:3]:
        step(batch)
    model.eval()  # transformers' SpecAugment, which WavLM has in training, counts each clip's frames on the host
    waits = waits_in(lambda: forward(batches[0]), device)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    row = timed(name, step, batches, device, peak)
    hours = EPOCHS * CLIPS / row["clips_per_second"] / 3600
    return row | {"hours": hours, "rows_a_batch": size, "waits": waits}


def encode(
    name: str, seconds: float | None, configs: Path, steps: int, device: torch.device, peak: float
) -> dict[str, Any]:
    """Time an encoder alone on batches of 32 clips at their own lengths, or padded to `seconds`."""
    from sailer.configuration_sailer import SailerConfig
    from sailer.encoders_sailer import build_encoder, encode_audio
    from sailer.linear_sailer import tower_kernels

    fresh(device)
    config = SailerConfig(audio_config=read(configs, name), heads=["primary"])
    torch.manual_seed(0)
    with device:
        encoder = build_encoder(config.audio_config).eval().to(device, torch.bfloat16)
    log_mel = log_mel_of(config.audio_config, device)
    batches = [make_batch(own, config, device, pad_to=seconds) for own in durations(steps, 32)]

    def run(batch: dict[str, torch.Tensor]) -> None:
        inputs = log_mel({key: value.to(device, non_blocking=True) for key, value in batch.items()})
        audio = inputs["input_features" if "input_features" in inputs else "input_values"].to(torch.bfloat16)
        with tower_kernels("auto", encoder):
            encode_audio(encoder, audio, inputs["attention_mask"])

    with torch.no_grad():  # in inference mode torch cannot count WavLM's operations
        for batch in batches[:3]:
            run(batch)
        waits = waits_in(lambda: run(batches[0]), device)
        name = f"{name}, {'own lengths' if seconds is None else f'padded to {seconds:.0f} s'}"
        return timed(name, run, batches, device, peak) | {"waits": waits}


def timed(
    name: str, run: Callable[[dict[str, torch.Tensor]], None], batches: list[Any], device: torch.device, peak: float
) -> dict[str, Any]:
    """Clips and speech a second by the median batch, highest memory and share of the product's rate."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [clocked(lambda: run(batch), device) for batch in batches]  # noqa: B023 - run at once
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            run(batch)
    clips = sum(len(batch["attention_mask"]) for batch in batches)
    row = {
        "name": name,
        "clips_per_second": clips / sum(seconds),
        "median_step_ms": 1000 * statistics.median(seconds),
        "memory_gib": memory / 2**30,
        "share_of_peak": counter.get_total_flops() / sum(seconds) / peak,
        "gflop_per_clip": counter.get_total_flops() / clips / 1e9,
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def make_batch(
    seconds: np.ndarray, config: Any, device: torch.device, pad_to: float | None = None
) -> dict[str, torch.Tensor]:
    """Noise of these durations as the collator hands it over: waveforms, masks, transcripts of 3 tokens a second."""
    samples = np.round(seconds * RATE).astype(int)
    longest = int(RATE * pad_to) if pad_to else int(samples.max())
    longest += -longest % 160
    own = torch.from_numpy(np.minimum(samples, longest)).unsqueeze(1)
    waveforms = torch.randn(len(seconds), longest) * 0.1 * (torch.arange(longest) < own)
    is_whisper = config.audio_config.model_type == "whisper"
    frames = torch.arange(longest // 160) < own // 160
    batch: dict[str, torch.Tensor] = {
        "waveforms" if is_whisper else "input_values": waveforms,
        "attention_mask": (frames if is_whisper else torch.arange(longest) < own).long(),
        "labels": torch.full((len(seconds), LABELS), 1 / LABELS),
    }
    if config.text_config is not None:
        tokens = torch.from_numpy(np.maximum((3 * seconds).astype(int), 4)).unsqueeze(1)
        batch["text_attention_mask"] = (torch.arange(int(tokens.max())) < tokens).long()
        batch["input_ids"] = torch.randint(5, 50_000, batch["text_attention_mask"].shape)
    return {key: value.pin_memory() for key, value in batch.items()} if device.type == "cuda" else batch


def log_mel_of(
    audio_config: Any, device: torch.device
) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Waveforms to log-mel on the device, for the encoders that take it."""
    from sailer.processing_sailer import SailerProcessor

    if audio_config.model_type != "whisper":
        return lambda inputs: inputs
    processor = SailerProcessor(WhisperFeatureExtractor(feature_size=audio_config.num_mel_bins))

    def made(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return inputs | {"input_features": processor.log_mel(inputs.pop("waveforms"), device)}

    return made


def waits_in(run: Callable[[], Any], device: torch.device) -> str | None:
    """Where the host waits for the device in a call; None if it does not."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{frame.filename}:{frame.lineno}: {frame.line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def read(configs: Path, name: str) -> Any:
    return AutoConfig.from_pretrained(configs / f"{name}.json")


def fresh(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def show(rows: list[dict[str, Any]], title: str, hours: bool) -> None:
    print(f"\n| {title} | clips/s | peak GiB | GFLOP a clip | share of the product's rate |" + " hours |" * hours)
    print("|---|--:|--:|--:|--:|" + "--:|" * hours)
    for row in rows:
        line = (
            f"| {row['name']} | {row['clips_per_second']:.0f} | {row['memory_gib']:.1f} | {row['gflop_per_clip']:.0f} "
        )
        print(line + f"| {row['share_of_peak']:.0%} |" + (f" {row['hours']:.2f} |" if hours else ""))


if __name__ == "__main__":
    main()
