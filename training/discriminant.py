"""A linear discriminant beside the primary head, fitted in closed form on the training clips' mean speech states."""

from __future__ import annotations

import logging

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from sailer.data.sampler import PlannedDataset
from sailer.discriminant_sailer import set_discriminant
from sailer.training.speakers import heard
from sailer.training.trainer import SailerTrainer

logger = logging.getLogger(__name__)

MOST_CLIPS = 20_000  # its covariances do not get better of more
MOST_NUMBERS = 100_000_000  # in float32, of which scikit-learn has three copies at a time
COMPONENTS = 300
FEWEST_CLIPS = 2  # of a label, which a covariance takes


def learn_discriminant(trainer: SailerTrainer, planned: PlannedDataset, seed: int = 0) -> bool:
    """Fit the discriminant that the model's `discriminant_share` asks for, on up to 20,000 clips that training heard.

    Clips count as their consensus label says, at each of the speeds that the plans have; mixes are left out. Labels
    count as the objective weighs them, so that both opinions speak of the same prior.

    Args:
        trainer: after training, of a model without a discriminant.
        planned: the training clips.
        seed: of the choice, where there are more clips, or wider states than have room. Every process makes the
            same one.

    Returns:
        Whether there is one. Where a label has fewer than two clips, or the model no primary head, there is none,
        which is logged: the share is 0 then.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not model.config.discriminant_share:
        return False
    labels = np.asarray(planned.dataset["label"][:])
    renderings = [(row, speed) for row, speed in single_clips(planned) if labels[row] >= 0]
    most = min(MOST_CLIPS, MOST_NUMBERS // next(model.sailer.audio_projection.parameters()).shape[1])
    chosen = np.sort(np.random.default_rng(seed).permutation(len(renderings))[:most])
    renderings = [renderings[place] for place in chosen]
    counts = np.bincount([labels[row] for row, _ in renderings], minlength=len(model.config.labels))
    rare = [label for label, count in zip(model.config.labels, counts, strict=True) if count < FEWEST_CLIPS]
    if rare or "primary" not in model.config.heads:
        why = f"of {rare} there are fewer than {FEWEST_CLIPS} clips" if rare else "the system has no primary head"
        logger.warning("No discriminant is fitted: %s. discriminant_share is 0.", why)
        model.config.discriminant_share = 0.0
        return False
    means, _ = heard(trainer, planned.dataset, renderings, "Fitting the discriminant")
    weights = model.config.label_weights or [1.0] * len(counts)
    set_discriminant(model, *fit_discriminant(means, labels[[row for row, _ in renderings]], counts * weights))
    return True


def single_clips(planned: PlannedDataset) -> list[tuple[int, float]]:
    """Row and speed of the clips that the plans hear alone; where those are new every epoch, each clip as it is."""
    plans = planned.renderings() if planned.settings.augmentation_variants else []
    alone = [(first, speed) for first, second, _, speed in plans if second < 0]
    present = {row for row, _ in alone}
    return alone + [(row, 1.0) for row in range(len(planned.dataset)) if row not in present]


def discriminant_analysis(shape: tuple[int, ...], priors: np.ndarray | None = None) -> Pipeline:
    """Standardised features, their principal components, and LDA with Ledoit and Wolf's shrinkage of covariances.

    Args:
        shape: (clips, width) of what it is to be fitted on.
        priors: (labels,) probabilities; by default as the clips have them.
    """
    clips, width = shape
    return make_pipeline(
        StandardScaler(),
        PCA(min(COMPONENTS, clips - 1, width), random_state=0),
        LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=priors),
    )


def fit_discriminant(
    means: torch.Tensor, labels: np.ndarray, priors: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`LinearDiscriminant`'s mean (width,), weight (labels, width) and bias (labels,).

    Args:
        means: (clips, width).
        labels: (clips,), every label at least twice.
        priors: (labels,), in proportion to the prior probabilities.
    """
    analysis = discriminant_analysis(means.shape, priors / priors.sum()).fit(means.numpy(), labels)
    scale, principal, linear = (part for _, part in analysis.steps)
    coefficients, intercept = linear.coef_, linear.intercept_
    if len(coefficients) == 1:  # two labels: scikit-learn keeps the second one's lead alone
        coefficients = np.concatenate([0 * coefficients, coefficients])
        intercept = np.concatenate([0 * intercept, intercept])
    weight = coefficients @ principal.components_ / scale.scale_
    bias = intercept - coefficients @ (principal.components_ @ principal.mean_)
    mean, weight, bias = (torch.from_numpy(value).float() for value in (scale.mean_, weight, bias))
    return mean, weight, bias
