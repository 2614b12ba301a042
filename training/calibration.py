"""Logits of a model trained on re-weighted targets go in, the annotators' distribution comes out (paper, section 2.1).

Targets d * w make softmax(logits) approach d * w / sum(d * w); dividing w out and a fitted temperature give d back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import Tensor

logger = logging.getLogger(__name__)

Array = TypeVar("Array", Tensor, np.ndarray)

TEMPERATURE_RANGE = (0.05, 20.0)


def natural_probabilities(
    logits: Array, label_weights: Sequence[float] | Tensor | np.ndarray | None = None, temperature: float = 1.0
) -> Array:
    """softmax((logits - log w) / temperature): the distribution of the annotators' votes.

    Args:
        logits: (..., labels), a tensor or an array; the result is of the same kind.
        label_weights: (labels,) the w that softmax(logits) carries (`SailerObjective.implied_label_weights`), None for
            none. A class of weight 0 had no training clip and gets probability 0.
        temperature: above 1 softens, below 1 sharpens.

    Raises:
        ValueError: a temperature that is not positive, or weights that are negative, all 0 or of another length.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    scores = torch.as_tensor(logits)
    weights = torch.as_tensor(_class_weights(label_weights, scores.shape[-1])).to(scores)
    # Masked, as log 0 would lift a class without weight over all others.
    probabilities = ((scores - weights.log()) / temperature).masked_fill(weights == 0, -math.inf).softmax(dim=-1)
    return probabilities if isinstance(logits, Tensor) else probabilities.numpy()


def fit_temperature(
    logits: Tensor | np.ndarray,
    distributions: Tensor | np.ndarray,
    label_weights: Sequence[float] | Tensor | np.ndarray | None = None,
) -> float:
    """Temperature for which the natural probabilities have the least cross-entropy to the annotators' distributions.

    One number, by bounded search of its logarithm within `TEMPERATURE_RANGE` (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599, with soft targets). The cross-entropy is convex in 1 / temperature: the minimum
    found is the global one.

    Args:
        logits: (clips, labels) of the validation set.
        distributions: (clips, labels); rows with NaN are left out. Votes for a class of weight 0, which has
            probability 0 at any temperature, are left out too and the rest of the row scaled to sum to 1.
        label_weights: as in `natural_probabilities`.

    Raises:
        ValueError: shapes differ, the weights are unusable or no clip has a known distribution.
    """
    logits, distributions = (np.asarray(values, dtype=np.float64) for values in (logits, distributions))
    if logits.ndim != 2 or logits.shape != distributions.shape:
        raise ValueError(f"Expected two arrays (clips, labels), got {logits.shape} and {distributions.shape}.")
    weights = _class_weights(label_weights, logits.shape[1])
    classes = weights > 0
    targets = distributions[:, classes]
    rows = targets.sum(axis=1) > 0  # False for NaN
    if not rows.any():
        raise ValueError("No clip of the validation set has annotators' votes: a temperature cannot be fitted.")
    targets = targets[rows] / targets[rows].sum(axis=1, keepdims=True)
    scores = logits[rows][:, classes] - np.log(weights[classes])

    def cross_entropy(log_temperature: float) -> float:
        return float(-(targets * log_softmax(scores / math.exp(log_temperature), axis=1)).sum(axis=1).mean())

    bounds = tuple(math.log(value) for value in TEMPERATURE_RANGE)
    found = minimize_scalar(cross_entropy, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x
    if min(found - bounds[0], bounds[1] - found) < 1e-3:
        logger.warning(
            "The fitted temperature %.3g is at the end of %s: the logits say little.",
            math.exp(found),
            TEMPERATURE_RANGE,
        )
    return math.exp(found)


def _class_weights(label_weights: Sequence[float] | Tensor | np.ndarray | None, number_of_labels: int) -> np.ndarray:
    weights = np.ones(number_of_labels) if label_weights is None else np.asarray(label_weights, dtype=np.float64)
    if (
        weights.shape != (number_of_labels,)
        or not np.isfinite(weights).all()
        or (weights < 0).any()
        or not weights.any()
    ):
        raise ValueError(
            f"label_weights must be {number_of_labels} numbers, none negative, not all 0: {weights.tolist()}."
        )
    return weights
