"""Outputs and targets of a split in; each figure with the spread that other speakers would have given it out.

Speakers are drawn with replacement, all clips of one together (a cluster bootstrap, Davison and Hinkley 1997, section
3.8), because clips of one speaker are not independent. Figures are computed for all draws at once, by speaker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import rel_entr, softmax

from sailer.data.schema import ATTRIBUTES, LabelSet
from sailer.training.metrics import ANSWERED, CALIBRATION_BINS, SMALLEST_PROBABILITY, confidences, decisions

CHUNK = 2_000_000  # draws times clips that are weighed at once
LEVEL = 95


class Resampling:
    """Draws of a split's speakers; the first is the split itself. A clip of an unknown speaker is drawn by itself.

    Args:
        speakers: (clips,) names, "" where unknown.
        repeats: draws beside the first.
        seed: of the draws; the same one gives the same draws for every system, so that differences are paired.

    Raises:
        ValueError: no clips, or fewer than one draw.
    """

    def __init__(self, speakers: Sequence[str], repeats: int = 1000, seed: int = 0) -> None:
        if not len(speakers) or repeats < 1:
            raise ValueError(f"{repeats} draws of {len(speakers)} clips: there must be one of each at least.")
        names = [name or f"\0{index}" for index, name in enumerate(speakers)]
        found, self.cluster = np.unique(names, return_inverse=True)
        self.clusters = len(found)
        draws = np.random.default_rng(seed).multinomial(self.clusters, [1 / self.clusters] * self.clusters, repeats)
        self.counts = np.vstack([np.ones((1, self.clusters)), draws])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(clips, ...) -> (draws, ...): the sum over each draw's clips."""
        flat = values.reshape(len(values), -1).astype(np.float64)
        by_cluster = np.zeros((self.clusters, flat.shape[1]))
        np.add.at(by_cluster, self.cluster, flat)
        return (self.counts @ by_cluster).reshape(len(self.counts), *values.shape[1:])

    def weights(self) -> Iterator[np.ndarray]:
        """(some draws, clips): how often each draw has each clip, some draws at a time."""
        size = max(1, CHUNK // len(self.cluster))
        for start in range(0, len(self.counts), size):
            yield self.counts[start : start + size, self.cluster]

    def interval(self, values: np.ndarray) -> list[float] | None:
        """The middle 95 % of a figure (draws,); None for one speaker, or where no draw defines it."""
        others = values[1:][np.isfinite(values[1:])]
        if self.clusters < 2 or not len(others):
            return None
        tail = (100 - LEVEL) / 2
        return [float(value) for value in np.percentile(others, [tail, 100 - tail])]

    def compare(self, one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
        """A figure of two systems (draws,) each: `difference` one - other, its `interval`, and `p`, twice the share of
        draws in which it has not the sign that the most of them have. The split itself counts as one of these: no
        number of draws shows that a difference is never 0 (Davison and Hinkley 1997, equation 4.11)."""
        differences = one - other
        drawn = differences[1:][np.isfinite(differences[1:])]
        p = None
        if self.clusters > 1 and len(drawn):
            p = float(min(1, 2 * (min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1) / (len(drawn) + 1)))
        return {"difference": float(differences[0]), "interval": self.interval(differences), "p": p}


def replicated_figures(
    resampling: Resampling,
    outputs: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
    label_set: LabelSet,
    natural: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Figures of `emotion_report`, by its names, for each draw (draws,); NaN where a draw does not define one.

    Args:
        resampling: of these clips.
        outputs: logits (clips, labels), and those of other heads by the model's names.
        targets: "consensus" (clips,), and the targets by the collator's names.
        label_set: the primary emotions.
        natural: (clips, labels) probabilities of the natural prior; their figures are under "natural_...".
    """
    logits, labels = outputs["logits"].astype(np.float64).clip(min=-1e9), targets["consensus"].astype(int)
    found = decision_figures(resampling, decisions(logits, label_set), labels, label_set)
    found |= _ranking(resampling, logits, labels, label_set)
    found |= selective_figures(resampling, logits, labels, label_set)
    found |= distribution_figures(resampling, softmax(logits, axis=1), targets["labels"])
    if natural is not None:
        figures = distribution_figures(resampling, natural.astype(np.float64), targets["labels"])
        found |= {f"natural_{name}": value for name, value in figures.items()}
    if "attributes" in outputs:
        found |= _concordance(resampling, outputs["attributes"], targets["attribute_labels"])
    if "secondary_logits" in outputs:
        found |= _secondary(resampling, softmax(outputs["secondary_logits"], axis=1), targets["secondary_labels"])
    if "sex_logits" in outputs:
        right = outputs["sex_logits"].argmax(axis=1) == targets["sex_labels"]
        found["sex_accuracy"] = _mean(resampling, right, targets["sex_labels"] >= 0)
    if "age" in outputs:
        errors = np.abs(outputs["age"] - targets["age_labels"])
        found["age_mae"] = _mean(resampling, errors, np.isfinite(errors))
    return found


def decision_figures(
    resampling: Resampling, decided: np.ndarray, labels: np.ndarray, label_set: LabelSet
) -> dict[str, np.ndarray]:
    """`decision_metrics` for each draw, with precision_<label> and recall_<label>."""
    scored = label_set.indices(label_set.scored)
    place = np.full(len(label_set.labels) + 1, -1)
    place[scored] = range(len(scored))
    true, said = place[np.where(labels < 0, -1, labels)], place[decided]
    cells = np.zeros((len(labels), len(scored), len(scored)))
    kept = np.flatnonzero(true >= 0)
    cells[kept, true[kept], said[kept]] = 1
    confusion = resampling.sums(cells)
    right, support, predicted = confusion.diagonal(axis1=1, axis2=2), confusion.sum(axis=2), confusion.sum(axis=1)
    recall = _ratio(right, support)
    f1 = np.where(support > 0, _ratio(2 * right, support + predicted), np.nan)
    found = {"macro_f1": _nanmean(f1), "accuracy": _ratio(right.sum(1), support.sum(1)), "uar": _nanmean(recall)}
    for index, label in enumerate(label_set.scored):
        if support[0, index] > 0:
            found[f"f1_{label}"], found[f"recall_{label}"] = f1[:, index], recall[:, index]
            found[f"precision_{label}"] = _ratio(right[:, index], predicted[:, index])
    return found


def distribution_figures(
    resampling: Resampling, probabilities: np.ndarray, distributions: np.ndarray
) -> dict[str, np.ndarray]:
    """`distribution_metrics` (kl, js, ece) for each draw."""
    known = np.isfinite(distributions).all(axis=1)
    targets = np.where(known[:, None], distributions, 1 / distributions.shape[1])
    middle = (probabilities + targets) / 2
    js = (rel_entr(targets, middle) + rel_entr(probabilities, middle)).sum(axis=1) / 2
    confidence, agreed, bins = reliability_parts(probabilities, targets)
    gaps = np.zeros((len(known), CALIBRATION_BINS))
    gaps[np.arange(len(known)), bins] = (confidence - agreed) * known
    return {
        "kl": _mean(resampling, divergences(probabilities, targets), known),
        "js": _mean(resampling, js, known),
        "ece": _ratio(np.abs(resampling.sums(gaps)).sum(axis=1), resampling.sums(known)),
    }


def divergences(probabilities: np.ndarray, distributions: np.ndarray) -> np.ndarray:
    """(clips,) KL of the annotators' distributions to probabilities, in nats; NaN where unknown."""
    return rel_entr(distributions, probabilities.clip(min=SMALLEST_PROBABILITY)).sum(axis=1)


def reliability_parts(
    probabilities: np.ndarray, distributions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each clip (clips,): the confidence of the likeliest class, the annotators' share of it, and its bin."""
    chosen = probabilities.argmax(axis=1)
    rows = np.arange(len(chosen))
    confidence = probabilities[rows, chosen]
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    return confidence, distributions[rows, chosen], np.digitize(confidence, edges[1:-1], right=True)


def selective_figures(
    resampling: Resampling, logits: np.ndarray, labels: np.ndarray, label_set: LabelSet
) -> dict[str, np.ndarray]:
    """`selective_metrics` for each draw (draws,): aurc, and risk_<share> in percent of the clips that are answered."""
    confidence, wrong = confidences(logits, labels, label_set)
    nothing = np.full(len(resampling.counts), np.nan)
    shares = {f"risk_{round(100 * share)}": share for share in ANSWERED}
    if not np.isfinite(wrong).any():
        return dict.fromkeys(("aurc", *shares), nothing)
    kept = np.flatnonzero(np.isfinite(wrong))
    order = kept[np.argsort(-confidence[kept], kind="stable")]
    ends = np.append(np.flatnonzero(np.diff(confidence[order])), len(order) - 1)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("aurc", *shares)}
    for weights in resampling.weights():
        weights = weights[:, order]
        answered = np.cumsum(weights, axis=1)[:, ends]
        errors = np.cumsum(weights * wrong[order], axis=1)[:, ends]
        risk, total = _ratio(errors, answered), answered[:, -1]
        gained = np.diff(answered, axis=1, prepend=0)
        parts["aurc"].append(_ratio(np.where(gained > 0, gained * risk, 0).sum(axis=1), total))
        for name, share in shares.items():
            first = (answered >= share * total[:, None] - 1e-9).argmax(axis=1)
            parts[name].append(np.where(total > 0, risk[np.arange(len(risk)), first], np.nan))
    return {name: np.concatenate(values) for name, values in parts.items()}


def average_precision(resampling: Resampling, relevant: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(draws,) average precision as scikit-learn's `average_precision_score`, equal scores counting as one threshold.

    Args:
        relevant: (clips,) whether a clip counts: 1, 0, or NaN for one that is left out.
        scores: (clips,), larger for likelier.
    """
    kept = np.flatnonzero(np.isfinite(relevant))
    order = kept[np.argsort(-scores[kept], kind="stable")]
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    found = []
    for weights in resampling.weights():
        weights = weights[:, order]
        hits, total = np.cumsum(weights * relevant[order], axis=1)[:, ends], np.cumsum(weights, axis=1)[:, ends]
        gained = np.diff(hits, axis=1, prepend=0)
        precision = np.divide(hits, total, out=np.zeros_like(hits), where=total > 0)
        found.append(_ratio((gained * precision).sum(axis=1), hits[:, -1]))
    return np.concatenate(found)


def _ranking(
    resampling: Resampling, logits: np.ndarray, labels: np.ndarray, label_set: LabelSet
) -> dict[str, np.ndarray]:
    scored = label_set.indices(label_set.scored)
    scores, is_scored = softmax(logits[:, scored], axis=1), np.isin(labels, scored)
    found = {}
    for column, index in enumerate(scored):
        if (labels == index).any():
            relevant = np.where(is_scored, labels == index, np.nan)
            found[f"ap_{label_set.labels[index]}"] = average_precision(resampling, relevant, scores[:, column])
    minority = [found[f"ap_{label}"] for label in label_set.minority if f"ap_{label}" in found]
    nothing = np.full(len(resampling.counts), np.nan)
    return {"min_map": _nanmean(np.stack(minority, axis=1)) if minority else nothing, **found}


def _concordance(resampling: Resampling, predictions: np.ndarray, references: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    for index, name in enumerate(ATTRIBUTES):
        known = np.isfinite(references[:, index])
        x = np.where(known, predictions[:, index], 0).astype(np.float64)
        y = np.where(known, references[:, index], 0).astype(np.float64)
        parts = resampling.sums(np.stack([known, x, y, x * x, y * y, x * y], axis=1))
        count = parts[:, 0]
        mean_x, mean_y, xx, yy, xy = (_ratio(parts[:, part], count) for part in range(1, 6))
        spread = xx - mean_x**2 + yy - mean_y**2 + (mean_x - mean_y) ** 2
        found[f"ccc_{name}"] = np.where(count > 1, _ratio(2 * (xy - mean_x * mean_y), spread), np.nan)
    return {**found, "ccc": _nanmean(np.stack(list(found.values()), axis=1))}


def _secondary(resampling: Resampling, probabilities: np.ndarray, distributions: np.ndarray) -> dict[str, np.ndarray]:
    known = np.isfinite(distributions).all(axis=1)
    relevant = np.where(known[:, None], distributions > 0, np.nan)
    there = np.flatnonzero(np.nansum(relevant, axis=0))
    kl = distribution_figures(resampling, probabilities, distributions)["kl"]
    precisions = [average_precision(resampling, relevant[:, index], probabilities[:, index]) for index in there]
    nothing = np.full(len(kl), np.nan)
    return {"secondary_kl": kl, "secondary_map": _nanmean(np.stack(precisions, 1)) if precisions else nothing}


def _mean(resampling: Resampling, values: np.ndarray, known: np.ndarray) -> np.ndarray:
    return _ratio(resampling.sums(np.where(known, values, 0)), resampling.sums(known))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the second axis of what is defined; NaN where nothing is."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0).sum(axis=1), known.sum(axis=1))
