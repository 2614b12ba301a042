"""Model outputs and the collator's targets go in, named losses and their weighted sum come out (paper, section 2).

All means are over the rows of the batch. An unknown target (NaN; -100 for sex) adds nothing to value or gradient, but
its row counts in the denominator: so 1 x 8 and 2 x 4 gradient accumulation give the same step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

logger = logging.getLogger(__name__)

Array = TypeVar("Array", Tensor, np.ndarray)
Objective = Literal["kl", "soft_ce", "ce", "focal", "distil"]
TargetWeighting = Literal["product", "normalized", "none"]
AttributeLoss = Literal["mse", "ccc"]

AGE_UNIT = 100.0  # years; the age head predicts in this unit, so that its loss has the scale of the attributes'

# The collator's target for the component "teacher", of which training batches alone have one.
TEACHER = "teacher_labels"
# component -> (model output, collator target)
COMPONENTS = {
    "primary": ("logits", "labels"),
    "secondary": ("secondary_logits", "secondary_labels"),
    "attributes": ("attributes", "attribute_labels"),
    "sex": ("sex_logits", "sex_labels"),
    "age": ("age", "age_labels"),
}


@dataclass(frozen=True)
class ObjectiveSettings:
    """What a system is trained on.

    Args:
        objective: loss of the primary emotion: "kl" (paper), "soft_ce" (same gradient), "ce" (`soft_ce` on one-hot
            consensus targets, which the collator makes), "focal", or "distil": "kl", and what a teacher says.
        target_weighting: what becomes of the target d in training: "product" (d * w as the paper writes it),
            "normalized" (d * w summing to 1 in each clip) or "none".
        focal_gamma: exponent of the focal factor (1 - p) ** gamma.
        logit_adjustment_train: tau of the logit adjustment in training, 0 for none. It corrects for the class prior as
            w does: use one of the two, that is tau with `target_weighting="none"`.
        teacher: folder or Hub id of the system or ensemble whose probabilities "distil" learns from; it judges each
            training clip once, as it is, and a mix's target is the mean of its clips'.
        distil_temperature: T; teacher and student are compared at softmax(logits / T).
        distil_weight: the teacher's share of the primary loss, above 0 to 1; clips without votes have the teacher's
            part alone.
        secondary_weight: weight of the secondary emotions' loss; the primary loss has weight 1.
        attribute_weight: weight of the attributes' loss.
        attribute_loss: "mse" or "ccc".
        sex_weight: weight of the speaker sex loss.
        age_weight: weight of the speaker age loss.

    Raises:
        ValueError: an unknown choice, a number out of its range, a teacher that is missing or not asked for; the
            message names the option.
    """

    objective: Objective = "kl"
    target_weighting: TargetWeighting = "product"
    focal_gamma: float = 2.0
    logit_adjustment_train: float = 0.0
    teacher: str | None = None
    distil_temperature: float = 2.0
    distil_weight: float = 0.5
    secondary_weight: float = 1.0
    attribute_weight: float = 1.0
    attribute_loss: AttributeLoss = "mse"
    sex_weight: float = 1.0
    age_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if name == "teacher":
                continue
            value, choices = getattr(self, name), get_args(kind)
            if choices and value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
            if not choices and not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ValueError(f"{name} is {value!r}; it must be a finite number, 0 or more.")
        if (self.objective == "distil") != (self.teacher is not None):
            way = (
                "set objective to distil"
                if self.teacher
                else "name a system or an ensemble, or choose another objective"
            )
            raise ValueError(f"objective is {self.objective!r} and teacher is {self.teacher!r}: {way}.")
        if not self.distil_temperature > 0:
            raise ValueError(f"distil_temperature is {self.distil_temperature!r}; it must be more than 0.")
        if not 0 < self.distil_weight <= 1:
            raise ValueError(f"distil_weight is {self.distil_weight!r}; it is a share, above 0 to 1.")

    @property
    def teacher_prior(self) -> str:
        """Which of a teacher's probabilities are in the student's terms: "natural" estimates votes, and is for one
        that learns them as they are; "balanced" is for one whose targets are weighted, or logits adjusted."""
        return "balanced" if self.target_weighting != "none" or self.logit_adjustment_train else "natural"


class SailerObjective(nn.Module):
    """All losses of a system, each under its name, and their weighted sum.

    In evaluation mode (`objective.eval()`) targets are not re-weighted (as in the paper) and logits not adjusted.

    Args:
        settings: which losses, with which weights.
        label_weights: (labels,) the class weights w of `label_weights`; needed unless `target_weighting="none"`.
        label_prior: (labels,) the class prior q of `label_prior`; needed for logit adjustment.

    Raises:
        ValueError: weights or prior that the settings need are missing.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        label_weights: Sequence[float] | Tensor | None = None,
        label_prior: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        is_taught = settings.objective == "distil"
        self.components = nn.ModuleDict(
            {
                "primary": DistributionLoss(
                    "kl" if is_taught else settings.objective,
                    settings.target_weighting,
                    label_weights,
                    focal_gamma=settings.focal_gamma,
                    logit_adjustment=settings.logit_adjustment_train,
                    label_prior=label_prior,
                ),
                "secondary": DistributionLoss(),
                "attributes": ConcordanceLoss() if settings.attribute_loss == "ccc" else SquaredErrorLoss(),
                "sex": ClassLoss(),
                "age": SquaredErrorLoss(AGE_UNIT),
            }
        )
        if is_taught:
            self.components["teacher"] = TeacherLoss(settings.distil_temperature)
        self.weights = {
            "primary": 1.0,
            "secondary": settings.secondary_weight,
            "attributes": settings.attribute_weight,
            "sex": settings.sex_weight,
            "age": settings.age_weight,
        }

    def forward(self, outputs: Mapping[str, Any], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            outputs: the model's output: logits (batch, labels) and, per head, secondary_logits (batch, 17), attributes
                (batch, 3), sex_logits (batch, 2), age (batch,) in years.
            targets: labels (batch, labels), secondary_labels (batch, 17), attribute_labels (batch, 3), sex_labels
                (batch,) with -100 for unknown, age_labels (batch,); NaN for unknown. In training for "distil" also
                teacher_labels (batch, labels).

        Returns:
            0-d tensors: the unweighted loss of each head that the outputs have, and their weighted sum under "loss".

        Raises:
            ValueError: the outputs have no head that has a loss, or a head whose target is missing.
        """
        losses = {}
        for name, (output, target) in COMPONENTS.items():
            if outputs.get(output) is None:
                continue
            if targets.get(target) is None:
                raise ValueError(
                    f"The model gives {output!r} but the batch has no {target!r}: NaN stands for unknown."
                )
            losses[name] = self.components[name](outputs[output], targets[target])
        if not losses:
            raise ValueError(f"None of {[output for output, _ in COMPONENTS.values()]} is in the model's output.")
        weights = dict(self.weights)
        if "teacher" in self.components and self.training:
            if targets.get(TEACHER) is None:
                raise ValueError(f"The objective is 'distil' but the batch has no {TEACHER!r}: judge the clips first.")
            losses["teacher"] = self.components["teacher"](outputs["logits"], targets[TEACHER])
            share = self.settings.distil_weight
            weights |= {"primary": 1 - share, "teacher": share}
        return {**losses, "loss": sum(weights[name] * loss for name, loss in losses.items())}

    def implied_label_weights(self, number_of_labels: int) -> Tensor:
        """(labels,) the v for which softmax(logits) approaches d * v / sum(d * v): what the natural prior divides out.

        It is w of the target weighting times prior ** -tau of the logit adjustment; all ones if neither is used.
        """
        loss = self.components["primary"]
        assert isinstance(loss, DistributionLoss)
        weights = torch.ones(number_of_labels) if loss.label_weights is None else loss.label_weights
        return weights if loss.adjustment is None else weights * torch.exp(-loss.adjustment)


class DistributionLoss(nn.Module):
    """Loss of logits against a distribution per clip: KL divergence, soft cross-entropy or focal.

    With p = softmax(logits), d the target and t the weighted target (t = d * w for "product", d * w / sum(d * w) for
    "normalized", d for "none" and in evaluation mode), the loss of a clip is

    - kl: sum_i t_i (log t_i - log p_i). A product target is not renormalised, so that a clip weighs sum(d * w) and the
      value may be negative where that is below 1;
    - soft_ce, ce: -sum_i t_i log p_i, which differs from kl by a constant and has its gradient;
    - focal: -sum_i t_i (1 - p_i) ** gamma log p_i (Lin et al. 2017, https://arxiv.org/abs/1708.02002, summed over a
      soft target). Its class weights alpha are w, through the target weighting "product"; "none" gives alpha = 1.

    In training, logit adjustment (Menon et al. 2021, https://arxiv.org/abs/2007.07314) adds tau * log(prior) to the
    logits first.

    A row with NaN adds nothing, nor does a "normalized" row whose every class has weight 0.

    Raises:
        ValueError: weights or prior are needed but missing, negative, not finite or all 0.
    """

    label_weights: Tensor | None
    adjustment: Tensor | None

    def __init__(
        self,
        objective: Objective = "kl",
        target_weighting: TargetWeighting = "none",
        label_weights: Sequence[float] | Tensor | None = None,
        focal_gamma: float = 2.0,
        logit_adjustment: float = 0.0,
        label_prior: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.target_weighting, self.focal_gamma = objective, target_weighting, focal_gamma
        weights = adjustment = None
        if target_weighting != "none":
            if label_weights is None:
                raise ValueError(
                    f"target_weighting={target_weighting!r} needs label_weights (see losses.label_weights)."
                )
            weights = _class_vector(label_weights, "label_weights").float()
        if logit_adjustment:
            if label_prior is None:
                raise ValueError("logit_adjustment_train needs label_prior (see losses.label_prior).")
            adjustment = (logit_adjustment * log_prior(label_prior)).float()
        self.register_buffer("label_weights", weights, persistent=False)
        self.register_buffer("adjustment", adjustment, persistent=False)

    def forward(self, logits: Tensor, distributions: Tensor) -> Tensor:
        """Mean over the batch; logits and distributions (batch, labels)."""
        logits, distributions = _same_kind(logits, distributions)
        known = ~distributions.isnan().any(dim=-1, keepdim=True)
        target = torch.where(known, distributions, 0.0)
        if self.training and self.label_weights is not None:
            target = target * self.label_weights.to(target)
            if self.target_weighting == "normalized":
                total = target.sum(dim=-1, keepdim=True)
                target = target / torch.where(total > 0, total, 1.0)
        if self.training and self.adjustment is not None:
            logits = logits + self.adjustment.to(logits)
        log_probabilities = logits.log_softmax(dim=-1)
        losses = -target * log_probabilities
        if self.objective == "kl":
            losses = torch.xlogy(target, target) + losses
        elif self.objective == "focal":
            # The floor keeps the gradient of x ** gamma finite where p rounds to 1.
            others = -torch.expm1(log_probabilities)
            losses = others.clamp(min=torch.finfo(others.dtype).eps) ** self.focal_gamma * losses
        return losses.sum(dim=-1).mean()


class TeacherLoss(nn.Module):
    """T^2 times the KL divergence from a teacher's probabilities to the student's, both softened by T.

    Hinton et al. 2015 (https://arxiv.org/abs/1503.02531), section 2: softmax(z / T) of either; T^2 keeps the size of
    the gradient. Of probabilities q that is q^(1 / T), normalised, so that no logits of the teacher are needed.
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Mean over the batch; logits and probabilities (batch, labels)."""
        logits, probabilities = _same_kind(logits, probabilities)
        floor = torch.finfo(probabilities.dtype).tiny
        target = (probabilities.clamp(min=floor).log() / self.temperature).softmax(dim=-1)
        said = (logits / self.temperature).log_softmax(dim=-1)
        return self.temperature**2 * (torch.xlogy(target, target) - target * said).sum(dim=-1).mean()


class SquaredErrorLoss(nn.Module):
    """Mean of ((prediction - target) / unit) ** 2 over all values of the batch; an unknown (NaN) target adds 0."""

    def __init__(self, unit: float = 1.0) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Predictions and targets of one shape."""
        predictions, targets = _same_kind(predictions, targets)
        errors = torch.where(targets.isnan(), 0.0, predictions - targets.nan_to_num())
        return (errors / self.unit).square().mean()


class ConcordanceLoss(nn.Module):
    """Mean over the attributes of 1 - CCC, Lin's (1989) concordance correlation over the batch's known values.

    CCC = 2 cov(x, y) / (var(x) + var(y) + (mean(x) - mean(y)) ** 2), with population moments. An attribute with fewer
    than two known values in the batch, or with all of them equal, has no concordance and adds 0 to value and gradient.
    Unlike the other losses it does not split over gradient accumulation: it judges each device's batch by itself.
    """

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Predictions and targets (batch, attributes); NaN targets are unknown."""
        predictions, targets = _same_kind(predictions, targets)
        known = ~targets.isnan()
        targets = targets.nan_to_num()
        count = known.sum(dim=0).clamp(min=1)

        def mean(values: Tensor) -> Tensor:
            return torch.where(known, values, 0.0).sum(dim=0) / count

        lowest = torch.where(known, targets, math.inf).amin(dim=0)
        highest = torch.where(known, targets, -math.inf).amax(dim=0)
        defined = highest > lowest
        prediction_mean, target_mean = mean(predictions), mean(targets)
        covariance = mean((predictions - prediction_mean) * (targets - target_mean))
        spread = mean((predictions - prediction_mean).square()) + mean((targets - target_mean).square())
        spread = spread + (prediction_mean - target_mean).square()
        concordance = 2 * covariance / torch.where(defined, spread, 1.0)
        return torch.where(defined, 1 - concordance, 0.0).mean()


class ClassLoss(nn.Module):
    """Cross-entropy over the batch's rows, where unknown (-100) targets add 0."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (batch, classes), targets (batch,) class indices."""
        logits = _full_precision(logits)
        return functional.cross_entropy(logits, targets.to(logits.device).long(), reduction="sum") / len(logits)


def label_prior(distributions: Tensor | np.ndarray) -> Tensor:
    """The class prior q: the mean of the training clips' distributions (clips, labels), rows with NaN left out.

    Returns:
        (labels,) float64, summing to 1.

    Raises:
        ValueError: no row is known, or a row is not a distribution (counts, for one); the message names the row.
    """
    distributions = torch.as_tensor(distributions, dtype=torch.float64)
    if distributions.ndim != 2:
        raise ValueError(f"Expected distributions of shape (clips, labels), got {tuple(distributions.shape)}.")
    known = ~distributions.isnan().any(dim=-1)
    if not known.any():
        raise ValueError("No training clip has votes or a label: there is nothing to take the class prior from.")
    wrong = known & ((distributions < 0).any(dim=-1) | ((distributions.sum(dim=-1) - 1).abs() > 1e-3))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"Row {row} is not a distribution: {distributions[row].tolist()}; divide votes by their sum.")
    prior = distributions[known].mean(dim=0)
    return prior / prior.sum()


def label_weights(prior: Sequence[float] | Tensor, labels: Sequence[str] | None = None) -> Tensor:
    """The class weights w: proportional to 1 / q, scaled so that the mean clip weight, sum_i q_i w_i, is 1.

    So w_i = 1 / (K q_i) for the K classes that occur. A class that no training clip has gets weight 0, and a warning
    names it: no target can ask for it, and the natural prior gives it probability 0. (The paper's w sums to 1 instead,
    a constant factor.)

    Args:
        prior: (labels,) the q of `label_prior`.
        labels: class names for the warning.

    Returns:
        (labels,) float64.

    Raises:
        ValueError: the prior is negative, not finite or all zero.
    """
    prior = _class_vector(prior, "label prior")
    occurs = prior > 0
    if not occurs.all():
        absent = (~occurs).nonzero().flatten().tolist()
        names = [labels[index] for index in absent] if labels is not None else absent
        logger.warning("No training clip has a vote for %s: label weight 0.", names)
    return torch.where(occurs, 1 / (occurs.sum() * torch.where(occurs, prior, 1.0)), 0.0)


def log_prior(prior: Sequence[float] | Tensor) -> Tensor:
    """(labels,) float64 log of the class prior, where a class of prior 0 counts as the rarest class that occurs.

    A much lower floor would leave that class's logit untrained under logit adjustment in training, and lift the class
    over all others under logit adjustment at inference.

    Raises:
        ValueError: the prior is negative, not finite or all zero.
    """
    prior = _class_vector(prior, "label prior")
    return torch.where(prior > 0, prior, prior[prior > 0].min()).log()


def adjust_logits(logits: Array, prior: Sequence[float] | Tensor, tau: float = 1.0) -> Array:
    """Logit adjustment at inference (Menon et al. 2021): logits - tau * log(prior), for a model trained without w.

    Args:
        logits: (..., labels), a tensor or an array; the result is of the same kind.
        prior: (labels,) the class prior of the training data, floored as in `log_prior`.
        tau: strength; 1 is optimal for the balanced error.
    """
    adjustment = tau * log_prior(prior)
    if isinstance(logits, Tensor):
        return logits - adjustment.to(logits)
    return logits - adjustment.numpy().astype(logits.dtype)


def _class_vector(values: Sequence[float] | Tensor, name: str) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1 or not values.isfinite().all() or (values < 0).any() or not values.any():
        raise ValueError(
            f"{name} must be one finite number per class, none negative and not all 0: {values.tolist()}."
        )
    return values


def _full_precision(values: Tensor) -> Tensor:
    # Half precision has too few digits and too little range for logarithms and squares; float64 stays for gradcheck.
    return values if values.dtype == torch.float64 else values.float()


def _same_kind(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if predictions.shape != targets.shape:
        raise ValueError(f"Predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} differ in shape.")
    predictions = _full_precision(predictions)
    return predictions, targets.to(predictions)
