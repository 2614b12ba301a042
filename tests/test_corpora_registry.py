"""Corpora by name: what `load_corpus` finds, hands over and refuses."""

import dataclasses
import inspect
import logging
from pathlib import Path

import numpy as np
import pytest

from sailer.data import CorpusError, CorpusReport, LabelSet, corpora, load_corpus
from sailer.data.corpora import COMMON_ARGUMENTS, _loader, corpus_names, corpus_options, label_indices

SMALL = {"audio": False, "train_clips": 12, "validation_clips": 6, "test_clips_per_class": 1}


@pytest.mark.parametrize("name", corpus_names())
def test_every_loader_takes_what_it_is_given(name: str) -> None:
    loader = _loader(name)
    kinds = {name: parameter.kind for name, parameter in inspect.signature(loader.load).parameters.items()}
    assert set(COMMON_ARGUMENTS) <= set(kinds)
    shared = dataclasses.fields(loader.shared_options) if loader.shared_options else ()
    own = set(corpus_options(name)) - {option.name for option in shared}
    assert {kinds[option] for option in own} == {inspect.Parameter.KEYWORD_ONLY}
    assert bool(shared) == (inspect.Parameter.VAR_KEYWORD in kinds.values())


def test_options_of_several_loaders_are_known_to_each() -> None:
    shared = {"columns": None, "attribute_scale": (1, 7), "minimum_seconds": 0.0}
    assert shared.items() <= corpus_options("manifest").items()
    assert shared.items() <= corpus_options("hub").items()
    assert set(corpus_options("manifest")) - set(corpus_options("hub")) == {"delimiter"}
    assert set(corpus_options("hub")) - set(corpus_options("manifest")) == {"subset", "revision", "streamed"}


def test_helper_modules_are_no_corpora() -> None:
    assert {"ravdess", "synthetic"} <= set(corpus_names())
    assert "audio_files" not in corpus_names()


def test_a_loader_of_ones_own_is_registered_and_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sailer.data.corpora._REGISTERED", {**corpora._REGISTERED})

    @corpora.corpus("mine", reads_folder=False)
    def load(path, *, label_set, audio, strict, report, clips: int = 2):
        votes = np.eye(len(label_set.labels))[[0] * clips]
        return {"train": {"id": [f"clip{number}" for number in range(clips)], "votes": votes, "label": [0] * clips}}

    assert "mine" in corpus_names() and corpus_options("mine") == {"clips": 2}
    assert load_corpus("mine", audio=False, clips=3)["train"]["id"] == ["clip0", "clip1", "clip2"]
    with pytest.raises(ValueError, match=r"Corpus 'ravdess' is sailer\.data\.corpora\.ravdess already"):
        corpora.corpus("ravdess")(load)


def test_unknown_corpus_names_the_nearest() -> None:
    with pytest.raises(CorpusError, match=r"Unknown corpus 'ravdes' \(did you mean 'ravdess'\?\)"):
        load_corpus("ravdes", "somewhere")


def test_unknown_option_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"'ravdess' has no option 'test_actor' \(did you mean 'test_actors'\?\)"):
        load_corpus("ravdess", tmp_path, test_actor=[1])


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "none"])
def test_folder_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    if kind == "file":
        path.write_text("not a folder")
    elif kind == "empty":
        path.mkdir()
    words = {"missing": "does not exist", "file": "is a file", "empty": "is empty", "none": "give its path"}[kind]
    with pytest.raises(CorpusError, match=words) as caught:
        load_corpus("ravdess", None if kind == "none" else path)
    assert kind == "none" or str(path) in str(caught.value)


def test_empty_splits_are_not_in_the_result() -> None:
    assert set(load_corpus("synthetic", **SMALL | {"validation_clips": 0})) == {"train", "test"}
    nothing = {"train_clips": 0, "validation_clips": 0, "test_clips_per_class": 0}
    with pytest.raises(CorpusError, match="gave no clips"):
        load_corpus("synthetic", **SMALL | nothing)


def test_report_is_filled_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    report = CorpusReport()
    with caplog.at_level(logging.INFO):
        load_corpus("synthetic", report=report, **SMALL)
    assert any("simulated annotators" in note for note in report.notes)
    assert any("simulated annotators" in record.getMessage() for record in caplog.records)


def test_emotions_outside_the_label_set() -> None:
    report = CorpusReport()
    with_other, without = LabelSet(("Happy", "Other"), majority=()), LabelSet(("Happy", "Sad"), majority=())
    assert label_indices(["Happy", "Fear"], with_other, report) == {"Happy": 0, "Fear": 1}
    assert report.notes == ["Fear: not in the label set ['Happy', 'Other'], counted as Other."]
    assert label_indices(["Sad", "Fear"], without, CorpusReport()) == {"Sad": 1, "Fear": None}
