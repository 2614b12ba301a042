"""Votes to targets by hand-computed values, and every rule of free text."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sailer.data.labels import (
    agreement,
    consensus,
    distribution,
    entropy,
    fleiss_kappa,
    match_label,
    primary_label,
    secondary_labels,
)
from sailer.data.schema import PRIMARY_LABELS, SECONDARY_LABELS, CorpusError

VOTES = np.array([[3, 1, 0], [2, 2, 1], [0, 0, 0], [0, 0, 5]])


def test_distribution_is_the_share_of_each_class_and_nan_without_votes():
    expected = [[0.75, 0.25, 0], [0.4, 0.4, 0.2], [np.nan] * 3, [0, 0, 1]]
    np.testing.assert_allclose(distribution(VOTES), expected)


def test_consensus_is_the_plurality_a_tie_is_no_agreement_and_no_votes_are_unlabelled():
    assert consensus(VOTES).tolist() == [0, -1, -100, 2]
    assert consensus(VOTES).dtype == np.int16


def test_consensus_of_fractions_that_tie_up_to_rounding_is_a_tie():
    assert consensus(np.array([[0.1 + 0.2, 0.3, 0.0]])).tolist() == [-1]


def test_agreement_is_the_share_of_the_first_class():
    np.testing.assert_allclose(agreement(VOTES), [0.75, 0.4, np.nan, 1])


def test_entropy_in_nats():
    quarters = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    fifths = -(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2))
    np.testing.assert_allclose(entropy(VOTES), [quarters, fifths, np.nan, 0], atol=1e-12)
    np.testing.assert_allclose(entropy(np.ones((1, 9))), [math.log(9)])


@pytest.mark.parametrize("target", [distribution, consensus, agreement, entropy])
def test_targets_of_one_clips_votes_are_its_row(target):
    for votes, expected in zip(VOTES, target(VOTES), strict=True):
        np.testing.assert_array_equal(target(votes), expected)


def test_fleiss_kappa_by_hand():
    # Two clips of three votes: pairs agree 3/3 and 1/3, so 2/3; the classes have 5/6 and 1/6, so 26/36 by chance.
    assert fleiss_kappa(np.array([[3, 0], [2, 1]])) == pytest.approx((2 / 3 - 26 / 36) / (1 - 26 / 36))
    assert fleiss_kappa(np.array([[3, 0], [0, 3]])) == pytest.approx(1)
    assert fleiss_kappa(np.array([[4, 0], [4, 0]])) == 1
    assert math.isnan(fleiss_kappa(np.array([[1, 0], [0, 0]])))


@settings(derandomize=True, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 5), st.just(9)), elements=st.integers(0, 12)))
def test_targets_agree_with_each_other(votes):
    shares, label = distribution(votes), consensus(votes)
    voted = votes.sum(axis=1) > 0
    np.testing.assert_allclose(shares[voted].sum(axis=1), 1)
    assert np.isnan(shares[~voted]).all() and (label[~voted] == -100).all()
    assert entropy(votes)[voted].min(initial=0) > -1e-9 and entropy(votes)[voted].max(initial=0) < math.log(9) + 1e-9
    for row in np.flatnonzero(label >= 0):
        assert (votes[row] < votes[row, label[row]]).sum() == 8


@pytest.mark.parametrize("label", PRIMARY_LABELS)
def test_every_primary_in_any_case_and_spacing(label):
    assert primary_label(label) == label
    assert primary_label(f"  {label.upper()} ") == label


@pytest.mark.parametrize(
    "text",
    [
        "Other",
        "Other-",
        "Other -",
        "other-bored",
        "OTHER - Happy",
        " Other-a, b / c",
        "Other-Sad",
        "other/annoyed",
        "Other-Disappointed",
        "Other-gelangweilt übrigens",
    ],
)
def test_every_free_primary_is_a_vote_for_other(text):
    assert primary_label(text) == "Other"


@pytest.mark.parametrize("text", ["", " ", "Hapy", "N", "Neutral,Happy", "Amused"])
def test_a_primary_that_is_no_class_and_no_free_text_is_refused(text):
    with pytest.raises(CorpusError, match=r"unknown primary emotion .*Neutral.*Other-"):
        primary_label(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" , ,", ()),
        ("Neutral,Excited", ("Neutral", "Excited")),
        ("excited , NEUTRAL", ("Neutral", "Excited")),
        ("Happy,Happy, happy", ("Happy",)),
        ("Other-Amused", ("Amused",)),
        ("Other- con fused", ("Confused",)),
        ("OTHER-amused,Amused", ("Amused",)),
        ("Dissapointed", ("Disappointed",)),
        ("Other-dissapointed", ("Disappointed",)),
        ("Other-", ("Other",)),
        ("Other", ("Other",)),
        ("Other-bored", ("Other",)),
        ("Other-annoyed/frustrated", ("Other",)),
        ("Other-bored, a bit tired,Sad", ("Sad", "Other")),
    ],
)
def test_secondary_tags(text, expected):
    assert secondary_labels(text) == expected


def test_all_secondary_tags_at_once_each_counts_once():
    assert secondary_labels(",".join([*SECONDARY_LABELS, *SECONDARY_LABELS])) == SECONDARY_LABELS


def test_match_label_ignores_case_and_spaces():
    assert match_label(" hap py", PRIMARY_LABELS) == "Happy"
    assert match_label("joy", PRIMARY_LABELS) is None
