"""What a GPU hour gives: training steps of the paper's systems and their encoders alone, at their real sizes.

    python benchmarks/gpu.py [--steps 20] [--output_dir FOLDER] [--only WavLM] [--profile FILE]
    python benchmarks/gpu.py --device cpu --tiny --steps 4    # that the script works, without a GPU

It takes torch and transformers alone (the Hub files are read from this checkout), so that it runs on a bare machine.
The weights are random, the clips noise of MSP-Podcast's durations (2.75 to 11 s, 5.8 s in the mean), in batches of
like length as the recipes have them. A step is what the Trainer does: waveforms to the device, log-mel there, bfloat16
autocast, plain KL, backward and, every 32 clips, AdamW; one more is taken, up to the loss and without dropout, with
every wait of the host for the device forbidden, and the benchmark says in the end where there is one. Floating-point
operations are counted by torch as they run; their share is of the rate of a large bfloat16 product, measured too.
Hours are those of 15 epochs of 84,260 clips, without the input side, which works in other processes.

Each batch is timed twice: libraries plan their kernels by shape, so that a length costs more when it is heard for the
first time. Figures are of the second time, a column has the first. `busy` is the share of the time in which the device
computes: where it is low the host, which launches the kernels, is what a step waits for.
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
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, WhisperFeatureExtractor

ROOT = Path(__file__).resolve().parents[1]
RATE, CLIPS, EPOCHS = 16000, 84_260, 15
LABELS = 9
ROWS = 32  # clips of an optimizer's step


@dataclass(frozen=True)
class System:
    """What is trained, and how.

    Args:
        audio, text: encoders; the text encoder is frozen.
        trained: whether the speech encoder is trained.
        rows: clips a batch; the optimizer's step comes after `ROWS`.
        frames: the batch is padded to so many frames (of 20 ms) or a multiple, so that there are few lengths.
        compiled: WavLM's layers by torch.compile.
    """

    audio: str
    text: str | None = None
    trained: bool = False
    rows: int = ROWS
    frames: int | None = None
    compiled: bool = False


TRAINED: dict[str, System] = {
    "Whisper large-v3 and RoBERTa large, frozen": System("whisper-large-v3", "roberta-large"),
    "Whisper large-v3, frozen": System("whisper-large-v3"),
    "WavLM large and RoBERTa large, WavLM trained, 4 x 8": System("wavlm-large", "roberta-large", True, 8),
    "WavLM large and RoBERTa large, WavLM trained, 32": System("wavlm-large", "roberta-large", True),
    "WavLM large, trained, 4 x 8": System("wavlm-large", None, True, 8),
    "WavLM large, trained, 4 x 8, few lengths": System("wavlm-large", None, True, 8, 32),
    "WavLM large, trained, 32": System("wavlm-large", None, True),
    "WavLM large, trained, 32, few lengths": System("wavlm-large", None, True, frames=32),
    "WavLM large, trained, 32, few lengths, compiled": System("wavlm-large", None, True, frames=32, compiled=True),
}
ENCODERS = ("whisper-large-v3", "wavlm-large")
_NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY: dict[str, dict[str, Any]] = {
    "whisper-large-v3": {
        **{"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
        **{"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
    },
    "wavlm-large": _NARROW | {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2},
    "roberta-large": _NARROW,
}


def main() -> None:
    """Print a table of training, one of encoders, and what they were made on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each system")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to see that the script works")
    parser.add_argument("--configs", type=Path, default=ROOT / "backbone_configs", help="folder of the sizes")
    parser.add_argument("--tiny", action="store_true", help="a trial with narrow layers and short clips")
    parser.add_argument("--only", default="", help="the systems and encoders alone whose names have this in them")
    parser.add_argument("--profile", type=Path, help="write there which operations take a step's time")
    parser.add_argument("--output_dir", type=Path, help="also write gpu.json there, after every row")
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
    bench = Bench(arguments, device, peak)
    rows: list[dict[str, Any]] = []

    def measured(name: str, work: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """The row, if there is one: what fails (for lack of memory, of a compiler) costs none of the others."""
        if arguments.only.lower() not in name.lower():
            return []
        try:
            row = work()
        except Exception as error:
            traceback.print_exc()
            row = {"name": name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if arguments.output_dir is not None:
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            (arguments.output_dir / "gpu.json").write_text(json.dumps({"device": on, "peak": peak, "rows": rows}))
        return [row]

    def trained(compiled: bool) -> list[dict[str, Any]]:
        systems = {name: system for name, system in TRAINED.items() if system.compiled == compiled}
        return [row for name, system in systems.items() for row in measured(name, partial(bench.train, name, system))]

    show(trained(compiled=False), "training step", hours=True)
    alone = []
    for encoder in ENCODERS:
        for seconds in (None, 30.0):
            name = f"{encoder}, {'own lengths' if seconds is None else f'padded to {seconds:.0f} s'}"
            alone += measured(name, partial(bench.encode, name, encoder, seconds))
    show(alone, "encoder alone, bfloat16, no gradients", hours=False)
    show(trained(compiled=True), "training step, compiled", hours=True)  # last: compiling takes longest
    for row in rows:
        if waits := row.get("waits"):
            print(f"The host waits for the device in {row['name']}: {waits}")
    if failed := [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]:
        raise SystemExit("\n".join(["error: not measured:", *failed]))


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


class Bench:
    """Times systems on a device whose large product runs at `peak` operations a second."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, peak: float) -> None:
        self.arguments, self.device, self.peak = arguments, device, peak
        self.scale = 0.1 if arguments.tiny else 1.0  # of the clips' durations

    def train(self, name: str, system: System) -> dict[str, Any]:
        """Time a system's training."""
        from sailer.configuration_sailer import SailerConfig
        from sailer.modeling_sailer import SailerForAudioClassification

        device = self.fresh()
        config = SailerConfig(
            audio_config=self.read(system.audio),
            text_config=None if system.text is None else self.read(system.text),
            audio_layers="weighted" if "wavlm" in system.audio else "last",
            freeze_audio=not system.trained,
            freeze_text=True,
            heads=["primary"],
        )
        torch.manual_seed(0)
        with device:
            model = SailerForAudioClassification(config).to(device).train()  # WavLM makes one parameter on the CPU
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.type == "cuda")
        log_mel = log_mel_of(config.audio_config, device)
        made = durations(self.arguments.steps * ROWS // system.rows, system.rows)
        batches = [make_batch(seconds * self.scale, config, device, frames=system.frames) for seconds in made]
        since = 0

        def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            inputs = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            with torch.autocast(device.type, torch.bfloat16):
                return model(**log_mel(inputs)).loss

        def step(batch: dict[str, torch.Tensor]) -> None:
            nonlocal since
            forward(batch).backward()
            since += len(batch["attention_mask"])
            if since >= ROWS:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                since = 0

        flops = None
        if system.compiled:  # torch counts nothing in what is compiled
            flops = self.counted(step, batches)
            backend = "inductor" if device.type == "cuda" else "aot_eager"
            for layer in model.sailer.audio_encoder.encoder.layers:
                for part in (layer.attention, layer.feed_forward):  # around them transformers collects states
                    part.forward = torch.compile(part.forward, dynamic=True, fullgraph=True, backend=backend)
        for batch in batches[:4]:
            step(batch)
        model.eval()  # transformers' SpecAugment, which WavLM has in training, counts each clip's frames on the host
        waits = waits_in(lambda: forward(batches[0]), device)
        model.train()
        row = self.timed(name, step, batches, flops)
        hours = EPOCHS * CLIPS / row["clips_per_second"] / 3600
        return row | {"hours": hours, "rows_a_batch": system.rows, "waits": waits}

    def encode(self, name: str, encoder_name: str, seconds: float | None) -> dict[str, Any]:
        """Time an encoder alone on batches of 32 clips at their own lengths, or padded to `seconds`."""
        from sailer.configuration_sailer import SailerConfig
        from sailer.encoders_sailer import build_encoder, encode_audio
        from sailer.linear_sailer import tower_kernels

        device = self.fresh()
        config = SailerConfig(audio_config=self.read(encoder_name), heads=["primary"])
        torch.manual_seed(0)
        with device:
            encoder = build_encoder(config.audio_config).eval().to(device, torch.bfloat16)
        log_mel = log_mel_of(config.audio_config, device)
        made = durations(self.arguments.steps, ROWS)
        pad_to = None if seconds is None else seconds * self.scale
        batches = [make_batch(own * self.scale, config, device, pad_to=pad_to) for own in made]

        def run(batch: dict[str, torch.Tensor]) -> None:
            inputs = log_mel({key: value.to(device, non_blocking=True) for key, value in batch.items()})
            audio = inputs["input_features" if "input_features" in inputs else "input_values"].to(torch.bfloat16)
            with tower_kernels("auto", encoder):
                encode_audio(encoder, audio, inputs["attention_mask"])

        with torch.no_grad():  # in inference mode torch cannot count WavLM's operations
            for batch in batches[:3]:
                run(batch)
            waits = waits_in(lambda: run(batches[0]), device)
            return self.timed(name, run, batches) | {"waits": waits}

    def timed(
        self,
        name: str,
        run: Callable[[dict[str, torch.Tensor]], None],
        batches: list[Any],
        flops: int | None = None,
    ) -> dict[str, Any]:
        """Clips a second, highest memory and share of the product's rate, all of the second time of each batch."""
        clips = sum(len(batch["attention_mask"]) for batch in batches)
        first = sum(clocked(partial(run, batch), self.device) for batch in batches)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [clocked(partial(run, batch), self.device) for batch in batches]
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        busy = self.busy(name, run, batches[: max(4, len(batches) // 4)])
        flops = self.counted(run, batches) if flops is None else flops
        return {
            "name": name,
            "clips_per_second": clips / sum(seconds),
            "first_time": clips / first,
            "median_step_ms": 1000 * statistics.median(seconds),
            "memory_gib": memory / 2**30,
            "busy": busy,
            "share_of_peak": flops / sum(seconds) / self.peak,
            "gflop_per_clip": flops / clips / 1e9,
        }

    def counted(self, run: Callable[[dict[str, torch.Tensor]], None], batches: list[Any]) -> int:
        """Floating-point operations of these batches."""
        with FlopCounterMode(display=False) as counter:
            for batch in batches:
                run(batch)
        return counter.get_total_flops()

    def busy(self, name: str, run: Callable[[dict[str, torch.Tensor]], None], batches: list[Any]) -> float | None:
        """Share of the time in which the GPU computes; None without one, or where nothing can be seen of it."""
        has_gpu = self.device.type == "cuda"
        if not has_gpu and self.arguments.profile is None:
            return None
        seconds = sum(clocked(partial(run, batch), self.device) for batch in batches)
        kinds = [ProfilerActivity.CUDA] if has_gpu else []
        if self.arguments.profile is not None or not has_gpu:
            kinds.append(ProfilerActivity.CPU)
        with torch.profiler.profile(activities=kinds) as profile:
            for batch in batches:
                run(batch)
            if has_gpu:
                torch.cuda.synchronize()
        events = profile.key_averages()
        if self.arguments.profile is not None:
            with self.arguments.profile.open("a", encoding="utf-8") as file:
                for by in ("self_device_time_total",) * has_gpu + ("self_cpu_time_total",):
                    print(f"\n{name}, by {by}\n{events.table(sort_by=by, row_limit=25)}", file=file)
        computed = sum(
            event.self_device_time_total for event in events if event.device_type == torch.autograd.DeviceType.CUDA
        )
        return computed / 1e6 / seconds if has_gpu and computed else None

    def read(self, name: str) -> Any:
        """The configuration of an encoder, of its real size or tiny."""
        config = AutoConfig.from_pretrained(self.arguments.configs / f"{name}.json")
        return config if not self.arguments.tiny else AutoConfig.for_model(**config.to_dict() | TINY[name])

    def fresh(self) -> torch.device:
        """The device, with nothing of what was before."""
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return self.device


def make_batch(
    seconds: np.ndarray, config: Any, device: torch.device, pad_to: float | None = None, frames: int | None = None
) -> dict[str, torch.Tensor]:
    """Noise of these durations as the collator hands it over: waveforms, masks, transcripts of 3 tokens a second."""
    samples = np.round(seconds * RATE).astype(int)
    longest = int(RATE * pad_to) if pad_to else int(samples.max())
    is_whisper = config.audio_config.model_type == "whisper"
    if is_whisper:
        longest += -longest % 160
    elif frames is not None:  # WavLM makes n frames of 320 n + 80 samples
        longest = 320 * frames * -(-(longest - 80) // (320 * frames)) + 80
    own = torch.from_numpy(np.minimum(samples, longest)).unsqueeze(1)
    waveforms = torch.randn(len(seconds), longest) * 0.1 * (torch.arange(longest) < own)
    mel_frames = torch.arange(longest // 160) < own // 160
    batch: dict[str, torch.Tensor] = {
        "waveforms" if is_whisper else "input_values": waveforms,
        "attention_mask": (mel_frames if is_whisper else torch.arange(longest) < own).long(),
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


def show(rows: list[dict[str, Any]], title: str, hours: bool) -> None:
    print(f"\n| {title} | clips/s | first time | peak GiB | GFLOP a clip | share | busy |" + " hours |" * hours)
    print("|---|--:|--:|--:|--:|--:|--:|" + "--:|" * hours)
    for row in rows:
        if "failed" in row:
            print(f"| {row['name']} |" + " - |" * (6 + hours))
            continue
        speeds = f"{row['clips_per_second']:.0f} | {row['first_time']:.0f} | {row['memory_gib']:.1f}"
        busy = "-" if row["busy"] is None else f"{row['busy']:.0%}"
        line = f"| {row['name']} | {speeds} | {row['gflop_per_clip']:.0f} | {row['share_of_peak']:.0%} | {busy} |"
        print(line + (f" {row['hours']:.2f} |" if hours else ""), flush=True)


if __name__ == "__main__":
    main()
