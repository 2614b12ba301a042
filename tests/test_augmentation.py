"""Annotation dropout's properties, mixing by its frequencies, targets by hand, and plans as functions of the seed."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sailer.data.augmentation import AugmentationSettings, annotation_slots, drop_annotations, plan_epoch
from sailer.data.schema import CorpusError, LabelSet, build_dataset

LABELS = LabelSet()
MAJORITY = np.array(LABELS.indices(LABELS.majority))
ANGRY, CONTEMPT, DISGUST, FEAR, HAPPY, NEUTRAL, SAD, SURPRISE, OTHER = range(9)


def corpus(label, votes=None, **columns):
    if votes is None:
        votes = 5 * np.eye(9)[np.maximum(label, 0)]
    return build_dataset({"id": [f"clip{i}" for i in range(len(label))], "label": label, "votes": votes, **columns})


def realistic(rows, seed=0):
    """Class shares like the challenge's, five annotators, a fifth of the clips without agreement."""
    generator = np.random.default_rng(seed)
    shares = np.array([6.7, 2.5, 1.4, 1.1, 16.7, 29.2, 6.3, 1.1, 2.9])
    label = generator.choice(9, rows, p=shares / shares.sum())
    votes = generator.multinomial(5, 0.55 * np.eye(9)[label] + 0.05)
    label[generator.random(rows) < 0.19] = -1
    secondary = generator.integers(0, 2, (rows, 17))
    return corpus(label, votes, secondary_votes=secondary, attributes=generator.random((rows, 3)))


def table(plan):
    return plan.with_format("numpy")[:]


def dropped(votes, rate, repeats, weights=None, seed=0):
    votes = np.tile(np.asarray(votes, dtype=np.float32), (repeats, 1))
    generator = np.random.default_rng(seed)
    rounding, keys = generator.random(repeats), generator.random((repeats, annotation_slots(votes, MAJORITY)))
    return votes, drop_annotations(votes, rate, MAJORITY, rounding, keys, weights)


vote_counts = hnp.arrays(np.float32, 9, elements=st.integers(0, 7).map(float))
fractional_votes = hnp.arrays(np.float32, 9, elements=st.floats(0, 4, width=16))
rates = st.floats(0, 1)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(vote_counts | fractional_votes, rates)
def test_expected_drop(votes, rate):
    repeats = 4000
    before, after = dropped(votes, rate, repeats)
    lost = before.astype(float).sum(1) - after.astype(float).sum(1)
    total, available = float(votes.sum(dtype=float)), float(votes[MAJORITY].sum(dtype=float))
    expected = max(min(rate * total, available, total - 1), 0)
    # Stochastic rounding has a standard deviation of at most a half.
    assert lost.mean() == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(repeats))
    assert np.ptp(lost) <= 1 + 1e-4


@settings(max_examples=100, derandomize=True, deadline=None)
@given(vote_counts | fractional_votes, rates, st.booleans())
def test_what_is_never_dropped(votes, rate, empirical):
    weights = np.arange(1, 10) / 45 if empirical else None
    before, after = dropped(votes, rate, 50, weights)
    others = np.setdiff1d(np.arange(9), MAJORITY)
    assert (after[:, others] == before[:, others]).all()
    assert (after >= 0).all() and (after <= before).all()
    # A clip keeps at least one annotation, or all that it has.
    assert (after.sum(1) >= min(1, votes.sum()) - 1e-4).all()
    if (votes == np.round(votes)).all():
        assert (after == np.round(after)).all()


def test_every_annotation_of_a_majority_class_is_as_likely_to_go():
    votes = np.zeros(9)
    votes[[NEUTRAL, SAD, FEAR]] = 3, 1, 1
    _, after = dropped(votes, 0.2, 40_000)
    lost = votes - after.mean(0)
    assert lost[NEUTRAL] == pytest.approx(0.75, abs=0.01)
    assert lost[SAD] == pytest.approx(0.25, abs=0.01)
    assert lost[FEAR] == 0


def test_empirical_mode_drops_in_proportion_to_the_class_share():
    votes, weights = np.zeros(9), np.zeros(9)
    votes[[NEUTRAL, SAD, FEAR]] = 2, 2, 1
    weights[[NEUTRAL, SAD, FEAR]] = 0.6, 0.2, 0.2
    _, after = dropped(votes, 0.2, 40_000, weights)
    lost = votes - after.mean(0)
    # One annotation goes: Neutral's two weigh 1.2 of 1.6.
    assert lost[NEUTRAL] == pytest.approx(0.75, abs=0.01)
    assert lost[SAD] == pytest.approx(0.25, abs=0.01)


def test_empirical_mode_uses_the_corpus_distribution():
    # Half of the corpus is Neutral and a quarter Sad: of a clip with one vote each, Neutral goes twice as often.
    votes = np.zeros((12_000, 9))
    votes[:, [NEUTRAL, SAD, FEAR]] = 1
    votes[6000:, [NEUTRAL, SAD, FEAR]] = 8, 2, 2
    empirical = AugmentationSettings(annotation_dropout=1 / 3, annotation_dropout_mode="empirical")
    plan = table(plan_epoch(corpus(np.full(12_000, -1), votes), empirical, LABELS, 0, 0))
    lost = (votes - plan["votes"])[:6000].mean(0)
    assert lost[NEUTRAL] == pytest.approx(2 / 3, abs=0.03)
    assert lost[SAD] == pytest.approx(1 / 3, abs=0.03)


def test_targets_without_augmentation():
    votes = np.zeros((3, 9))
    votes[0, [HAPPY, SAD]] = 3, 1
    votes[1, SURPRISE] = 2
    secondary = np.zeros((3, 17))
    secondary[0, [2, 3]] = 1, 3
    attributes = np.array([[0.1, 0.2, 0.3], [np.nan] * 3, [0.5, np.nan, 0.5]])
    rows = corpus(np.array([HAPPY, SURPRISE, -100]), votes, secondary_votes=secondary, attributes=attributes)
    plan = table(plan_epoch(rows, AugmentationSettings(), LABELS, 0, 0))
    assert plan["index"].tolist() == [0, 1, 2] and plan["partner"].tolist() == [-1] * 3
    np.testing.assert_allclose(plan["target"][0, [HAPPY, SAD]], [0.75, 0.25])
    np.testing.assert_array_equal(plan["hard_target"][0], np.eye(9)[HAPPY])
    np.testing.assert_allclose(plan["secondary_target"][0, [2, 3]], [0.25, 0.75])
    np.testing.assert_allclose(plan["attribute_target"], attributes, rtol=1e-6)
    for name in ("target", "hard_target", "secondary_target"):
        assert np.isnan(plan[name][2]).all()
    assert np.isnan(plan["secondary_target"][1]).all()
    assert not plan["drop_text"].any()


def test_hard_targets_are_the_consensus_labels():
    label = np.array([*range(9), -1, -100])
    plan = table(plan_epoch(corpus(label), AugmentationSettings(), LABELS, 0, 0))
    np.testing.assert_array_equal(plan["hard_target"], [*np.eye(9), [np.nan] * 9, [np.nan] * 9])


def test_target_of_a_mix_is_the_mean_and_unknowns_stay_unknown():
    votes = np.zeros((2, 9))
    votes[0, [NEUTRAL, SAD]] = 4, 1
    votes[1, [FEAR, NEUTRAL]] = 1, 1
    secondary = np.zeros((2, 17))
    secondary[0, 0] = 2
    attributes = np.array([[0.2, 0.4, np.nan], [0.6, np.nan, np.nan]])
    rows = corpus(np.array([NEUTRAL, FEAR]), votes, secondary_votes=secondary, attributes=attributes)
    plan = table(plan_epoch(rows, AugmentationSettings(mixing_probability=1), LABELS, 3, 0))
    assert plan["partner"].tolist() == [1, -1]
    np.testing.assert_allclose(plan["target"][0, [NEUTRAL, SAD, FEAR]], [0.65, 0.1, 0.25], rtol=1e-6)
    np.testing.assert_array_equal(plan["hard_target"][0], (np.eye(9)[NEUTRAL] + np.eye(9)[FEAR]) / 2)
    assert np.isnan(plan["secondary_target"][0]).all()
    np.testing.assert_allclose(plan["attribute_target"][0], [0.4, np.nan, np.nan], rtol=1e-6)
    np.testing.assert_allclose(plan["votes"][0], votes[0])


def test_dropout_also_reaches_the_partner():
    votes = np.zeros((2, 9))
    votes[0, NEUTRAL] = 1
    votes[1, [FEAR, NEUTRAL]] = 1, 1
    both_off = AugmentationSettings(mixing_probability=1, annotation_dropout=1.0)
    plan = table(plan_epoch(corpus(np.array([NEUTRAL, FEAR]), votes), both_off, LABELS, 0, 0))
    np.testing.assert_allclose(plan["target"][0, [NEUTRAL, FEAR]], [0.5, 0.5])


def test_mixing_frequencies():
    label = np.repeat([NEUTRAL, HAPPY, OTHER, -1, CONTEMPT, FEAR, SURPRISE], [12_000, 8000, 500, 500, 100, 200, 400])
    with np.errstate(all="raise"):  # no clip of Disgust: its frequency has no inverse
        plan = table(plan_epoch(corpus(label), AugmentationSettings(mixing_probability=0.4), LABELS, 0, 0))
    mixed = plan["partner"] >= 0
    majority = np.isin(label, MAJORITY)
    assert not mixed[~majority].any()
    assert mixed[majority].mean() == pytest.approx(0.4, abs=0.02)
    partners = plan["partner"][mixed]
    # Inverse frequencies 1/100 : 1/200 : 1/400; no Disgust clip exists.
    chosen = np.bincount(label[partners], minlength=9)[[CONTEMPT, FEAR, SURPRISE]] / mixed.sum()
    np.testing.assert_allclose(chosen, [4 / 7, 2 / 7, 1 / 7], atol=0.025)
    uses = np.bincount(partners, minlength=len(label))[label == FEAR]
    assert uses.min() > 0 and uses.std() < 2 * np.sqrt(uses.mean())
    gap = plan["gap"][mixed]
    assert (plan["gap"][~mixed] == 0).all()
    assert plan["partner_first"][mixed].mean() == pytest.approx(0.5, abs=0.03)
    assert (gap > 0).mean() == pytest.approx(0.5, abs=0.03)
    assert np.abs(gap).max() < 2 and np.abs(gap).mean() == pytest.approx(1, abs=0.03)
    # Order, coin and length are drawn independently.
    draws = np.stack([plan["partner_first"][mixed], gap > 0, np.abs(gap), label[partners]]).astype(float)
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.04


def test_a_class_of_one_clip_is_drawn_as_often_as_its_frequency_says():
    label = np.repeat([NEUTRAL, CONTEMPT, FEAR], [6000, 1, 3])
    plan = table(plan_epoch(corpus(label), AugmentationSettings(mixing_probability=1), LABELS, 0, 0))
    assert (plan["partner"] == 6000).sum() / 6000 == pytest.approx(3 / 4, abs=0.03)


def test_same_emotion_mixing():
    label = np.array([HAPPY] * 40 + [FEAR] * 2 + [OTHER] + [-1] * 5)
    emix = AugmentationSettings(mixing_probability=1, mixing_mode="same_emotion")
    partners = np.stack([table(plan_epoch(corpus(label), emix, LABELS, 0, epoch))["partner"] for epoch in range(60)])
    assert (partners[:, label == -1] == -1).all()
    assert (partners[:, label == OTHER] == -1).all(), "the only clip of its class has no partner"
    assert (partners[:, 40] == 41).all() and (partners[:, 41] == 40).all()
    happy = partners[:, :40]
    assert (label[happy] == HAPPY).all()
    assert (happy != np.arange(40)).all(), "never with itself"
    assert len(np.unique(happy[:, 0])) > 20
    assert set(np.unique(happy)) == set(range(40))


def test_plan_is_a_function_of_seed_and_epoch():
    rows = realistic(300)
    every = AugmentationSettings(
        annotation_dropout=True, mixing_probability=0.5, text_dropout=0.3, undersample_majority=0.25
    )

    def plan(seed, epoch, num_proc=None):
        return table(plan_epoch(rows, every, LABELS, seed, epoch, num_proc=num_proc))

    first = plan(1, 0)
    for other in (plan(1, 0), plan(1, 0, num_proc=2)):
        for name in first:
            np.testing.assert_array_equal(first[name], other[name], err_msg=name)
    for other in (plan(2, 0), plan(1, 1)):
        assert len(other["index"]) == len(first["index"])
        assert other["index"].tolist() != first["index"].tolist()
        assert other["partner"].tolist() != first["partner"].tolist()
    assert every.annotation_dropout == 0.2


def test_the_plan_of_a_seed_stays_the_same_from_version_to_version():
    votes = np.zeros((6, 9))
    votes[:, [NEUTRAL, FEAR]] = 3, 2
    every = AugmentationSettings(
        annotation_dropout=0.5, mixing_probability=0.7, text_dropout=0.5, undersample_majority=0.25
    )
    rows = corpus(np.array([NEUTRAL, NEUTRAL, NEUTRAL, NEUTRAL, FEAR, CONTEMPT]), votes)
    plan = table(plan_epoch(rows, every, LABELS, 7, 2))
    assert plan["index"].tolist() == [0, 1, 2, 4, 5] and plan["partner"].tolist() == [5, 4, -1, -1, -1]
    assert plan["partner_first"].tolist() == [False, True, False, False, False]
    assert plan["drop_text"].tolist() == [True, False, False, False, False]
    assert plan["votes"][:, NEUTRAL].tolist() == [0, 0, 1, 0, 1] and plan["votes"][:, FEAR].tolist() == [2] * 5
    np.testing.assert_allclose(plan["gap"], [0.559, -1.83, 0, 0, 0], atol=1e-3)


def test_plan_does_not_depend_on_the_batches_of_map(monkeypatch):
    rows, mixing = realistic(100), AugmentationSettings(annotation_dropout=0.2, mixing_probability=0.5)
    whole = table(plan_epoch(rows, mixing, LABELS, 0, 0))
    monkeypatch.setattr("sailer.data.augmentation._MAP_BATCH", 7)
    pieces = table(plan_epoch(rows, mixing, LABELS, 0, 0))
    for name in whole:
        np.testing.assert_array_equal(whole[name], pieces[name])


def test_undersampling_leaves_out_other_majority_clips_each_epoch():
    rows = realistic(500)
    label = np.asarray(rows["label"][:])
    half = AugmentationSettings(undersample_majority=0.5)
    epochs = [table(plan_epoch(rows, half, LABELS, 0, epoch))["index"] for epoch in range(8)]
    majority = np.isin(label, MAJORITY)
    assert {len(index) for index in epochs} == {500 - round(majority.sum() / 2)}
    for index in epochs:
        assert set(np.flatnonzero(~majority)) <= set(index) and len(set(index)) == len(index)
    assert len(set(np.concatenate(epochs))) > 490, "the share that is left out moves on"
    assert set(epochs[0]) != set(epochs[1])


def test_text_dropout_rate():
    plan = table(plan_epoch(realistic(5000), AugmentationSettings(text_dropout=0.3), LABELS, 0, 0))
    assert plan["drop_text"].mean() == pytest.approx(0.3, abs=0.02)


def test_other_label_sets():
    label_set = LabelSet(("calm", "joy", "rage"), majority=("calm",))
    rows = build_dataset({"id": ["a", "b"], "votes": [[2, 1, 0], [0, 0, 3]], "label": [0, 2]}, label_set)
    plan = table(plan_epoch(rows, AugmentationSettings(mixing_probability=1), label_set, 0, 0))
    np.testing.assert_allclose(plan["target"][0], [1 / 3, 1 / 6, 1 / 2], rtol=1e-6)


def test_everything_is_off_by_default():
    off = ("annotation_dropout", "mixing_probability", "text_dropout", "undersample_majority", "manifold_mixup")
    off += ("state_mixup", "speed_perturbation")
    modes = {"annotation_dropout_mode": "majority", "mixing_mode": "minority"}
    expected = dict.fromkeys(off, 0.0) | modes | {"max_seconds": 15.0, "augmentation_variants": 0}
    assert dataclasses.asdict(AugmentationSettings()) == expected
    assert AugmentationSettings(annotation_dropout=False).annotation_dropout == 0.0


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), "half", None])
@pytest.mark.parametrize(
    "option", ["annotation_dropout", "mixing_probability", "text_dropout", "undersample_majority"]
)
def test_rates_outside_the_unit_interval(option, rate):
    with pytest.raises(ValueError, match=f"{option} is a rate between 0 and 1, got"):
        AugmentationSettings(**{option: rate})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotation_dropout_mode": "minority"}, "annotation_dropout_mode is one of"),
        ({"mixing_mode": "emix"}, "mixing_mode is one of"),
        ({"augmentation_variants": -1}, "augmentation_variants is a whole number"),
        ({"augmentation_variants": 1.5}, "augmentation_variants is a whole number"),
        ({"manifold_mixup": -1.0}, "manifold_mixup is a number from 0"),
        ({"manifold_mixup": float("inf")}, "manifold_mixup is a number from 0"),
        ({"state_mixup": -0.1}, "state_mixup is a number from 0"),
        ({"max_seconds": 0}, "max_seconds must exceed 0 s"),
        ({"max_seconds": 1.5, "mixing_probability": 0.5}, "max_seconds must exceed 2.0 s"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentationSettings(**options)


def test_mixing_needs_minority_clips():
    rows = corpus(np.array([NEUTRAL, HAPPY, OTHER, -1]))
    with pytest.raises(CorpusError, match=r"needs clips of a minority class.*mixing_probability"):
        plan_epoch(rows, AugmentationSettings(mixing_probability=0.5), LABELS, 0, 0)
    plan_epoch(rows, AugmentationSettings(mixing_probability=0.5, mixing_mode="same_emotion"), LABELS, 0, 0)


def test_undersampling_must_leave_something():
    with pytest.raises(CorpusError, match="undersample_majority leaves no training clip"):
        plan_epoch(corpus(np.array([NEUTRAL])), AugmentationSettings(undersample_majority=1), LABELS, 0, 0)


def test_no_clips():
    with pytest.raises(CorpusError, match="no training clips"):
        plan_epoch(corpus(np.array([0])).select([]), AugmentationSettings(), LABELS, 0, 0)


def test_planning_the_challenge_takes_seconds():
    rows = realistic(84_260)
    every = AugmentationSettings(annotation_dropout=0.2, mixing_probability=0.5, text_dropout=0.1)
    start = time.perf_counter()
    plan_epoch(rows, every, LABELS, 0, 0)
    assert time.perf_counter() - start < 10


def speeds(share, variants=0, epoch=0, seed=1):
    settings = AugmentationSettings(speed_perturbation=share, augmentation_variants=variants)
    return plan_epoch(corpus(np.full(2000, 5)), settings, LABELS, seed, epoch).with_format("numpy")["speed"][:]


def test_speeds_are_drawn_evenly_by_their_logarithm():
    drawn = np.log(speeds(0.25)) / np.log(1.25)
    assert abs(drawn).max() <= 1 + 1e-6
    # Uniform on [-1, 1]: mean 0, standard deviation 1 / sqrt(3); of 2,000 draws within four standard errors.
    assert abs(drawn.mean()) < 4 / np.sqrt(3 * 2000)
    assert np.allclose(np.quantile(drawn, [0.1, 0.25, 0.5, 0.75, 0.9]), [-0.8, -0.5, 0, 0.5, 0.8], atol=0.07)
    assert np.array_equal(speeds(0.25), speeds(0.25))
    assert not np.isclose(speeds(0.25), speeds(0.25, epoch=1)).any()
    assert not np.isclose(speeds(0.25), speeds(0.25, seed=2)).any()
    assert set(speeds(0.0)) == {1.0}


def test_plans_that_are_cycled_through_have_the_same_speeds_whatever_the_seed():
    plans = np.stack([speeds(0.25, variants=5, epoch=epoch) for epoch in range(5)])
    expected = [0.8, 0.8944272, 1.0, 1.118034, 1.25]  # 1.25 to the power of -1, -1/2, 0, 1/2 and 1
    np.testing.assert_allclose(np.sort(plans, axis=0), np.tile(expected, (2000, 1)).T, rtol=1e-6)
    assert (np.sort(plans, axis=0)[2] == 1).all(), "and a clip's own is among an odd number of them"
    assert all(len(set(plan)) == 5 for plan in plans), "an epoch hears all of them"
    np.testing.assert_array_equal(plans[1], speeds(0.25, variants=5, epoch=1, seed=7))


def test_one_plan_has_no_other_speed():
    with pytest.raises(ValueError, match="speed_perturbation needs another number of augmentation_variants than 1"):
        AugmentationSettings(speed_perturbation=0.2, augmentation_variants=1)
