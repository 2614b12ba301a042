"""Figures by groups of clips: which clips are where, what one clip cannot say, and the largest gap."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import entropy

from sailer.data.schema import LabelSet
from sailer.training.groups import FEWEST, View, group_report, group_section, largest_gap
from sailer.training.metrics import distribution_metrics
from sailer.training.report_plots import plot_groups, plot_risk

TWO = LabelSet(("a", "b"), ("a",))


def view(
    right: list[bool],
    speakers: list[str],
    sex: list[str] | None = None,
    seconds: list[float] | None = None,
    ages: list[float] | None = None,
    votes: list[list[float]] | None = None,
    repeats: int = 300,
) -> View:
    """Clips of the classes a, b, a, b, ... that are decided rightly or not."""
    clips = len(right)
    labels = np.arange(clips) % 2
    decided = np.where(right, labels, 1 - labels)
    rows = Dataset.from_dict(
        {
            "speaker": speakers,
            "sex": sex or [""] * clips,
            "age": ages or [float("nan")] * clips,
            "duration": seconds or [float("nan")] * clips,
        }
    )
    distributions = np.eye(2)[labels] if votes is None else np.array(votes, dtype=float)
    targets = {"consensus": labels, "labels": distributions}
    return View(2.0 * np.eye(2)[decided], targets, rows, TWO, repeats=repeats)


def people(number: int, clips: int, right: int, sex: str) -> tuple[list[bool], list[str], list[str]]:
    """Speakers of whose clips the first ones are decided rightly."""
    names = [f"{sex}{person}" for person in range(number) for _ in range(clips)]
    return [clip < right for _ in range(number) for clip in range(clips)], names, [sex] * (number * clips)


def test_groups_of_every_kind_hold_all_clips() -> None:
    looked = view(
        [True, True, False, True, False, True],
        ["x", "x", "y", "y", "", "z"],
        sex=["male", "male", "female", "female", "", "male"],
        seconds=[1.9, 2.0, 3.9, 4.0, 8.0, float("nan")],
        ages=[29, 30, 44.9, 60, float("nan"), 45],
        votes=[[1, 0], [0.2, 0.8], [0.5, 0.5], [0.4, 0.6], [0.79, 0.21], [np.nan, np.nan]],
    )
    clips = {kind: {row["group"]: row["clips"] for row in looked.groups(kind)} for kind in ("sex", "age", "duration")}
    assert clips["sex"] == {"unknown": 1, "female": 2, "male": 3}
    assert clips["age"] == {
        **{"under 30 years": 1, "30 to 45 years": 2, "45 to 60 years": 1, "60 years or more": 1, "unknown": 1}
    }
    assert clips["duration"] == {"under 2 s": 1, "2 to 4 s": 2, "4 to 8 s": 1, "8 s or more": 1, "unknown": 1}
    agreement = {row["group"]: (row["clips"], row["accuracy"][0]) for row in looked.groups("agreement")}
    assert agreement == {"0.4-0.6": (1, 0), "0.6-0.8": (2, 0.5), "0.8-1.0": (1, 1), "all": (1, 1), "unknown": (1, 1)}
    by_speaker = {row["group"]: row["accuracy"][0] for row in looked.groups("speaker")}
    assert by_speaker == {"unknown": 0, "x": 1, "y": 0.5, "z": 1}
    assert view([True] * 4, [""] * 4).groups("sex") == [] and view([True], [""]).groups("speaker") == []
    assert [row["group"] for row in looked.agreement()] == ["0.4-0.6", "0.6-0.8", "0.8-1.0", "all"]
    assert [row["error"][0] for row in looked.agreement()] == [1, 0.5, 0, 0]


def test_a_group_with_one_clip_or_speaker_has_no_interval_and_says_so() -> None:
    looked = view([True, False, True, True], ["x", "y", "y", "z"], sex=["female", "male", "male", "other"])
    female, male, other = looked.groups("sex")
    assert female["accuracy"] == (1.0, None) and female["note"] == "no interval: one clip" == other["note"]
    assert male["note"] == "no interval: one speaker" and male["accuracy"] == (0.5, None)
    x, y, _ = looked.groups("speaker")
    assert x["note"] == "no interval: one clip" and "note" not in y and y["accuracy"][1] is not None
    assert "| sex: female (no interval: one clip) | 1 | 1 | 1.000 | 1.000 |" in group_section(group_report(looked))
    assert looked.gaps() == [] and "none are compared" in largest_gap([])


def test_the_largest_gap_is_named() -> None:
    parts = [people(4, 8, 7, "female"), people(4, 8, 3, "male"), people(1, 20, 0, "other")]
    right, speakers, sex = (list(chain(*values)) for values in zip(*parts, strict=True))
    looked = view(right, speakers, sex=sex, seconds=[1.0 if index % 4 else 3.0 for index in range(len(right))])
    gaps = {(gap["kind"], gap["figure"]): gap for gap in looked.gaps()}
    found = gaps["sex", "accuracy"]
    assert (found["low"], found["high"]) == ("male", "female"), "one speaker is no group to compare"
    assert found["values"] == [3 / 8, 7 / 8] and found["difference"] == 0.5
    assert (found["clips"], found["speakers"]) == ([32, 32], [4, 4])
    # All speakers of a sex are alike, so that no draw of them has another difference. A few of 300 lack one of them.
    assert found["interval"] == pytest.approx([0.5, 0.5]) and found["p"] == pytest.approx(2 / 301, rel=0.05)
    within = gaps["duration", "accuracy"]
    assert within["difference"] < 0.5 and within["interval"][0] < within["interval"][1]
    assert set(gaps) == {(kind, figure) for kind in ("sex", "duration") for figure in ("macro_f1", "accuracy")}
    sentence = largest_gap(looked.gaps(), "accuracy")
    assert sentence.startswith(
        "The largest gap is by sex: female 0.875, male 0.375 (accuracy; difference 0.500 [0.500, 0.500], 4 and 4 "
        "speakers)."
    )
    assert largest_gap(looked.gaps()).count("macro-F1") == 1
    report = group_report(looked)
    assert set(report["groups"]) == {"sex", "duration", "agreement", "speaker"} and json.dumps(report["gaps"])


def test_speakers_are_compared_by_their_clips() -> None:
    parts = [people(1, 12, 12, "x"), people(1, 12, 3, "y"), people(1, FEWEST - 1, 0, "z")]
    right, speakers, _ = (list(chain(*values)) for values in zip(*parts, strict=True))
    looked = view(right, speakers)
    by_figure = {gap["figure"]: gap for gap in looked.gaps()}
    gap = by_figure["accuracy"]
    assert (gap["kind"], gap["low"], gap["high"]) == ("speaker", "y0", "x0"), "z0 has too few clips"
    low, high = gap["interval"]
    assert low < gap["difference"] == 0.75 < high and low > 0.4 and high <= 1
    assert largest_gap(looked.gaps(), "accuracy").endswith("Between speakers it is from 0.250 (y0) to 1.000 (x0).")


def test_strata_of_the_annotators_entropy() -> None:
    votes = [[1, 0], [0, 1], [0.9, 0.1], [0.5, 0.5], [np.nan, np.nan]]
    looked = view([True, False, True, True, True], ["x", "y", "x", "y", "z"], votes=votes)
    looked.natural = np.full((5, 2), 0.5)
    assert entropy([0.9, 0.1]) < 0.6 < entropy([0.5, 0.5]) < 1
    everything = looked.strata()
    assert [(row["group"], row["clips"]) for row in everything] == [
        *[("all agree", 2), ("up to 0.6 nats", 1), ("up to 1 nats", 1)]
    ]
    expected = distribution_metrics(looked.probabilities[:2], np.eye(2))
    natural = distribution_metrics(looked.natural[:2], np.eye(2))
    for name in ("kl", "js", "ece"):
        assert everything[0][name][0] == pytest.approx(expected[name])
        assert everything[0][f"natural_{name}"][0] == pytest.approx(natural[name])
    assert everything[1]["note"] == "no interval: one clip" and everything[0]["kl"][1] is not None


def test_the_pictures_are_drawn(tmp_path: Path) -> None:
    looked = view([True, False] * 10, [f"s{index % 4}" for index in range(20)], sex=["female", "male"] * 10)
    groups = {"sex": looked.groups("sex")}
    assert plot_groups(groups, tmp_path / "groups.png", "A caption " * 30).stat().st_size > 5000
    bands = [(0.5, float("nan"), float("nan")), (1.0, 0.1, 0.4)]
    path = plot_risk(np.array([0.25, 1.0]), np.array([0.0, 0.3]), bands, tmp_path / "risk.png")
    assert path.read_bytes().startswith(b"\x89PNG")
