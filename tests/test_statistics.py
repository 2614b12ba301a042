"""What `sailer data` prints of a corpus, by hand-computed numbers, and the folder that it writes."""

import numpy as np
import pytest
from datasets import load_from_disk

from sailer.data import CorpusError, CorpusReport, LabelSet, load_corpus
from sailer.data.schema import PRIMARY_LABELS, build_dataset
from sailer.data.statistics import class_counts, describe, plot, save, shared_speakers

ANGRY, HAPPY, SAD = (PRIMARY_LABELS.index(name) for name in ("Angry", "Happy", "Sad"))


def votes(**counts):
    return [counts.get(label, 0) for label in PRIMARY_LABELS]


@pytest.fixture
def corpus():
    train = {
        "id": ["a", "b", "c"],
        "duration": [1800.0, 3600.0, 5.0],
        "transcript": ["one", "", "three"],
        "votes": [votes(Happy=3, Sad=1), votes(Sad=2, Angry=2), votes()],
        "secondary_votes": np.eye(17)[[0, 1, 2]] * [[1], [0], [0]],
        "attributes": [[0.5, 0.5, 0.5], [0.5, np.nan, 0.5], [np.nan] * 3],
        "label": [HAPPY, -1, SAD],
        "speaker": ["s1", "s2", ""],
    }
    test = {"id": ["d"], "votes": [votes(Angry=6)], "label": [ANGRY], "speaker": ["s2"]}
    return {"train": build_dataset(train), "test1": build_dataset(test)}


def lines(text):
    """First words of a line -> its numbers."""
    table = {}
    for line in text.splitlines():
        name, *cells = [cell for cell in line.split("  ") if cell.strip()] or [""]
        table.setdefault(name.strip(), [cell.strip() for cell in cells])
    return table


def test_table_of_classes_and_splits(corpus):
    table = lines(describe(corpus))
    assert table["train"] == ["test1", "all"]
    assert (table["Angry"], table["Happy"], table["Sad"]) == (["0", "1", "1"], ["1", "0", "1"], ["1", "0", "1"])
    assert table["No agreement"] == ["1", "0", "1"] and table["All"] == ["3", "1", "4"]
    assert "Unlabelled" not in table


def test_facts_by_hand(corpus):
    table = lines(describe(corpus, machine_made={"train": 1}))
    assert table["Hours"] == ["1.50", "-", "1.50 + 1 clips"]
    assert table["Clips with votes"] == ["66.7 %", "100.0 %", "75.0 %"]
    assert table["Annotators per clip (range)"] == ["4.00 (4-4)", "6.00 (6-6)", "4.67 (4-6)"]
    # Shares of the first class: 3/4, 2/4 and 6/6.
    assert table["Agreement: share of first class"] == ["0.625", "1.000", "0.750"]
    quarters = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert table["Entropy of votes (nats)"] == [
        f"{np.mean(values):.3f}" for values in ([quarters, np.log(2)], [0.0], [quarters, np.log(2), 0.0])
    ]
    assert table["Clips with secondary votes"] == ["33.3 %", "0.0 %", "25.0 %"]
    assert table["Clips with attributes"] == ["33.3 %", "0.0 %", "25.0 %"]
    assert table["Speakers"] == ["2", "1", "2"] and table["Clips with speaker"] == ["66.7 %", "100.0 %", "75.0 %"]
    assert table["Clips with transcript"] == ["66.7 %", "0.0 %", "50.0 %"]
    assert table["of them machine-made"] == ["1", "0", "1"]


def test_shared_speakers_are_named(corpus):
    assert shared_speakers(corpus) == {("train", "test1"): ["s2"]}
    assert "WARNING: train and test1 share 1 speakers: s2" in describe(corpus)
    many = {
        split: build_dataset({"id": list("abcdefghijkl"), "speaker": list("abcdefghijkl")}) for split in ("x", "y")
    }
    assert "WARNING: x and y share 12 speakers: a, b, c, d, e, f, g, h, i, j, ..." in describe(many)
    assert "WARNING" not in describe({"train": corpus["train"]})


def test_what_was_left_out_is_said(corpus):
    report = CorpusReport()
    assert "Nothing was left out." in describe(corpus, report=report)
    for clip in "vwxyz":
        report.leave_out("audio file truncated", clip)
    report.note("emoVote differs.")
    text = describe(corpus, report=report)
    assert "left out 5: audio file truncated (v, w, x, ...)" in text and "emoVote differs." in text


def test_unlabelled_clips_and_other_label_sets():
    four = LabelSet(("Neutral", "Happy", "Sad", "Angry"), majority=("Neutral",))
    rows = {"test": build_dataset({"id": ["a", "b"], "label": [-100, 1]}, four)}
    assert class_counts(rows, four)["test"] == {
        **{"Neutral": 0, "Happy": 1, "Sad": 0, "Angry": 0, "No agreement": 0, "Unlabelled": 1}
    }
    table = lines(describe(rows, four))
    assert table["Unlabelled"] == ["1"] and table["Fleiss' kappa"] == ["-"] and table["Hours"] == ["-"]


def test_saved_rows_load_again(tmp_path, corpus):
    output = save(corpus, tmp_path / "out")
    assert set(load_from_disk(output)) == {"train", "test1"}
    loaded = load_corpus("hub", output, audio=False)
    for split, rows in corpus.items():
        np.testing.assert_equal(loaded[split][:], rows[:])
    assert (output / "statistics.txt").read_text() == describe(corpus) + "\n"
    assert (output / "distributions.png").read_bytes().startswith(b"\x89PNG")
    assert not [entry for entry in tmp_path.iterdir() if entry != output]
    with pytest.raises(CorpusError, match="was written with the labels"):
        load_corpus("hub", output, label_set=LabelSet(tuple(reversed(PRIMARY_LABELS))))


def test_a_folder_is_replaced_whole_and_only_if_it_is_ours(tmp_path, corpus):
    output = save(corpus, tmp_path / "out")
    (output / "machine_transcripts.jsonl").write_text("{}\n")
    # The rows that are written may be those that the folder holds.
    save({"train": load_corpus("hub", output, audio=False)["train"]}, output)
    assert set(load_from_disk(output)) == {"train"} and not (output / "test1").exists()
    assert (output / "machine_transcripts.jsonl").is_file()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(CorpusError, match=r"holds other files \(chapter.tex, ...\)"):
        save(corpus, tmp_path / "thesis")
    with pytest.raises(CorpusError, match="is a file"):
        save(corpus, tmp_path / "thesis" / "chapter.tex")
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_nothing_is_left_behind_when_saving_fails(tmp_path, corpus, monkeypatch):
    output = save(corpus, tmp_path / "out")
    monkeypatch.setattr("sailer.data.statistics.plot", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save({"train": corpus["train"]}, output)
    assert set(load_from_disk(output)) == {"train", "test1"} and list(tmp_path.iterdir()) == [output]


def test_the_picture_has_a_bar_for_every_class_and_split(tmp_path, corpus, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot(corpus, tmp_path / "picture.png")
    clips, ballots = figures[0].axes
    assert [bar.get_width() for bar in clips.containers[0]] == pytest.approx(
        [0, 0, 0, 0, 1 / 3, 0, 1 / 3, 0, 0, 1 / 3]
    )
    assert [bar.get_width() for bar in ballots.containers[0]] == pytest.approx([2 / 8, 0, 0, 0, 3 / 8, 0, 3 / 8, 0, 0])
    assert [text.get_text() for text in ballots.get_legend().get_texts()] == ["train (8 votes)", "test1 (6 votes)"]
