"""Mixup within a batch: each clip becomes a mixture of itself and another, and so do its targets.

What is mixed is either the embeddings, deep in the model (manifold mixup, https://arxiv.org/abs/1806.05236), or the
frozen towers' kept states, before anything that learns has seen them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Inputs of the model that hold a frozen tower's states.
AUDIO_STATES = ("pooled_hidden_states", "audio_hidden_states")
TEXT_STATES = "text_hidden_states"
UNPOOLED = (
    "state_mixup mixes what the layers' sum is made of, and audio_layers '..._norm' normalises each layer after "
    "the states are kept: keep them pooled (frame_pooling: 64), or set state_mixup to 0."
)


class Mixture(NamedTuple):
    """Which clip each clip is mixed with, and how much of itself it keeps: (batch,) each."""

    permutation: Tensor
    shares: Tensor

    @classmethod
    def draw(cls, alpha: float, clips: int, device: torch.device | str) -> Mixture:
        """Shares of Beta(alpha, alpha), by the seed that torch was given: a run that goes on draws what it would have.

        They are drawn on the host, which does not wait until they are on a GPU.
        """
        concentration = torch.tensor(alpha, dtype=torch.float32)
        shares = torch.distributions.Beta(concentration, concentration).sample((clips,))
        permutation = torch.randperm(clips)
        return cls(permutation.to(device, non_blocking=True), shares.to(device, non_blocking=True))

    def of(self, values: Tensor) -> Tensor:
        """Floating-point values (batch, ...), mixed."""
        shares = self.shares.view(-1, *[1] * (values.ndim - 1)).to(values.dtype)
        return shares * values + (1 - shares) * values[self.permutation]


def mix_targets(targets: Mapping[str, Tensor], mixture: Mixture) -> dict[str, Tensor]:
    """Targets (batch, ...) by name, mixed; a class index stays known only where both clips have the same."""
    mixed = {}
    for name, target in targets.items():
        if target.is_floating_point():
            mixed[name] = mixture.of(target)
        else:
            mixed[name] = torch.where(target == target[mixture.permutation], target, -100)
    return mixed


def mix_states(inputs: Mapping[str, Tensor], mixture: Mixture, normalizes: bool = False) -> dict[str, Tensor]:
    """A batch whose kept states are mixed, frame by frame.

    The layers' weighted sum is linear: to mix what is kept of each layer is to mix the sum. Where one of the two clips
    is over, the other's frames go on alone, and count by its share.

    Args:
        inputs: the model's, with kept states of every tower, and `attention_mask` (batch, groups): how many frames
            of the clip each group holds.
        mixture: of the batch.
        normalizes: the model normalises each layer before the sum (`audio_layers` ends in "_norm"), which is linear
            no more; states that are kept pooled are normalised already.

    Raises:
        ValueError: a tower's states are not kept, or not as they are summed.
    """
    name = next((name for name in AUDIO_STATES if name in inputs), None)
    if name is None or ("input_ids" in inputs and TEXT_STATES not in inputs):
        raise ValueError(
            "state_mixup mixes kept states, and the batch has none of every tower: set cache_features, or state_mixup "
            "to 0 (manifold_mixup mixes embeddings, whatever they come from)."
        )
    if normalizes and name == "audio_hidden_states":
        raise ValueError(UNPOOLED)
    states = inputs[name]
    counts = inputs["attention_mask"].to(torch.float32)
    shares = mixture.shares.to(torch.float32).unsqueeze(1)
    own, other = shares * counts, (1 - shares) * counts[mixture.permutation]
    both = own + other
    weight = own / both.clamp(min=torch.finfo(torch.float32).tiny)
    weight = weight.view(len(states), *[1] * (states.ndim - 3), -1, 1)
    mixed = {name: weight * states + (1 - weight) * states[mixture.permutation], "attention_mask": both}
    if TEXT_STATES in inputs:
        mixed[TEXT_STATES] = mixture.of(inputs[TEXT_STATES])
    return {**inputs, **mixed}
