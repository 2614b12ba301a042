"""RAVDESS: labels from file names, splits by actor, everything else counted; the real clips where they are there."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer.data import CorpusError, CorpusReport, LabelSet, load_corpus

TOY_SPLITS = {"train_actors": [1, 2], "validation_actors": "3", "test_actors": [4]}
EIGHT = tuple(f"{emotion:02d}" for emotion in range(1, 9))


def write_clip(folder: Path, name: str, seconds: float = 0.3, sampling_rate: int = 48000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    # Every name has its own noise, so that no two clips are the same recording.
    rng = np.random.default_rng(int("".join(filter(str.isdigit, name.rsplit(".", 1)[0]))))
    path = folder / name
    soundfile.write(
        path, rng.uniform(-0.1, 0.1, round(seconds * sampling_rate)), sampling_rate, format=path.suffix[1:]
    )
    return path


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Four actors, each with one clip of the eight emotions, as released: 48 kHz WAV."""
    folder = tmp_path / "ravdess"
    for actor in range(1, 5):
        for emotion in EIGHT:
            write_clip(folder / f"Actor_{actor:02d}", f"03-01-{emotion}-01-02-01-{actor:02d}.wav")
    return folder


def test_row_of_a_clip(toy: Path) -> None:
    corpus = load_corpus("ravdess", toy, **TOY_SPLITS)
    assert {split: len(rows) for split, rows in corpus.items()} == {"train": 16, "validation": 8, "test": 8}
    row = next(row for row in corpus["train"] if row["id"] == "03-01-06-01-02-01-02")
    assert row["audio"] == {"path": str(toy / "Actor_02" / "03-01-06-01-02-01-02.wav"), "bytes": None}
    assert row["duration"] == pytest.approx(0.3)
    assert row["transcript"] == "Dogs are sitting by the door"
    assert row["votes"] == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert row["label"] == 3
    assert (row["speaker"], row["sex"]) == ("ravdess-02", "female")
    assert row["secondary_votes"] == [0] * 17
    assert np.isnan([*row["attributes"], row["age"]]).all()
    assert set(corpus["validation"]["sex"]) == {"male"}


def test_emotion_codes_and_statements(toy: Path) -> None:
    write_clip(toy / "Actor_01", "03-01-01-01-01-01-01.wav")
    rows = load_corpus("ravdess", toy, **TOY_SPLITS)["train"]
    names = [LabelSet().labels[label] for label in rows["label"]]
    labels = {row_id: name for row_id, name in zip(rows["id"], names, strict=True) if row_id.endswith("02-01-01")}
    emotions = ["Neutral", "Neutral", "Happy", "Sad", "Angry", "Fear", "Disgust", "Surprise"]
    assert [labels[f"03-01-{code}-01-02-01-01"] for code in EIGHT] == emotions
    assert (
        dict(zip(rows["id"], rows["transcript"], strict=True))["03-01-01-01-01-01-01"]
        == "Kids are talking by the door"
    )


def test_nested_folders_upper_case_and_ogg(tmp_path: Path) -> None:
    write_clip(tmp_path / "Audio_Speech_Actors_01-24" / "Actor_01", "03-01-03-01-01-01-01.WAV")
    write_clip(tmp_path / "Actor_17", "03-01-04-01-01-01-17.ogg", sampling_rate=16000)
    corpus = load_corpus("ravdess", tmp_path)
    assert corpus["train"]["id"] == ["03-01-03-01-01-01-01"]
    assert corpus["validation"]["id"] == ["03-01-04-01-01-01-17"]


def test_what_is_left_out_is_counted(toy: Path) -> None:
    write_clip(toy / "Actor_01", "03-02-03-01-01-01-01.wav")  # a song
    (toy / "Actor_01" / "02-01-03-01-01-01-01.mp4").write_bytes(b"video")
    (toy / "Actor_01" / "01-01-03-01-01-01-01.mp4").write_bytes(b"video")
    write_clip(toy / "Audio_Speech_Actors_01-24" / "Actor_02", "03-01-03-01-02-01-02.wav")  # there already
    (toy / "Actor_01" / "._03-01-03-01-01-01-01.wav").write_bytes(b"resource fork")
    (toy / "readme.txt").write_text("notes")
    report = CorpusReport()
    corpus = load_corpus("ravdess", toy, report=report, **TOY_SPLITS | {"test_actors": [20]})
    assert sum(map(len, corpus.values())) == 24
    assert {reason: len(items) for reason, items in report.left_out.items()} == {
        "song (channel 02)": 1,
        "video (only modality 03 is audio alone)": 2,
        "further copy of a clip": 1,
        "its actor is in no split": 8,
    }
    assert any("No clips of actors [20]" in note for note in report.notes)


def test_same_recording_twice_is_noted(toy: Path) -> None:
    first = toy / "Actor_01" / "03-01-03-01-02-01-01.wav"
    first.with_name("03-01-03-01-02-02-01.wav").write_bytes(first.read_bytes())
    report = CorpusReport()
    corpus = load_corpus("ravdess", toy, report=report, **TOY_SPLITS)
    assert report.notes == ["03-01-03-01-02-01-01 and 03-01-03-01-02-02-01 are the same recording; both are kept."]
    assert len(corpus["train"]) == 17


def test_labels_alone(toy: Path) -> None:
    for path in toy.rglob("*.wav"):
        path.write_bytes(b"")
    rows = load_corpus("ravdess", toy, audio=False, **TOY_SPLITS)["train"]
    assert rows[0]["audio"] == {"path": None, "bytes": None}
    assert np.isnan(rows[0]["duration"])
    assert Counter(rows["label"])[LabelSet().index("Neutral")] == 4


def test_other_label_sets(toy: Path) -> None:
    with_other = LabelSet(("Calm", "Happy", "Other"), majority=("Happy",))
    rows = load_corpus("ravdess", toy, label_set=with_other, **TOY_SPLITS)["test"]
    assert Counter(rows["label"]) == {0: 1, 1: 1, 2: 6}
    assert np.asarray(rows["votes"]).shape == (8, 3)

    four = LabelSet(("Angry", "Happy", "Neutral", "Sad"))
    with pytest.raises(CorpusError, match=r"is Fear, which is not in the label set .*Add 'Other'"):
        load_corpus("ravdess", toy, label_set=four, **TOY_SPLITS)
    report = CorpusReport()
    rows = load_corpus("ravdess", toy, label_set=four, strict=False, report=report, **TOY_SPLITS)["test"]
    assert Counter(rows["label"]) == {0: 1, 1: 1, 2: 2, 3: 1}
    assert len(report.left_out["Disgust is not in the label set"]) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_actors": "1-3"}, "Actor 3 is in both train_actors and validation_actors"),
        ({"test_actors": [25]}, r"test_actors names actors \[25\]; RAVDESS has actors 1 to 24"),
        ({"test_actors": "four"}, "test_actors='four' is not a list of actor numbers"),
        ({"test_actors": 3.5}, "test_actors=3.5 is not a list of actor numbers"),
    ],
)
def test_impossible_actors(toy: Path, options: dict, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        load_corpus("ravdess", toy, **TOY_SPLITS | options)


def test_actors_as_text(toy: Path) -> None:
    corpus = load_corpus("ravdess", toy, train_actors="1-2,4", validation_actors=3, test_actors=[])
    assert {split: len(rows) for split, rows in corpus.items()} == {"train": 24, "validation": 8}


def test_folder_without_speech(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(CorpusError, match="No RAVDESS speech") as caught:
        load_corpus("ravdess", tmp_path)
    assert str(tmp_path) in str(caught.value)
    write_clip(tmp_path, "03-02-03-01-01-01-01.wav")
    with pytest.raises(CorpusError, match=r"left out 1: song .*Audio_Speech_Actors_01-24\.zip"):
        load_corpus("ravdess", tmp_path)


def test_no_actor_of_any_split(toy: Path) -> None:
    with pytest.raises(CorpusError, match=r"gave no clips\. left out 32: its actor is in no split"):
        load_corpus("ravdess", toy, train_actors=[21], validation_actors=[22], test_actors=[23])


@pytest.mark.parametrize("how", ["zero-length", "not readable as audio", "shorter than the minimum of 0.1 s"])
def test_bad_file_is_refused_or_counted(toy: Path, how: str) -> None:
    bad = toy / "Actor_01" / "03-01-05-01-02-01-01.wav"
    if how == "shorter than the minimum of 0.1 s":
        write_clip(bad.parent, bad.name, seconds=0.01)
    else:
        bad.write_bytes(b"" if how == "zero-length" else b"RIFFnothing")
    with pytest.raises(CorpusError, match=how) as caught:
        load_corpus("ravdess", toy, **TOY_SPLITS)
    assert str(bad) in str(caught.value)
    report = CorpusReport()
    rows = load_corpus("ravdess", toy, strict=False, report=report, **TOY_SPLITS)["train"]
    assert len(rows) == 15
    assert bad.stem not in rows["id"]
    assert list(report.left_out.values()) == [[str(bad)]]


def test_audio_with_another_name(toy: Path) -> None:
    stray = write_clip(toy, "take1.wav")
    with pytest.raises(CorpusError, match="does not have a RAVDESS file name") as caught:
        load_corpus("ravdess", toy, **TOY_SPLITS)
    assert str(stray) in str(caught.value)
    report = CorpusReport()
    load_corpus("ravdess", toy, strict=False, report=report, **TOY_SPLITS)
    assert report.left_out == {"not a RAVDESS file name": [str(stray)]}


def test_real_clips(shared: Path) -> None:
    report = CorpusReport()
    corpus = load_corpus("ravdess", shared / "corpora" / "ravdess", report=report)
    assert {split: len(rows) for split, rows in corpus.items()} == {"train": 960, "validation": 120, "test": 120}
    for split, actors in (("train", 16), ("validation", 2), ("test", 2)):
        names = Counter(LabelSet().labels[label] for label in corpus[split]["label"])
        others = dict.fromkeys(("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise"), 8 * actors)
        assert names == {"Neutral": 12 * actors, **others}
    assert report.left_out == {}
    assert report.notes == ["03-01-03-01-02-01-07 and 03-01-03-01-02-02-07 are the same recording; both are kept."]
    assert np.mean(corpus["train"]["duration"]) == pytest.approx(3.7, abs=0.1)
