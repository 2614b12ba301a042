"""Logits, annotators' distributions and consensus labels go in, a flat report comes out (paper, section 3.2).

Each figure is also an `evaluate.Metric`, instantiated directly: `MacroF1().compute(predictions=..., references=...)`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, List, Value
from scipy.special import rel_entr, softmax
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, recall_score

from sailer.data.schema import ATTRIBUTES, LabelSet

logger = logging.getLogger(__name__)

CALIBRATION_BINS = 15
SMALLEST_PROBABILITY = 1e-12  # a class given probability 0 that annotators chose: the divergence stays finite
LOWER_IS_BETTER = ("kl", "js", "ece", "aurc", "secondary_kl", "age_mae")
ANSWERED = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of the clips at which the risk is looked at

_VECTORS = List(Value("float64"))
_CLASS_INPUTS = {"predictions": Value("int64"), "references": Value("int64")}
_SCORE_INPUTS = {"predictions": _VECTORS, "references": Value("int64")}
_VECTOR_INPUTS = {"predictions": _VECTORS, "references": _VECTORS}


def emotion_report(
    logits: Any,
    distributions: Any,
    labels: Any,
    label_set: LabelSet | None = None,
    *,
    secondary_logits: Any = None,
    secondary_labels: Any = None,
    attributes: Any = None,
    attribute_labels: Any = None,
    sex_logits: Any = None,
    sex_labels: Any = None,
    age: Any = None,
    age_labels: Any = None,
) -> dict[str, float]:
    """Every figure of one evaluation. All inputs are arrays (or what numpy takes for one), one row a clip.

    Args:
        logits: (clips, labels); log probabilities (of an ensemble, for one) will do.
        distributions: (clips, labels) annotators' distributions, NaN rows where unknown.
        labels: (clips,) consensus class; a clip whose consensus is negative or not a scored class is not scored.
        label_set: the primary emotions.
        secondary_logits, secondary_labels: (clips, 17), NaN rows where unknown.
        attributes, attribute_labels: (clips, 3) in [0, 1], NaN where unknown.
        sex_logits, sex_labels: (clips, 2), (clips,) with -100 where unknown.
        age, age_labels: (clips,) years, NaN where unknown.

    Returns:
        clips, scored_clips;
        macro_f1, accuracy, uar and f1_<label>: of the argmax over the scored classes (`decision_metrics`);
        min_map and ap_<label>: of the softmax over the scored classes (`ranking_metrics`);
        macro_f1_min_map: the mean of macro_f1 and min_map;
        aurc: of the softmax over the scored classes (`selective_metrics`);
        kl, js, ece: of the softmax over all classes (`distribution_metrics`);
        and, for each head given, secondary_kl and secondary_map; ccc_arousal, ccc_valence, ccc_dominance and ccc;
        sex_accuracy; age_mae.
        A value that the clips do not define is NaN; per-class keys are there for the classes that occur.

    Raises:
        ValueError: no clips, shapes that do not fit together, a label outside the label set, a NaN prediction.
    """
    label_set = label_set or LabelSet()
    labels = _labels(labels, label_set)
    # A log probability of -inf may stay, but a clip whose every scored class has it needs a finite softmax.
    logits = _rows("logits", logits, (len(labels), len(label_set.labels))).clip(min=-1e9)
    distributions = _rows("distributions", distributions, logits.shape, unknown=True)
    scored = label_set.indices(label_set.scored)
    scores = np.zeros_like(logits)
    scores[:, scored] = softmax(logits[:, scored], axis=1)
    report = {"clips": float(len(labels)), "scored_clips": float(np.isin(labels, scored).sum())}
    if not report["scored_clips"]:
        logger.warning(
            "None of the %d clips has a consensus among the scored classes: they have no macro-F1.", len(labels)
        )
    report |= decision_metrics(decisions(logits, label_set), labels, label_set)
    report |= ranking_metrics(scores, labels, label_set)
    report["macro_f1_min_map"] = (report["macro_f1"] + report["min_map"]) / 2
    report |= selective_metrics(logits, labels, label_set)
    report |= distribution_metrics(softmax(logits, axis=1), distributions)
    if secondary_logits is not None:
        report |= _secondary_metrics(secondary_logits, secondary_labels)
    if attributes is not None:
        report |= concordance_metrics(attributes, attribute_labels)
    if sex_logits is not None:
        sex_labels = _rows("sex_labels", sex_labels, labels.shape)
        sexes = np.asarray(sex_logits).argmax(axis=1)
        report["sex_accuracy"] = _mean((_rows("sex_logits", sexes, labels.shape) == sex_labels)[sex_labels >= 0])
    if age is not None:
        age_labels = _rows("age_labels", age_labels, labels.shape, unknown=True)
        errors = np.abs(_rows("age", age, labels.shape) - age_labels)
        report["age_mae"] = _mean(errors[~np.isnan(errors)])
    return report


def greater_is_better(name: str) -> bool:
    """Whether a larger value of this report key is the better one, for model selection."""
    return name not in LOWER_IS_BETTER


def decisions(logits: Any, label_set: LabelSet) -> np.ndarray:
    """(clips,) class index: argmax over the scored classes of logits or probabilities (clips, labels)."""
    scored = np.array(label_set.indices(label_set.scored))
    return scored[np.asarray(logits)[:, scored].argmax(axis=1)]


def decision_metrics(predictions: Any, references: Any, label_set: LabelSet) -> dict[str, float]:
    """Macro-F1, accuracy, unweighted average recall and class F1, over the scored classes that the references have.

    Args:
        predictions: (clips,) class indices.
        references: (clips,) consensus; clips whose consensus is not a scored class are left out.

    Raises:
        ValueError: no clips, unequal lengths or a reference outside the label set.
    """
    references = _labels(references, label_set)
    predictions = _rows("predictions", predictions, references.shape)
    scored = np.isin(references, label_set.indices(label_set.scored))
    predictions, references = predictions[scored].astype(int), references[scored]
    if not len(references):
        return dict.fromkeys(("macro_f1", "accuracy", "uar"), np.nan)
    classes = np.unique(references)
    f1 = f1_score(references, predictions, labels=classes, average=None, zero_division=0)
    return {
        "macro_f1": float(f1.mean()),
        "accuracy": float(accuracy_score(references, predictions)),
        "uar": float(recall_score(references, predictions, labels=classes, average="macro", zero_division=0)),
        **{f"f1_{label_set.labels[index]}": float(value) for index, value in zip(classes, f1, strict=True)},
    }


def ranking_metrics(scores: Any, references: Any, label_set: LabelSet) -> dict[str, float]:
    """Average precision of each scored class that occurs, and Min. mAP: its mean over the minority classes that occur.

    Args:
        scores: (clips, labels), larger for likelier.
        references: (clips,) consensus; clips whose consensus is not a scored class are left out.

    Raises:
        ValueError: no clips, shapes that do not fit or a reference outside the label set.
    """
    references = _labels(references, label_set)
    scores = _rows("scores", scores, (len(references), len(label_set.labels)))
    scored = np.isin(references, label_set.indices(label_set.scored))
    scores, references = scores[scored], references[scored]
    precisions = {
        label_set.labels[index]: float(average_precision_score(references == index, scores[:, index]))
        for index in np.unique(references)
    }
    minority = [value for label, value in precisions.items() if label in label_set.minority]
    return {"min_map": _mean(minority), **{f"ap_{label}": value for label, value in precisions.items()}}


def confidences(logits: Any, labels: Any, label_set: LabelSet) -> tuple[np.ndarray, np.ndarray]:
    """(clips,) the probability of the decision, by the softmax over the scored classes; and whether it is wrong, 1 or
    0, NaN of a clip whose consensus is not a scored class."""
    scored = label_set.indices(label_set.scored)
    confidence = softmax(np.asarray(logits, dtype=np.float64)[:, scored], axis=1).max(axis=1)
    wrong = (decisions(logits, label_set) != labels).astype(float)
    return confidence, np.where(np.isin(labels, scored), wrong, np.nan)


def risk_coverage(confidence: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who answers only where it is surest: the share of clips answered, and the share of those that is wrong.

    Args:
        confidence: (clips,), larger for surer; clips of equal confidence are answered together.
        wrong: (clips,) 1 or 0; NaN leaves a clip out.

    Returns:
        Two arrays (distinct confidences,), from the surest clips alone to all of them.
    """
    kept = np.flatnonzero(np.isfinite(wrong))
    order = kept[np.argsort(-confidence[kept], kind="stable")]
    ends = np.append(np.flatnonzero(np.diff(confidence[order])), len(order) - 1)
    return (ends + 1) / len(order), np.cumsum(wrong[order])[ends] / (ends + 1)


def selective_metrics(logits: Any, labels: Any, label_set: LabelSet) -> dict[str, float]:
    """aurc: the area under the risk-coverage curve, that is the mean over the clips of the error among those that are
    at least as sure (Geifman, Uziel and El-Yaniv 2019, https://arxiv.org/abs/1805.08206). An order by chance has the
    error of all clips, the best one of an error r has r + (1 - r) log(1 - r). NaN without scored clips.

    Args:
        logits: (clips, labels).
        labels: (clips,) consensus; clips whose consensus is not a scored class are left out.
    """
    confidence, wrong = confidences(logits, labels, label_set)
    if not np.isfinite(wrong).any():
        return {"aurc": np.nan}
    coverage, risk = risk_coverage(confidence, wrong)
    return {"aurc": float((np.diff(coverage, prepend=0) * risk).sum())}


def distribution_metrics(probabilities: Any, distributions: Any) -> dict[str, float]:
    """How near probabilities are to the annotators' distributions, over the clips with a known one.

    - kl: mean of KL(distribution || probabilities) in nats, where a probability below 1e-12 counts as 1e-12;
    - js: mean Jensen-Shannon divergence in nats (at most log 2);
    - ece: expected calibration error (Guo et al. 2017, https://arxiv.org/abs/1706.04599) in a soft form: confidence is
      the probability of the most probable class, and the accuracy beside it the share of annotators who chose that
      class, that is the chance that a random annotator agrees; 15 equal bins of confidence, weighted by their clips.
      One-hot distributions give the usual form.

    Args:
        probabilities: (clips, labels).
        distributions: (clips, labels), NaN rows where unknown. If all are, the values are NaN.

    Raises:
        ValueError: no clips, shapes that differ or a known row that is not a distribution (counts, for one).
    """
    distributions = _rows("distributions", distributions, np.shape(probabilities), unknown=True)
    probabilities = _rows("probabilities", probabilities, distributions.shape)
    known = ~np.isnan(distributions).any(axis=1)
    probabilities, distributions = probabilities[known], distributions[known]
    for name, values in (("probabilities", probabilities), ("distributions", distributions)):
        wrong = (values < 0).any(axis=1) | (np.abs(values.sum(axis=1) - 1) > 1e-3)
        if wrong.any():
            raise ValueError(f"A row of the {name} does not sum to 1: {values[wrong][0].tolist()}.")
    middle = (probabilities + distributions) / 2
    js = (rel_entr(distributions, middle) + rel_entr(probabilities, middle)).sum(axis=1) / 2
    return {
        "kl": _mean(rel_entr(distributions, probabilities.clip(min=SMALLEST_PROBABILITY)).sum(axis=1)),
        "js": _mean(js),
        "ece": _calibration_error(probabilities, distributions),
    }


def concordance_metrics(predictions: Any, references: Any, names: Sequence[str] = ATTRIBUTES) -> dict[str, float]:
    """Lin's (1989) concordance correlation of each attribute, and the mean over those defined as "ccc".

    An attribute with fewer than two known references, or whose predictions and references are one constant, is NaN.

    Args:
        predictions: (clips, attributes).
        references: (clips, attributes), NaN where unknown.

    Raises:
        ValueError: no clips or shapes that differ.
    """
    shape = (len(predictions), len(names))
    predictions = _rows("predictions", predictions, shape)
    references = _rows("references", references, shape, unknown=True)
    values = {
        f"ccc_{name}": _concordance(predictions[:, index], references[:, index]) for index, name in enumerate(names)
    }
    return {**values, "ccc": _mean([value for value in values.values() if not np.isnan(value)])}


def majority_class_f1(train_labels: Any, test_labels: Any, label_set: LabelSet) -> float:
    """Macro-F1 of always predicting the most frequent scored class of the training labels (the first one of equals).

    Raises:
        ValueError: no training clip has a scored class.
    """
    scored = np.array(label_set.indices(label_set.scored))
    counts = (np.asarray(train_labels)[:, None] == scored).sum(axis=0)
    if not counts.any():
        raise ValueError("No training clip has a consensus among the scored classes: there is no most frequent one.")
    predictions = np.full(len(np.asarray(test_labels)), scored[counts.argmax()])
    return decision_metrics(predictions, test_labels, label_set)["macro_f1"]


def shuffled_label_f1(predictions: Any, labels: Any, label_set: LabelSet, seed: int = 0, repeats: int = 100) -> float:
    """Mean macro-F1 of predictions (clips,) against the scored clips' labels in random orders: what chance gives."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    scored = np.isin(labels, label_set.indices(label_set.scored))
    random = np.random.default_rng(seed)
    orders = (random.permutation(labels[scored]) for _ in range(repeats))
    return _mean([decision_metrics(predictions[scored], order, label_set)["macro_f1"] for order in orders])


class EmotionMetric(evaluate.Metric):
    """Base of the metrics below: those figures that `measure` finds whose key is `figure` or begins with it.

    Args:
        label_set: the primary emotions; the default ones if none are given.
        options: as `evaluate.Metric` takes them.
    """

    figure: str
    inputs: ClassVar[dict[str, Any]]
    measure: ClassVar[Callable[..., dict[str, float]]]

    def __init__(self, label_set: LabelSet | None = None, **options: Any) -> None:
        self.label_set = label_set or LabelSet()
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=f"Inputs: {self.inputs}.",
            features=Features(self.inputs),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        options = {"label_set": self.label_set} if "label_set" in inspect.signature(self.measure).parameters else {}
        figures = self.measure(predictions, references, **options)
        return {key: value for key, value in figures.items() if f"{key}_".startswith(f"{self.figure}_")}


class MacroF1(EmotionMetric):
    """Macro-F1 of class indices over the scored classes that occur (`decision_metrics`)."""

    figure = "macro_f1"
    inputs = _CLASS_INPUTS
    measure = staticmethod(decision_metrics)


class Accuracy(MacroF1):
    """Accuracy of class indices over the clips of a scored class (`decision_metrics`)."""

    figure = "accuracy"


class UnweightedAverageRecall(MacroF1):
    """Mean recall of class indices over the scored classes that occur (`decision_metrics`)."""

    figure = "uar"


class ClassF1(MacroF1):
    """F1 of each scored class that occurs (`decision_metrics`)."""

    figure = "f1"


class MinorityMeanAveragePrecision(EmotionMetric):
    """Min. mAP of scores (labels,) per clip against class indices (`ranking_metrics`)."""

    figure = "min_map"
    inputs = _SCORE_INPUTS
    measure = staticmethod(ranking_metrics)


class ClassAveragePrecision(MinorityMeanAveragePrecision):
    """Average precision of each scored class that occurs (`ranking_metrics`)."""

    figure = "ap"


class KullbackLeiblerDivergence(EmotionMetric):
    """Mean KL divergence of the annotators' distributions to probabilities (`distribution_metrics`)."""

    figure = "kl"
    inputs = _VECTOR_INPUTS
    measure = staticmethod(distribution_metrics)


class JensenShannonDivergence(KullbackLeiblerDivergence):
    """Mean Jensen-Shannon divergence of probabilities and the annotators' distributions (`distribution_metrics`)."""

    figure = "js"


class ExpectedCalibrationError(KullbackLeiblerDivergence):
    """Expected calibration error against the annotators' distributions, 15 bins (`distribution_metrics`)."""

    figure = "ece"


class ConcordanceCorrelation(EmotionMetric):
    """Lin's concordance correlation of arousal, valence and dominance, and their mean (`concordance_metrics`)."""

    figure = "ccc"
    inputs = _VECTOR_INPUTS
    measure = staticmethod(concordance_metrics)


def _secondary_metrics(logits: Any, distributions: Any) -> dict[str, float]:
    """KL in nats, and mean average precision over the classes that occur; relevant is what any annotator chose."""
    logits = _rows("secondary_logits", logits, np.shape(logits))
    distributions = _rows("secondary_labels", distributions, logits.shape, unknown=True)
    probabilities = softmax(logits, axis=1)
    known = ~np.isnan(distributions).any(axis=1)
    relevant = distributions[known] > 0
    precisions = [
        average_precision_score(relevant[:, index], probabilities[known, index])
        for index in np.flatnonzero(relevant.any(axis=0))
    ]
    kl = distribution_metrics(probabilities, distributions)["kl"]
    return {"secondary_kl": kl, "secondary_map": _mean(precisions)}


def _calibration_error(probabilities: np.ndarray, distributions: np.ndarray) -> float:
    if not len(probabilities):
        return np.nan
    chosen = probabilities.argmax(axis=1)
    rows = np.arange(len(chosen))
    gaps = probabilities[rows, chosen] - distributions[rows, chosen]
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = np.digitize(probabilities[rows, chosen], edges[1:-1], right=True)
    # A bin's weight is its share of the clips, so weight times mean gap is the sum of its gaps over all clips.
    return float(np.abs(np.bincount(bins, weights=gaps)).sum() / len(chosen))


def _concordance(predictions: np.ndarray, references: np.ndarray) -> float:
    known = ~np.isnan(references)
    predictions, references = predictions[known], references[known]
    if known.sum() < 2:
        return np.nan
    spread = predictions.var() + references.var() + (predictions.mean() - references.mean()) ** 2
    covariance = ((predictions - predictions.mean()) * (references - references.mean())).mean()
    return float(2 * covariance / spread) if spread > 0 else np.nan


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else np.nan


def _labels(labels: Any, label_set: LabelSet) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"Nothing to score: expected consensus labels of shape (clips,), got {labels.shape}.")
    if labels.max() >= len(label_set.labels):
        raise ValueError(f"Label {labels.max()} is outside the label set {list(label_set.labels)}.")
    return labels.astype(int)


def _rows(name: str, values: Any, shape: tuple[int, ...], unknown: bool = False) -> np.ndarray:
    if values is None:
        raise ValueError(f"{name} are missing: NaN stands for unknown.")
    values = np.asarray(values, dtype=np.float64)
    if values.shape != shape or not len(values):
        raise ValueError(f"Nothing to score, or shapes that do not fit: {name} are {values.shape}, expected {shape}.")
    bad = np.isposinf(values) | (np.isnan(values) & (not unknown))
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise ValueError(f"Row {row} of {name} is NaN or infinite: has training diverged?")
    return values
