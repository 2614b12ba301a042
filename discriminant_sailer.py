"""A linear discriminant of a clip's mean speech state; its opinion of the emotion is pooled with the head's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class LinearDiscriminant(nn.Module):
    """A linear score for each label, of the mean over time of what the head is given frame by frame.

    Buffers: `mean` (width,), which is taken off first; `weight` (labels, width); `bias` (labels,). They are fitted in
    closed form after training (`sailer.training.discriminant`); zero until then.
    """

    mean: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("weight", torch.zeros(labels, width))
        self.register_buffer("bias", torch.zeros(labels))

    def forward(self, speech_means: torch.Tensor) -> torch.Tensor:
        """(batch, width) -> (batch, labels): the labels' log probabilities, up to a constant of each clip."""
        return nn.functional.linear(speech_means - self.mean, self.weight, self.bias)


def pool_opinions(
    model: Any, logits: torch.Tensor | None, speech_means: torch.Tensor, speaker_shift: torch.Tensor | None
) -> torch.Tensor | None:
    """The primary head's logits (batch, labels) and the discriminant's, each by its share; the former alone where
    there is no discriminant. None without that head.

    A logarithmic opinion pool: the probabilities are the geometric mean, weighted and normalised (Genest and Zidek,
    Combining probability distributions, Statistical Science 1986, https://doi.org/10.1214/ss/1177013825).
    """
    discriminant: LinearDiscriminant | None = getattr(model, "discriminant", None)
    if discriminant is None or logits is None:
        return logits
    share = model.config.discriminant_share
    means = speech_means if speaker_shift is None else speech_means - speaker_shift.to(speech_means)
    return (1 - share) * logits + share * discriminant(means)


def set_discriminant(model: Any, mean: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Give a system a fitted discriminant: see `LinearDiscriminant` for the shapes."""
    discriminant = LinearDiscriminant(*weight.T.shape)
    discriminant.load_state_dict({"mean": mean, "weight": weight, "bias": bias})
    model.discriminant = discriminant.to(model.device)


def without_discriminant(model: Any) -> None:
    """Take a system's discriminant off, so that its head learns to say all by itself; the share stays as it is."""
    if hasattr(model, "discriminant"):
        del model.discriminant


__all__ = ["LinearDiscriminant", "pool_opinions", "set_discriminant", "without_discriminant"]
