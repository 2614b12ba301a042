"""What a system's answers owe to bfloat16: its speech encoder's linear layers with some of their tensors rounded.

    python benchmarks/rounding.py [MODEL] [--clips 32]

In torch, in float32, on RAVDESS clips: inputs, weights or outputs of all linear layers are rounded to bfloat16, then
all three from each layer on; sums and everything else stay in float32. Told are how far the classes' scores before the
softmax deviate (root mean square, without the mean of a clip) and the largest difference of a probability.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parts.clips import choose_clips, system_parser
from torch import nn
from torch.overrides import TorchFunctionMode

import sailer
from sailer.encoders_sailer import transformer_layers
from sailer.pipeline_sailer import SpeechEmotionPipeline

TENSORS = ("inputs", "weights", "outputs")


class Rounding(TorchFunctionMode):
    """Rounds the named `TENSORS` of linear layers, by their weights: {address of the weight: tensors}."""

    def __init__(self, rounded: dict[int, tuple[str, ...]]) -> None:
        super().__init__()
        self.rounded = rounded

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = self.rounded.get(args[1].data_ptr(), ()) if func is nn.functional.linear else ()
        if not tensors:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        x, weight = (
            value.bfloat16().float() if name in tensors else value
            for name, value in zip(TENSORS, (x, weight), strict=False)
        )
        result = func(x, weight, *bias, **(kwargs or {}))
        return result.bfloat16().float() if "outputs" in tensors else result


def main() -> None:
    arguments = system_parser(__doc__, clips=32).parse_args()
    clips = [str(path) for path in choose_clips(arguments.corpus, arguments.clips)]
    classifier = sailer.load(arguments.model, precision="float32", device="cpu", batch_size=8)
    encoder = classifier.model.sailer.audio_encoder
    classifier.model.config.onednn_linear = "off"  # so that a linear layer is torch's own function
    layers = [weights_of(layer) for layer in transformer_layers(encoder)]
    everything = [weight for layer in layers for weight in layer]
    exact = scores(classifier, clips, {})
    print(f"{len(clips)} clips; a score differs by, a probability by at most")
    for name in TENSORS:
        tell(f"{name} of all layers", scores(classifier, clips, dict.fromkeys(everything, (name,))), exact)
    for first in reversed(range(len(layers))):
        later = [weight for layer in layers[first:] for weight in layer]
        tell(
            f"all three, layers {first + 1} to {len(layers)}",
            scores(classifier, clips, dict.fromkeys(later, TENSORS)),
            exact,
        )


def weights_of(layer: nn.Module) -> list[int]:
    """Addresses of the weights of its linear layers."""
    return [module.weight.data_ptr() for module in layer.modules() if isinstance(module, nn.Linear)]


def scores(classifier: SpeechEmotionPipeline, clips: list[str], rounded: dict[int, tuple[str, ...]]) -> torch.Tensor:
    """(clips, labels), before the softmax."""
    with Rounding(rounded):
        results = classifier(clips, function_to_apply="none")
    return torch.tensor([[row["score"] for row in sorted(result, key=lambda row: row["label"])] for result in results])


def tell(what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    apart = (one - other) - (one - other).mean(1, keepdim=True)
    most = (one.softmax(1) - other.softmax(1)).abs().max()
    print(f"  {what:28} {apart.square().mean().sqrt():.4f} {most:.4f}", flush=True)


if __name__ == "__main__":
    main()
