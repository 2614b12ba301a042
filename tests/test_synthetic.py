"""The synthetic corpus: the same bytes for the same seed, the challenge's proportions, annotators who disagree."""

import io
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile

from sailer.data import CorpusError, CorpusReport, LabelSet, load_corpus
from sailer.data.labels import consensus
from sailer.data.schema import NO_AGREEMENT, canonical_features
from sailer.data.synthetic import corpus as synthetic_module
from sailer.data.synthetic import espeak as espeak_module
from sailer.data.synthetic.emotions import DEVELOPMENT_COUNTS, EMOTIONS, TRAIN_COUNTS
from sailer.data.synthetic.espeak import Espeak, Voice, espeak

SMALL = {"train_clips": 40, "validation_clips": 12, "test_clips_per_class": 2}


@pytest.fixture(scope="module")
def corpus():
    pytest.importorskip("espeakng_loader")
    return load_corpus("synthetic", **SMALL)


@pytest.fixture(scope="module")
def labels():
    """Enough clips to count, without their audio."""
    return load_corpus("synthetic", audio=False, train_clips=2000, validation_clips=500, test_clips_per_class=20)


def audio_bytes(rows) -> list[bytes]:
    return [audio["bytes"] for audio in rows["audio"]]


def test_same_seed_same_bytes(corpus) -> None:
    espeak().speak("Something else in between.", Voice(sex="female", pitch=180), volume=180, pitch=90)
    again = load_corpus("synthetic", **SMALL)
    for split in corpus:
        assert again[split].data.table.equals(corpus[split].data.table)


def test_other_seed_other_bytes(corpus) -> None:
    other = load_corpus("synthetic", seed=1, **SMALL)
    for split in corpus:
        assert not set(audio_bytes(other[split])) & set(audio_bytes(corpus[split]))
        assert not set(other[split]["id"]) & set(corpus[split]["id"])


def test_a_split_does_not_depend_on_the_others(corpus) -> None:
    alone = load_corpus("synthetic", **SMALL | {"train_clips": 0, "validation_clips": 3})
    assert alone["test"].data.table.equals(corpus["test"].data.table)
    assert "train" not in alone


def test_without_audio_all_else_is_the_same(corpus) -> None:
    columns = [name for name in corpus["train"].column_names if name not in ("audio", "duration")]
    rows = load_corpus("synthetic", audio=False, **SMALL)["train"]
    assert rows.select_columns(columns).to_dict() == corpus["train"].select_columns(columns).to_dict()
    assert rows[0]["audio"] == {"path": None, "bytes": None}


def test_canonical_rows_and_audio(corpus) -> None:
    for rows in corpus.values():
        assert rows.features == canonical_features()
        for row in rows:
            samples, sampling_rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")
            assert sampling_rate == 22050
            assert samples.ndim == 1
            assert row["duration"] == pytest.approx(len(samples) / sampling_rate)
            assert 0.5 < row["duration"] < 6
            assert np.abs(samples).max() > 1000
            assert row["transcript"]
            assert 20 <= row["age"] < 70
            assert all(0 <= value <= 1 for value in row["attributes"])
            assert sum(row["secondary_votes"]) >= sum(row["votes"]) >= 5


@pytest.mark.parametrize(("split", "counts"), [("train", TRAIN_COUNTS), ("validation", DEVELOPMENT_COUNTS)])
def test_challenge_proportions(labels, split: str, counts: dict) -> None:
    found = Counter(labels[split]["label"])
    for label, count in counts.items():
        wanted = len(labels[split]) * count / sum(counts.values())
        assert abs(found[NO_AGREEMENT if label is None else LabelSet().index(label)] - wanted) < 1
    assert found[NO_AGREEMENT] / len(labels[split]) == pytest.approx(0.19, abs=0.01)


def test_paper_counts() -> None:
    assert sum(TRAIN_COUNTS.values()) == 84044
    assert sum(DEVELOPMENT_COUNTS.values()) == 31961


def test_test_split_is_balanced(labels) -> None:
    assert Counter(labels["test"]["label"]) == {LabelSet().index(label): 20 for label in LabelSet().scored}


def test_label_is_the_plurality_of_the_votes(labels) -> None:
    for rows in labels.values():
        np.testing.assert_array_equal(consensus(np.asarray(rows["votes"])), rows["label"])


def test_annotators(labels) -> None:
    assert {sum(votes) for votes in labels["train"]["votes"]} == {5, 6, 7}
    many = load_corpus("synthetic", audio=False, annotators=9, **SMALL)
    assert {sum(votes) for votes in many["train"]["votes"]} == {9, 10, 11}
    # They see what others see: each class gets most of its mistaken votes from where the table says.
    votes, found = np.asarray(labels["train"]["votes"]), np.asarray(labels["train"]["label"])
    mistaken = votes[found == LabelSet().index("Happy")].sum(axis=0)
    mistaken[LabelSet().index("Happy")] = 0
    assert LabelSet().labels[mistaken.argmax()] == "Neutral"


def test_a_fifth_disagrees_by_nature(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share without agreement is not forced on annotators who would not reach it: left alone they nearly do."""
    outcomes = []

    def accept_anything(votes: np.ndarray) -> np.ndarray:
        outcomes.append(int(consensus(votes)[0]))
        return np.array([LabelSet().index("Neutral")])

    monkeypatch.setattr(synthetic_module, "consensus", accept_anything)
    shares, rng = np.full(9, 1 / 9), np.random.default_rng(0)
    for _ in range(1500):
        synthetic_module._draw_clip("Neutral", LabelSet(), shares, 5, rng)
    assert np.mean(np.array(outcomes) == NO_AGREEMENT) == pytest.approx(0.2, abs=0.05)


def test_speakers(labels) -> None:
    voices = {split: set(rows["speaker"]) for split, rows in labels.items()}
    assert {split: len(names) for split, names in voices.items()} == {"train": 16, "validation": 4, "test": 4}
    assert len(set.union(*voices.values())) == 24
    for rows in labels.values():
        assert set(rows["sex"]) == {"female", "male"}
        people = set(zip(rows["speaker"], rows["sex"], rows["age"], strict=True))
        assert len(people) == len(set(rows["speaker"]))


def test_speech_and_ratings_follow_the_emotion() -> None:
    pytest.importorskip("espeakng_loader")
    options = {"train_clips": 0, "validation_clips": 0, "test_clips_per_class": 12}
    rows = load_corpus("synthetic", emotional_text=0, **options)["test"]

    def mean(values: list[float], label: str) -> float:
        return float(np.mean(np.asarray(values)[np.asarray(rows["label"]) == LabelSet().index(label)]))

    loudness = [float(np.std(soundfile.read(io.BytesIO(data))[0])) for data in audio_bytes(rows)]
    seconds_per_word = [d / len(t.split()) for d, t in zip(rows["duration"], rows["transcript"], strict=True)]
    valence = [attributes[1] for attributes in rows["attributes"]]
    assert mean(loudness, "Angry") > 1.5 * mean(loudness, "Sad")
    assert mean(seconds_per_word, "Sad") > 1.3 * mean(seconds_per_word, "Fear")
    assert mean(valence, "Happy") > mean(valence, "Neutral") + 0.1 > mean(valence, "Disgust") + 0.2


def test_words_partly_carry_the_emotion() -> None:
    options = {"audio": False, "train_clips": 400}
    emotional = {sentence for emotion in EMOTIONS.values() for sentence in emotion.sentences}
    for share in (0, 0.6, 1):
        words = load_corpus("synthetic", emotional_text=share, **options)["train"]["transcript"]
        assert np.mean([text in emotional for text in words]) == pytest.approx(share, abs=0.07)


def test_other_label_set() -> None:
    four = LabelSet(("Angry", "Happy", "Neutral", "Sad"))
    report = CorpusReport()
    found = load_corpus("synthetic", label_set=four, audio=False, report=report, **SMALL)
    assert np.asarray(found["train"]["votes"]).shape == (40, 4)
    assert set(found["train"]["label"]) == {-1, 0, 1, 2, 3}
    assert Counter(found["test"]["label"]) == dict.fromkeys(range(4), 2)
    with pytest.raises(CorpusError, match=r"no voice for \['Boredom'\] of the label set"):
        load_corpus("synthetic", label_set=LabelSet(("Angry", "Boredom"), majority=()), audio=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_clips": -1}, "train_clips=-1 is not a whole number of at least 0"),
        ({"annotators": 1}, "annotators=1 is not a whole number of at least 2"),
        ({"speakers": 2}, "speakers=2 is not a whole number of at least 3"),
        ({"validation_clips": "many"}, "validation_clips='many' is not a whole number"),
        ({"emotional_text": 2}, "emotional_text=2 is not between 0 and 1"),
    ],
)
def test_impossible_options(options: dict, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        load_corpus("synthetic", audio=False, **options)


def test_missing_espeak_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(synthetic_module, "espeak", Espeak)
    with pytest.raises(ImportError, match=r"pip install sailer\[demo\]"):
        load_corpus("synthetic", **SMALL)
    assert load_corpus("synthetic", audio=False, **SMALL)


def test_same_call_same_samples_in_any_order() -> None:
    pytest.importorskip("espeakng_loader")
    rng = np.random.default_rng(0)
    calls = [
        (text, Voice(accent, sex, pitch), {"rate": rate, "volume": volume, "pitch": shift, "pitch_range": shift})
        for text in ("Who is there?", "She sells sea shells, on the shore!")
        for accent in synthetic_module.ACCENTS
        for sex, pitch in (("female", 160), ("male", 80))
        for rate, volume, shift in ((120, 40, 5), (175, 100, 50), (260, 190, 95))
    ]
    first = [espeak().speak(text, voice, **settings).tobytes() for text, voice, settings in calls]
    assert len(set(first)) == len(calls)
    for index in rng.permutation(np.repeat(np.arange(len(calls)), 3)):
        text, voice, settings = calls[index]
        assert espeak().speak(text, voice, **settings).tobytes() == first[index]


def test_espeak_names_what_it_refuses() -> None:
    pytest.importorskip("espeakng_loader")
    with pytest.raises(ValueError, match=r"the voice.*klingon"):
        espeak().speak("Hello.", Voice("klingon"))
    assert espeak_module.espeak() is espeak()
