"""Resampled figures against `emotion_report` on the clips that each draw stands for, one draw at a time."""

import numpy as np
import pytest

from sailer.data.schema import LabelSet
from sailer.training.bootstrap import Resampling, replicated_figures
from sailer.training.metrics import emotion_report


def split(clips: int = 60) -> tuple[dict, dict, list[str]]:
    random = np.random.default_rng(3)
    labels = random.integers(-1, 9, clips)
    distributions = random.dirichlet(np.ones(9), clips)
    distributions[::7] = np.nan
    attributes, secondary = random.random((clips, 3)), random.dirichlet(np.ones(17), clips)
    attributes[::5] = np.nan
    secondary[secondary < 0.05] = 0
    secondary /= secondary.sum(axis=1, keepdims=True)
    secondary[::6] = np.nan
    outputs = {
        "logits": random.normal(size=(clips, 9)).round(1),  # with ties
        "secondary_logits": random.normal(size=(clips, 17)),
        "attributes": random.random((clips, 3)),
        "sex_logits": random.normal(size=(clips, 2)),
        "age": random.random(clips) * 80,
    }
    targets = {
        "labels": distributions,
        "consensus": labels,
        "secondary_labels": secondary,
        "attribute_labels": attributes,
        "sex_labels": random.integers(0, 2, clips),
        "age_labels": np.where(random.random(clips) < 0.3, np.nan, 40.0),
    }
    targets["sex_labels"][::4] = -100
    return outputs, targets, [f"s{index % 7}" if index % 10 else "" for index in range(clips)]


def report(outputs: dict, targets: dict, rows: np.ndarray) -> dict[str, float]:
    heads = {name: value[rows] for name, value in (outputs | targets).items() if name not in ("logits", "labels")}
    labels = heads.pop("consensus")
    return emotion_report(outputs["logits"][rows], targets["labels"][rows], labels, LabelSet(), **heads)


def test_each_draw_has_the_figures_of_its_clips() -> None:
    outputs, targets, speakers = split()
    resampling = Resampling(speakers, repeats=5, seed=1)
    assert resampling.clusters == 7 + 6 and (resampling.counts.sum(axis=1) == 13).all()
    assert len({tuple(row) for row in resampling.counts}) == 6
    figures = replicated_figures(resampling, outputs, targets, LabelSet())
    compared = 0
    for draw, counts in enumerate(resampling.counts):
        rows = np.repeat(np.arange(60), counts[resampling.cluster].astype(int))
        expected = report(outputs, targets, rows)
        for name, value in expected.items():
            if name in figures:
                assert figures[name][draw] == pytest.approx(value, abs=1e-9, nan_ok=True), (name, draw)
                compared += 1
    assert compared > 6 * 30 and not {"clips", "scored_clips", "macro_f1_min_map"} & set(figures)
    assert len(set(figures["macro_f1"])) == 6


def test_intervals_and_paired_differences() -> None:
    speakers = [f"s{index}" for index in range(50)]
    resampling = Resampling(speakers, repeats=2000)
    right = np.random.default_rng(0).random(50) < 0.7
    shares = resampling.sums(right) / resampling.sums(np.ones(50))
    low, high = resampling.interval(shares)
    deviation = np.sqrt(right.mean() * (1 - right.mean()) / 50)  # of a mean of 50 independent clips
    assert (low, high) == pytest.approx((right.mean() - 1.96 * deviation, right.mean() + 1.96 * deviation), abs=0.02)
    same = resampling.compare(shares, shares)
    assert same == {"difference": 0, "interval": [0, 0], "p": 1}
    better = resampling.compare(shares + 0.1, shares)  # paired: the speakers' own spread is gone
    # Not one of 2,000 draws has the other sign: less than 2 in 2,001 cannot be said.
    assert better["difference"] == pytest.approx(0.1) and better["p"] == pytest.approx(2 / 2001)
    assert better["interval"] == pytest.approx([0.1, 0.1])
    some = Resampling(["a", "b"], repeats=9).compare(np.array([1.0, *[-1.0] * 3, *[2.0] * 6]), np.zeros(10))
    assert some["p"] == pytest.approx(2 * (3 + 1) / (9 + 1))
    again = Resampling(speakers, repeats=2000)
    np.testing.assert_array_equal(again.counts, resampling.counts)
    alone = Resampling(["one", "one"], repeats=9)
    assert alone.interval(alone.sums(np.ones(2))) is None
    assert alone.compare(np.ones(10), np.zeros(10)) == {"difference": 1, "interval": None, "p": None}
    with pytest.raises(ValueError, match="0 draws"):
        Resampling(["one"], repeats=0)
