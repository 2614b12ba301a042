"""Where the time of inference goes, by kind of operation: plain torch and OpenVINO, on clips of RAVDESS.

    python benchmarks/profiling.py [MODEL] [--clips 16] [--precision float32]

A batch of clips of a trained system after a warm-up: torch by its profiler, OpenVINO by its counters. Told are
milliseconds of a clip, the share of each kind, and at which rate the linear layers' products ran, beside the rate of
oneDNN's float32 product alone at the same shapes, which `benchmarks/inference.py` takes for its bound.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import soundfile
import torch
from parts.bounds import operations, product_rate
from parts.clips import choose_clips, system_parser
from torch.profiler import ProfilerActivity, profile

import sailer

# What the runtimes call an operation begins with one of these, in this order.
KINDS = {
    "attention": ("aten::_scaled_dot", "aten::scaled_dot", "aten::_flash", "ScaledDotProduct", "MatMul", "Softmax"),
    "fused by OpenVINO (attention, sums, GELU)": ("Subgraph",),
    "linear layers": ("mkldnn::", "aten::addmm", "aten::mm", "aten::mkldnn_linear", "aten::linear", "FullyConnected"),
    "convolutions": ("aten::mkldnn_conv", "aten::conv", "aten::_conv", "aten::thnn_conv", "Convolution"),
    "normalisation": ("aten::native_layer_norm", "aten::native_batch_norm", "MVN"),
    "GELU": ("aten::gelu", "Gelu"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "Reorder", "Transpose", "Convert", "Concat"),
}


def main() -> None:
    parser = system_parser(__doc__, clips=16)
    parser.add_argument("--precision", default="float32")
    arguments = parser.parse_args()
    clips = [str(path) for path in choose_clips(arguments.corpus, arguments.clips)]
    positions = [int(soundfile.info(clip).duration * 50) for clip in clips]
    for backend, measure in (("torch", torch_times), ("openvino", openvino_times)):
        classifier = sailer.load(
            arguments.model, backend=backend, precision=arguments.precision, device="cpu", batch_size=8, num_workers=0
        )
        classifier(clips)
        times = measure(classifier, clips)
        total, tower = sum(times.values()), classifier.model.config.audio_config
        print(f"\n{backend} {arguments.precision}: {1000 * total / len(clips):.1f} ms a clip inside operations")
        for kind, seconds in times.most_common():
            print(f"  {kind:42}{seconds / total:7.1%}")
        work = sum(operations(tower, number)[0] for number in positions)
        print(
            f"  the linear layers' {work / len(clips) / 1e9:.1f} G operations a clip ran at "
            f"{work / times['linear layers'] / 1e9:.0f} GFLOP/s; oneDNN's float32 product alone at "
            f"{product_rate(tower, sum(positions[:8])) / 1e9:.0f}"
        )


def torch_times(classifier: Any, clips: list[str]) -> Counter[str]:
    """Seconds by kind of operation, of torch's own profiler: each operation without those that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        classifier(clips)
    return by_kind({event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()})


def openvino_times(classifier: Any, clips: list[str]) -> Counter[str]:
    """Seconds by kind of operation, of OpenVINO's counters."""
    import openvino

    model, batches = classifier.model, []
    run, options = model._run, {"PERF_COUNT": True, "PERFORMANCE_HINT": "LATENCY"}
    model._run = lambda inputs: (batches.append({name: value.copy() for name, value in inputs.items()}), run(inputs))[
        1
    ]
    classifier(clips)
    core, hint = openvino.Core(), model._compiled.get_property("INFERENCE_PRECISION_HINT")
    options |= {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": hint}
    request = core.compile_model(core.read_model(model.path), "CPU", options).create_infer_request()
    found: Counter[str] = Counter()
    for batch in batches:
        request.infer(batch)  # a length that is new is prepared for
        request.infer(batch)
        for entry in request.profiling_info:
            found[entry.node_type] += entry.real_time.total_seconds()
    return by_kind(found)


def by_kind(times: dict[str, float]) -> Counter[str]:
    """Seconds of `KINDS` and of the rest, from those of operations by name."""
    found: Counter[str] = Counter()
    for name, seconds in times.items():
        found[next((kind for kind, names in KINDS.items() if name.startswith(names)), "the rest")] += seconds
    return found


if __name__ == "__main__":
    main()
