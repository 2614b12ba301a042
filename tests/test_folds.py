"""Folds from a file: who trains and who tests, and what is refused by name."""

import json
from pathlib import Path

import pytest

from sailer.data.folds import Fold, fold_rows, read_folds
from sailer.data.schema import CorpusError, CorpusReport

IDS = ["a1", "a2", "b1", "c1", "c2"]
SPEAKERS = ["anna", "anna", "bert", "carl", "carl"]


def rows(folds: dict, speakers: list[str] = SPEAKERS, **options: bool) -> tuple[dict[str, Fold], CorpusReport]:
    report = CorpusReport()
    return fold_rows(folds, IDS, speakers, report, **options), report


def write(folder: Path, content: object) -> Path:
    path = folder / "folds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_fold_tests_its_clips_and_the_others_folds_train(tmp_path):
    folds = read_folds(write(tmp_path, {"1": ["a2", "a1"], "2": ["b1"], "3": ["c1"]}))
    found, report = rows(folds)
    assert found == {"1": Fold([2, 3], [1, 0]), "2": Fold([1, 0, 3], [2]), "3": Fold([1, 0, 2], [3])}
    assert report.left_out == {"it is in no fold": ["c2"]}


def test_a_fold_may_list_both_sides(tmp_path):
    folds = read_folds(write(tmp_path, {"only": {"train": ["a1", "b1"], "test": ["c2"]}}))
    found, report = rows(folds)
    assert found == {"only": Fold([0, 2], [4])}
    assert report.left_out == {"it is in no fold": ["a2", "c1"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ([], "holds no folds"),
        ({}, "holds no folds"),
        ({"1": []}, "Fold '1'"),
        ({"1": [7]}, "Fold '1'"),
        ({"1": {"train": ["a1"], "test": []}}, "Fold '1'"),
        ({"1": {"train": ["a1"], "dev": ["a2"]}}, "Fold '1'"),
        ({"1": ["a1"], "2": {"train": ["a1"], "test": ["b1"]}}, "both forms"),
    ],
)
def test_a_file_of_another_form_is_refused_by_its_name(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(CorpusError, match=message) as error:
        read_folds(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ({"1": ["a1", "a2"], "2": ["b1", "b9"]}, r"1 clips that the corpus lacks, b9 \(the first in fold '2'\)"),
        ({"1": ["a1"], "2": ["a2", "b1"]}, "Fold '1' has the same speakers on both sides, anna"),
        ({"1": ["a1", "a2"], "2": ["b1", "a1"]}, "'a1' is in folds '1' and '2'"),
        ({"1": ["a1", "a1"], "2": ["b1"]}, "Fold '1' names a1 twice"),
        ({"1": ["a1"]}, "nothing to train on"),
        ({"1": {"train": ["a1", "b1"], "test": ["b1"]}}, "names b1 twice"),
        ({"1": {"train": ["a1"], "test": ["a2"]}}, "same speakers on both sides, anna"),
    ],
)
def test_unknown_clips_and_shared_speakers_are_refused(folds, message):
    with pytest.raises(CorpusError, match=message):
        rows(folds)


def test_what_is_not_at_hand_is_left_out_and_said_where_that_is_allowed():
    folds = {"1": ["a1", "x1"], "2": ["b1"], "3": ["x2", "x3"]}
    found, report = rows(folds, allow_missing=True)
    assert found == {"1": Fold([2], [0]), "2": Fold([0], [2])}
    assert report.left_out == {
        "the folds name it and the corpus lacks it": ["x1", "x2", "x3"],
        "a fold without clips to test": ["3"],
        "it is in no fold": ["a2", "c1", "c2"],
    }
    with pytest.raises(CorpusError, match="No fold has clips"):
        rows({"1": ["x1"], "2": ["x2"]}, allow_missing=True)


def test_shared_and_unknown_speakers_are_noted_where_that_is_allowed():
    found, report = rows({"1": ["a1"], "2": ["a2", "b1"]}, allow_shared_speakers=True)
    assert found["1"] == Fold([1, 2], [0])
    assert "1 speakers on both sides: anna" in report.notes[0]
    _, report = rows({"1": ["a1"], "2": ["b1"]}, speakers=["", "", "bert", "", ""])
    assert report.notes == ["Fold '1' has clips of unknown speakers: that they are new cannot be checked."]
