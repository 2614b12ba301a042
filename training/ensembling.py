"""Systems and a validation split in; a saved ensemble out, its weights or regression fitted (paper, Table 5)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp
from sklearn.linear_model import LogisticRegression

from sailer.data import LabelSet
from sailer.data.atomic import replacing_folder
from sailer.ensemble_sailer import SailerEnsemble
from sailer.hub.card import render_ensemble_card
from sailer.processing_sailer import SailerEnsembleProcessor

logger = logging.getLogger(__name__)

FIT = "fit"
UNSEEN = -30.0  # a class that validation does not have: its probability is about 1e-13, and its logarithm finite
REGULARIZATION = 0.1  # scikit-learn's C: a validation set is small beside members x classes inputs


def build_ensemble(
    models: Sequence[str | Path],
    folder: str | Path,
    combine: str = "probabilities",
    weights: str | Sequence[float] | None = None,
    corpus: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "validation",
    corpus_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    heads: str | Sequence[str] = "union",
    references: bool = False,
) -> Path:
    """Make an ensemble of systems, fit what is to be fitted, and save it with its processor, code and card.

    Args:
        models: folders or Hub ids ("user/name@revision").
        folder: where it goes; nothing may be there yet.
        combine: "probabilities", "logits" or "stacked", see `SailerEnsembleConfig`.
        weights: the members' shares, or "fit": those that make the validation split's consensus labels likeliest,
            each class counting the same.
        corpus, data_dir, split, corpus_options: labelled clips to fit on, for "fit" and "stacked". With them the
            natural prior's temperature is fitted too, and prediction sets where nothing else is.
        batch_size: clips per batch.
        heads, references: see `SailerEnsemble.from_pretrained`.

    Raises:
        ValueError: nothing to fit on, weights for a stacked ensemble, or members that do not fit together.
        CorpusError: see `evaluate_models`.
    """
    from sailer.training.evaluation import calibrate, label_set_of, labelled_rows, predict

    fits = combine == "stacked" or weights == FIT
    if combine == "stacked" and weights is not None:
        raise ValueError("A stacked ensemble learns its weights: leave weights out.")
    if isinstance(weights, str) and weights != FIT:
        raise ValueError(f"weights is {weights!r}; give a number for each member, or {FIT!r}.")
    if fits and corpus is None:
        what = "A stacked ensemble" if combine == "stacked" else "weights fit"
        raise ValueError(f"{what} needs clips that no member trained on: name them with --corpus and --data_dir.")
    if Path(folder).exists():
        raise FileExistsError(f"{folder} is there already: name another folder, or remove it.")
    given = None if weights is None or isinstance(weights, str) else [float(weight) for weight in weights]
    first = "probabilities" if combine == "stacked" else combine
    ensemble = SailerEnsemble.from_pretrained(
        list(models), combine=first, weights=given, heads=heads, references=references
    )
    processor = SailerEnsembleProcessor.from_pretrained(list(models))
    processor.members = ensemble.config.members
    label_set = label_set_of(ensemble.config)
    if corpus is not None:
        if "primary" not in ensemble.config.heads:
            raise ValueError("Only the primary emotions are fitted, and the members have no primary head.")
        rows = labelled_rows(corpus, data_dir, split, label_set, corpus_options)
        prediction = predict(ensemble, processor, rows, label_set, batch_size)
        logits = prediction.predictions["member_logits"]
        labels = prediction.label_ids["consensus"]
        if weights == FIT:
            ensemble.weights.copy_(torch.from_numpy(fit_weights(logits, labels, label_set, combine)))
        if combine == "stacked":
            ensemble = _stacked(ensemble, logits, labels)
        calibrate(ensemble, prediction, sets=not fits)
        if fits:  # scores of clips on which shares were fitted are better than those of others
            logger.warning("For prediction sets name other clips than these with: sailer calibrate %s", folder)
    with replacing_folder(folder) as beside:
        ensemble.save_pretrained(beside)
        processor.save_pretrained(beside)
        shares = ensemble.weights.tolist()
        render_ensemble_card(ensemble.config, shares, models, Path(folder).name, beside / "README.md")
    return Path(folder)


def fit_weights(member_logits: np.ndarray, labels: np.ndarray, label_set: LabelSet, combine: str) -> np.ndarray:
    """Shares of the members, none negative, that sum to 1: those with the greatest mean log probability of the
    consensus label, each scored class counting the same (the problem is convex).

    Args:
        member_logits: (clips, members, labels).
        labels: (clips,); clips of no scored class are left out.
        combine: "probabilities" or "logits".

    Raises:
        ValueError: no clip has a scored class.
    """
    scored = np.isin(labels, label_set.indices(label_set.scored))
    if not scored.any():
        raise ValueError("No clip of the validation set has a consensus among the scored classes: nothing to fit on.")
    scores = log_softmax(member_logits[scored].astype(np.float64), axis=2)
    labels = labels[scored].astype(int)
    counts = np.bincount(labels, minlength=scores.shape[2])
    importance = 1 / counts[labels] / len(np.unique(labels))
    rows = np.arange(len(labels))
    own = scores[rows, :, labels]

    def loss(shares: np.ndarray) -> tuple[float, np.ndarray]:
        if combine == "logits":
            mixed = np.einsum("m,bml->bl", shares, scores)
            total = logsumexp(mixed, axis=1)
            expected = np.einsum("bl,bml->bm", np.exp(mixed - total[:, None]), scores)
            value, slope = own @ shares - total, own - expected
        else:
            chosen = np.exp(own)
            sums = (chosen @ shares).clip(min=1e-300)
            value, slope = np.log(sums), chosen / sums[:, None]
        return -float(importance @ value), -(importance @ slope)

    members = scores.shape[1]
    found = minimize(
        loss,
        np.full(members, 1 / members),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * members,
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-10, "maxiter": 500},
    )
    shares = found.x.clip(min=0)
    return shares / shares.sum()


def fit_stack(
    member_logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A logistic regression of the consensus label on the members' log probabilities, every class counting the same.

    Args:
        member_logits: (clips, members, labels).
        labels: (clips,) consensus; negative ones are left out.
        class_names: the labels.

    Returns:
        `stack_weight` (labels, members * labels) and `stack_bias` (labels,), and the class weights w that the
        regression's softmax carries, as `SailerConfig.label_weights`. A class without a clip has w 0 and stays
        improbable.

    Raises:
        ValueError: fewer than two classes have clips.
    """
    known = labels >= 0
    classes, counts = np.unique(labels[known].astype(int), return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"The validation set has clips of {len(classes)} classes: stacking needs two or more.")
    lost = [name for index, name in enumerate(class_names) if index not in classes]
    if lost:
        logger.warning("The validation set has no clip of %s: the stacked ensemble never predicts them.", lost)
    inputs = log_softmax(member_logits[known].astype(np.float64), axis=2).reshape(known.sum(), -1)
    regression = LogisticRegression(C=REGULARIZATION, class_weight="balanced", max_iter=2000)
    regression.fit(inputs, labels[known].astype(int))
    coefficients, intercepts = regression.coef_, regression.intercept_
    if len(classes) == 2:  # scikit-learn keeps the second class's log odds alone
        coefficients, intercepts = np.vstack([-coefficients, coefficients]) / 2, np.append(-intercepts, intercepts) / 2
    weight = np.zeros((len(class_names), inputs.shape[1]))
    bias = np.full(len(class_names), UNSEEN)
    weight[classes], bias[classes] = coefficients, intercepts
    carried = np.zeros(len(class_names))
    carried[classes] = counts.sum() / (len(classes) * counts)
    tensors = {"stack_weight": torch.from_numpy(weight).float(), "stack_bias": torch.from_numpy(bias).float()}
    return tensors, carried.tolist()


def _stacked(ensemble: SailerEnsemble, logits: np.ndarray, labels: np.ndarray) -> SailerEnsemble:
    config = ensemble.config
    tensors, config.label_weights = fit_stack(logits, labels, config.labels)
    config.combine = "stacked"
    return SailerEnsemble(config, list(ensemble.members), tensors).eval()
