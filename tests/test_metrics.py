"""The report and the `evaluate` metrics against scikit-learn, scipy and values worked out by hand."""

import json
import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    classification_report,
    f1_score,
)

from sailer.data.schema import PRIMARY_LABELS, LabelSet
from sailer.training import metrics
from sailer.training.metrics import (
    concordance_metrics,
    decision_metrics,
    decisions,
    distribution_metrics,
    emotion_report,
    greater_is_better,
    majority_class_f1,
    ranking_metrics,
    risk_coverage,
    selective_metrics,
    shuffled_label_f1,
)

SMALL = LabelSet(labels=("calm", "cross", "afraid", "else"), majority=("calm",), scored=("calm", "cross", "afraid"))
CLIPS = 200


@pytest.fixture
def clips():
    """Logits, distributions (some unknown) and labels; Contempt never occurs, some clips are Other or unlabelled."""
    random = np.random.default_rng(0)
    labels = random.choice([-100, -1, 0, 2, 3, 4, 5, 6, 7, 8], size=CLIPS)
    logits = random.normal(size=(CLIPS, 9)) + 2 * np.eye(9)[labels.clip(0)]
    distributions = random.multinomial(5, softmax(logits, axis=1)) / 5
    distributions[labels == -100] = np.nan
    return logits, distributions, labels


def test_decisions_never_choose_a_class_that_is_not_scored():
    logits = np.array([[0.0, 1.0, 2.0, 9.0], [3.0, 1.0, 2.0, 9.0]])
    assert decisions(logits, SMALL).tolist() == [2, 0]


def test_decision_metrics_by_hand():
    # Scored (reference, prediction): calm-calm, calm-calm, calm-cross, cross-cross, cross-afraid; afraid never occurs.
    references = [0, 0, 0, 1, 1, 3, -1, -100]
    predictions = [0, 0, 1, 1, 2, 0, 0, 0]
    figures = decision_metrics(predictions, references, SMALL)
    f1_calm, f1_cross = 2 * 2 / (3 + 2), 2 * 1 / (2 + 2)
    assert figures == pytest.approx(
        {
            "macro_f1": (f1_calm + f1_cross) / 2,
            "accuracy": 3 / 5,
            "uar": (2 / 3 + 1 / 2) / 2,
            "f1_calm": f1_calm,
            "f1_cross": f1_cross,
        }
    )


def test_ranking_metrics_by_hand():
    # afraid is third and first of four in the ranking: (1/1 + 2/3) / 2; the clip of "else" is not ranked
    scores = np.zeros((5, 4))
    scores[:, 2] = [0.9, 0.5, 0.7, 0.1, 0.8]
    figures = ranking_metrics(scores, [2, 2, 0, 0, 3], SMALL)
    assert figures["ap_afraid"] == pytest.approx((1 + 2 / 3) / 2)
    assert figures["min_map"] == figures["ap_afraid"]  # cross is a minority class too, but does not occur
    assert set(figures) == {"min_map", "ap_afraid", "ap_calm"}


def test_divergences_and_calibration_by_hand():
    probabilities = np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    distributions = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.6, 0.2], [math.nan] * 3])
    figures = distribution_metrics(probabilities, distributions)
    kl = [math.log(2), 0.5 * math.log(2), 0.4 * math.log(2) + 0.6 * math.log(0.6 / 0.8)]
    assert figures["kl"] == pytest.approx(sum(kl) / 3)
    # One bin holds the first two clips: mean confidence 0.5, mean agreement 0.75. The other: 0.8 against 0.6.
    assert figures["ece"] == pytest.approx(2 / 3 * 0.25 + 1 / 3 * 0.2)
    distances = jensenshannon(probabilities[:3], distributions[:3], axis=1)
    assert figures["js"] == pytest.approx((distances**2).mean())


def test_calibration_bins_are_a_fifteenth_wide():
    # Gaps of opposite sign cancel within a bin (0.41 and 0.45 lie in (6/15, 7/15]) and not across (0.45 and 0.48).
    def error(first, second):
        probabilities = np.array([[first] + [(1 - first) / 4] * 4, [second] + [(1 - second) / 4] * 4])
        distributions = np.array([[first + 0.1] + [(0.9 - first) / 4] * 4, [second - 0.1] + [(1.1 - second) / 4] * 4])
        return distribution_metrics(probabilities, distributions)["ece"]

    assert error(0.41, 0.45) == pytest.approx(0, abs=1e-12)
    assert error(0.45, 0.48) == pytest.approx(0.1)


@pytest.mark.parametrize("edge", range(1, 15))
def test_every_calibration_bin_ends_at_its_fifteenth(edge):
    # Two clips beside an edge, confidences 0.02 apart; only if a bin ends there their gaps of opposite sign add up.
    def row(confidence):
        return [confidence, *[(1 - confidence) / 39] * 39]

    below, above = edge / 15 - 0.01, edge / 15 + 0.01
    figures = distribution_metrics([row(below), row(above)], [row(below + 0.005), row(above - 0.005)])
    assert figures["ece"] == pytest.approx(0.005)
    figures = distribution_metrics([row(edge / 15), row(below)], [row(edge / 15 + 0.005), row(below - 0.005)])
    assert figures["ece"] == pytest.approx(0, abs=1e-12), "the edge itself is of the bin below"


def test_calibration_of_one_hot_references_is_the_usual_one():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7]])
    figures = distribution_metrics(probabilities, np.eye(2)[[0, 1, 1]])
    assert figures["ece"] == pytest.approx(2 / 3 * abs(0.9 - 0.5) + 1 / 3 * abs(0.7 - 1))


def test_a_probability_of_zero_leaves_the_divergence_finite():
    figures = distribution_metrics([[1.0, 0.0]], [[0.0, 1.0]])
    assert figures["kl"] == pytest.approx(-math.log(1e-12)) and figures["js"] == pytest.approx(math.log(2))


def test_concordance_by_hand():
    # arousal: as in tests/test_losses.py; valence one known value; dominance one constant for both
    references = [[0.0, 0.5, 0.5], [0.5, math.nan, 0.5], [1.0, math.nan, 0.5]]
    predictions = [[0.0, 0.5, 0.5], [0.25, 0.5, 0.5], [0.5, 0.5, 0.5]]
    figures = concordance_metrics(predictions, references)
    assert figures["ccc_arousal"] == pytest.approx(8 / 13)
    assert math.isnan(figures["ccc_valence"]) and math.isnan(figures["ccc_dominance"])
    assert figures["ccc"] == figures["ccc_arousal"]


def test_concordance_needs_two_known_values():
    # y = 2x: 2 * 1/2 / (1/4 + 1 + 1/4)
    figures = concordance_metrics([[0.0], [1.0], [5.0]], [[0.0], [2.0], [math.nan]], ["arousal"])
    assert figures == pytest.approx({"ccc_arousal": 2 / 3, "ccc": 2 / 3})


def test_report_agrees_with_scikit_learn(clips):
    logits, distributions, labels = clips
    report = emotion_report(logits, distributions, labels)
    scored = (labels >= 0) & (labels < 8)
    assert report["clips"] == CLIPS and report["scored_clips"] == scored.sum()
    references, predictions = labels[scored], logits[scored, :8].argmax(axis=1)
    occurring = [0, 2, 3, 4, 5, 6, 7]
    assert report["macro_f1"] == pytest.approx(f1_score(references, predictions, labels=occurring, average="macro"))
    assert report["accuracy"] == pytest.approx(accuracy_score(references, predictions))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert report["uar"] == pytest.approx(balanced_accuracy_score(references, predictions))
    detail = classification_report(references, predictions, output_dict=True, zero_division=0)
    precisions = {}
    for index in occurring:
        assert report[f"f1_{PRIMARY_LABELS[index]}"] == pytest.approx(detail[str(index)]["f1-score"])
        score = softmax(logits[scored, :8], axis=1)[:, index]
        precisions[PRIMARY_LABELS[index]] = average_precision_score(references == index, score)
        assert report[f"ap_{PRIMARY_LABELS[index]}"] == pytest.approx(precisions[PRIMARY_LABELS[index]])
    assert "f1_Contempt" not in report and "ap_Contempt" not in report and "f1_Other" not in report
    assert report["min_map"] == pytest.approx(np.mean([precisions[name] for name in ("Disgust", "Fear", "Surprise")]))
    assert report["macro_f1_min_map"] == pytest.approx((report["macro_f1"] + report["min_map"]) / 2)
    expected = distribution_metrics(softmax(logits, axis=1), distributions)
    assert {name: report[name] for name in expected} == expected
    assert all(type(value) is float for value in report.values()) and json.dumps(report)


def test_log_probabilities_score_as_logits_do(clips):
    logits, distributions, labels = clips
    with np.errstate(divide="ignore"):
        logs = np.log(softmax(logits, axis=1))
    report = emotion_report(logs, distributions, labels)
    assert report == pytest.approx(emotion_report(logits, distributions, labels))
    logs[0] = [-np.inf] * 8 + [0.0]  # all on Other: finite all the same
    assert math.isfinite(emotion_report(logs, distributions, labels)["min_map"])


def test_report_of_another_label_set():
    logits = np.array([[2.0, 0.0, 0.0, 5.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    report = emotion_report(logits, np.eye(4)[[0, 1, 2]], [0, 1, 2], SMALL)
    assert report["macro_f1"] == report["min_map"] == report["macro_f1_min_map"] == 1
    assert {name for name in report if name.startswith("f1_")} == {"f1_calm", "f1_cross", "f1_afraid"}


def test_report_of_clips_that_are_all_unscored(caplog):
    report = emotion_report(np.zeros((3, 4)), np.eye(4)[[3, 3, 0]], [3, -1, -100], SMALL)
    assert report["scored_clips"] == 0 and "None of the 3 clips has a consensus" in caplog.text
    assert all(math.isnan(report[name]) for name in ("macro_f1", "accuracy", "uar", "min_map", "macro_f1_min_map"))
    assert report["kl"] == pytest.approx(math.log(4))


def test_report_without_any_votes():
    report = emotion_report(np.eye(4), np.full((4, 4), np.nan), [0, 1, 2, 3], SMALL)
    assert report["macro_f1"] == 1 and all(math.isnan(report[name]) for name in ("kl", "js", "ece"))


def test_report_of_the_other_heads_by_hand(clips):
    logits, distributions, labels = (values[:4] for values in clips)
    secondary = np.zeros((4, 17))
    secondary[:, 0] = [3, 1, 2, 0]
    secondary_labels = np.zeros((4, 17))
    secondary_labels[:, 1] = 0.5
    secondary_labels[:, 0] = [0.5, 0, 0.5, 0]
    secondary_labels[[1, 3], 1] = 1
    secondary_labels[3] = np.nan
    report = emotion_report(
        logits,
        distributions,
        labels,
        secondary_logits=secondary,
        secondary_labels=secondary_labels,
        attributes=[[0.1] * 3, [0.2] * 3, [0.3] * 3, [0.4] * 3],
        attribute_labels=[[0.1] * 3, [0.2] * 3, [0.3] * 3, [math.nan] * 3],
        sex_logits=[[1, 0], [1, 0], [0, 1], [0, 1]],
        sex_labels=[0, 1, 1, -100],
        age=[30, 40, 50, 60],
        age_labels=[35, 40, math.nan, 59],
    )
    # Class 0 ranks highest where it is relevant (logits 3 and 2 against 1), class 1 is relevant everywhere.
    assert report["secondary_map"] == pytest.approx(1)
    logs = secondary - np.log(np.exp(secondary).sum(axis=1, keepdims=True))
    kl = [-math.log(2) - (logs[i, 0] + logs[i, 1]) / 2 for i in (0, 2)] + [-logs[1, 1]]
    assert report["secondary_kl"] == pytest.approx(sum(kl) / 3)
    assert report["ccc"] == pytest.approx(1) and report["ccc_valence"] == pytest.approx(1)
    assert report["sex_accuracy"] == pytest.approx(2 / 3)
    assert report["age_mae"] == pytest.approx((5 + 0 + 1) / 3)


def test_report_of_heads_of_which_nothing_is_known(clips):
    logits, distributions, labels = clips
    report = emotion_report(
        logits,
        distributions,
        labels,
        secondary_logits=np.zeros((CLIPS, 17)),
        secondary_labels=np.full((CLIPS, 17), np.nan),
        attributes=np.zeros((CLIPS, 3)),
        attribute_labels=np.full((CLIPS, 3), np.nan),
        sex_logits=np.zeros((CLIPS, 2)),
        sex_labels=np.full(CLIPS, -100),
        age=np.zeros(CLIPS),
        age_labels=np.full(CLIPS, np.nan),
    )
    for name in ("secondary_kl", "secondary_map", "ccc_arousal", "ccc", "sex_accuracy", "age_mae"):
        assert math.isnan(report[name])


def test_what_cannot_be_scored(clips):
    logits, distributions, labels = clips
    with pytest.raises(ValueError, match="Nothing to score"):
        emotion_report(np.zeros((0, 9)), np.zeros((0, 9)), [])
    with pytest.raises(ValueError, match=r"Nothing to score: .*got \(\)"):
        emotion_report(logits, distributions, 3)
    with pytest.raises(ValueError, match=r"logits are \(200, 8\), expected \(200, 9\)"):
        emotion_report(logits[:, :8], distributions, labels)
    with pytest.raises(ValueError, match="Label 9 is outside the label set"):
        emotion_report(logits, distributions, np.full(CLIPS, 9))
    with pytest.raises(ValueError, match="Row 3 of logits is NaN or infinite: has training diverged"):
        emotion_report(np.where(np.arange(CLIPS)[:, None] == 3, np.nan, logits), distributions, labels)
    with pytest.raises(ValueError, match="distributions does not sum to 1"):
        emotion_report(logits, distributions * 5, labels)
    for wrong in ([0.5, 0.505], [1.5, -0.5], [1.5, -0.6]):
        with pytest.raises(ValueError, match=r"A row of the distributions does not sum to 1: \[" + str(wrong[0])):
            distribution_metrics([[0.5, 0.5]] * 2, [[0.5, 0.5], wrong])
        with pytest.raises(ValueError, match="A row of the probabilities does not sum to 1"):
            distribution_metrics([wrong], [[0.5, 0.5]])
    assert distribution_metrics([[0.5, 0.5004]], [[0.5, 0.5004]])["kl"] == 0
    with pytest.raises(ValueError, match="age_labels are missing"):
        emotion_report(logits, distributions, labels, age=np.zeros(CLIPS))


def test_direction_of_selection(clips):
    logits, distributions, labels = clips
    worse, better = (emotion_report(scale * logits, distributions, labels) for scale in (-1, 1))
    for name in ("macro_f1", "accuracy", "uar", "min_map", "macro_f1_min_map", "kl", "js", "f1_Sad", "ap_Fear"):
        assert (better[name] > worse[name]) == greater_is_better(name)
    assert not greater_is_better("ece") and not greater_is_better("age_mae") and greater_is_better("ccc")


def test_majority_class_baseline_by_hand():
    # Cross is the most frequent scored class in training; "else" is more frequent but never predicted.
    train = [1, 1, 0, 3, 3, 3, -1]
    # Of 4 scored test clips 1 is cross: precision 1/4, recall 1, F1 2/5; calm and afraid have 0.
    assert majority_class_f1(train, [0, 0, 1, 2, 3], SMALL) == pytest.approx(0.4 / 3)
    # Calm and cross are as frequent, so the first of them: precision 2/4, recall 1.
    assert majority_class_f1([1, 0, 3], [0, 0, 1, 2, 3], SMALL) == pytest.approx(2 / 3 / 3)
    with pytest.raises(ValueError, match="there is no most frequent one"):
        majority_class_f1([3, -1], [0], SMALL)


def test_shuffled_label_baseline():
    labels = np.array([0, 1] * 200 + [3] * 100)
    predictions = labels.clip(max=2)
    chance = shuffled_label_f1(predictions, labels, SMALL, seed=1)
    assert chance == pytest.approx(0.5, abs=0.02)
    few = {seed: [shuffled_label_f1(predictions, labels, SMALL, seed, repeats=5) for _ in range(2)] for seed in (1, 2)}
    assert few[1][0] == few[1][1] != few[2][0] == few[2][1]
    assert shuffled_label_f1([0, 1], [0, 1], SMALL) == shuffled_label_f1([0, 1], [0, 1], SMALL, seed=0, repeats=100)
    # One scored clip of each class and predictions of both: either order, with equal chance, gives 1 or 0.
    assert shuffled_label_f1([0, 1], [0, 1], SMALL, repeats=200) == pytest.approx(0.5, abs=0.12)


@pytest.fixture
def cache(tmp_path):
    return {"cache_dir": str(tmp_path)}


def test_metrics_give_the_figures_of_the_report(clips, cache):
    logits, distributions, labels = clips
    report = emotion_report(logits, distributions, labels)
    scored = np.zeros_like(logits)
    scored[:, :8] = softmax(logits[:, :8], axis=1)
    inputs = {
        metrics.MacroF1: (decisions(logits, LabelSet()), labels, ("macro_f1",)),
        metrics.Accuracy: (decisions(logits, LabelSet()), labels, ("accuracy",)),
        metrics.UnweightedAverageRecall: (decisions(logits, LabelSet()), labels, ("uar",)),
        metrics.ClassF1: (decisions(logits, LabelSet()), labels, [name for name in report if name.startswith("f1_")]),
        metrics.MinorityMeanAveragePrecision: (scored, labels, ("min_map",)),
        metrics.ClassAveragePrecision: (scored, labels, [name for name in report if name.startswith("ap_")]),
        metrics.KullbackLeiblerDivergence: (softmax(logits, axis=1), distributions, ("kl",)),
        metrics.JensenShannonDivergence: (softmax(logits, axis=1), distributions, ("js",)),
        metrics.ExpectedCalibrationError: (softmax(logits, axis=1), distributions, ("ece",)),
    }
    for metric, (predictions, references, names) in inputs.items():
        figures = metric(**cache).compute(predictions=predictions, references=references)
        assert figures == pytest.approx({name: report[name] for name in names})


def test_metric_of_another_label_set_in_batches(cache):
    metric = metrics.MacroF1(SMALL, **cache)
    references, predictions = [0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 2, 0]
    for start in (0, 3):
        metric.add_batch(predictions=predictions[start : start + 3], references=references[start : start + 3])
    assert metric.compute() == {"macro_f1": pytest.approx((0.8 + 0.5) / 2)}


def test_concordance_metric(cache):
    predictions = np.array([[0.0, 0.1, 0.2], [0.25, 0.2, 0.3], [0.5, 0.3, 0.4]])
    references = np.array([[0.0, 0.1, np.nan], [0.5, 0.2, 0.2], [1.0, 0.3, 0.4]])
    figures = metrics.ConcordanceCorrelation(**cache).compute(predictions=predictions, references=references)
    assert list(figures) == ["ccc_arousal", "ccc_valence", "ccc_dominance", "ccc"]
    assert figures["ccc_arousal"] == pytest.approx(8 / 13) and figures["ccc_valence"] == pytest.approx(1)


@pytest.mark.parametrize(
    "metric", [metrics.MacroF1, metrics.MinorityMeanAveragePrecision, metrics.ExpectedCalibrationError]
)
def test_metric_of_nothing(metric, cache):
    with pytest.raises(ValueError, match="Nothing to score"):
        metric(**cache).compute(predictions=[], references=[])


def test_risk_coverage_by_hand():
    # Surest first: right, wrong, (right, wrong) together, right; one clip is not scored.
    confidence = np.array([0.9, 0.8, 0.6, 0.6, 0.5, 0.99])
    wrong = np.array([0, 1, 0, 1, 0, np.nan])
    coverage, risk = risk_coverage(confidence, wrong)
    assert coverage.tolist() == [0.2, 0.4, 0.8, 1.0] and risk.tolist() == [0, 0.5, 0.5, 0.4]
    label_set = LabelSet(("a", "b", "Other"), ("a",))
    # Differences of logits 2, 1 and 0 among the scored: surest right, then wrong, then right; the last is Other's.
    logits = np.array([[2.0, 0, 5], [1, 0, 0], [0.1, 0, 0], [9, 0, 0]])
    found = selective_metrics(logits, np.array([0, 1, 0, 2]), label_set)
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert emotion_report(logits, np.full((4, 3), np.nan), np.array([0, 1, 0, 2]), label_set)["aurc"] == found["aurc"]
    assert np.isnan(selective_metrics(logits, np.full(4, -1), label_set)["aurc"])
    # The best order of an error of 1/2 has 1/2 + 1/2 log 1/2 in the limit, the worst is above the error.
    many, half = np.linspace(1, 0, 10001), np.arange(10001) > 5000
    for errors, area in ((half, 0.5 + 0.5 * np.log(0.5)), (~half, 0.5 + 0.5 * np.log(2))):
        shares, risks = risk_coverage(many, errors.astype(float))
        assert (np.diff(shares, prepend=0) * risks).sum() == pytest.approx(area, abs=1e-3)
    assert not greater_is_better("aurc")
