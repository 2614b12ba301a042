"""EMO-DB in its released layout: file-name codes, listeners' shares and where the rest of the mass goes."""

import numpy as np
import pytest
import soundfile

from sailer.data import CorpusError, CorpusReport, LabelSet, load_corpus
from sailer.data.schema import PRIMARY_LABELS

CLIPS = ("03a01Fa", "08a02La", "12b01Na", "16b10Tb", "03a05Wa")
# Latin-1, decimal commas, a no-break space and a clip that was rated but not released.
RATINGS = "Satz\terkannt\tnatürlich\n03a01Fa.wav\t90,00\xa0\t80,00\n08a02La.wav 85,00 70,00\n" + (
    "12b01Na.wav\t100,00\t95,00\n16b10Tb.wav\t70,00\t60,00\n03a05Wa.wav\t100\t90\n03a04Ab.wav\t50,00\t10,00\n"
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "wav").mkdir()
    for clip in CLIPS:
        soundfile.write(tmp_path / "wav" / f"{clip}.wav", np.zeros(16000), 16000)
    (tmp_path / "erkennung.txt").write_bytes(RATINGS.replace("\n", "\r\n").encode("latin-1"))
    return tmp_path


def load(root, **options):
    report = CorpusReport()
    datasets = load_corpus("emo_db", root, report=report, **options)
    return {row["id"]: {**row, "split": split} for split, rows in datasets.items() for row in rows}, report


def votes(**counts):
    return pytest.approx([float(counts.get(label, 0)) for label in PRIMARY_LABELS], abs=1e-5)


def test_names_give_actor_sentence_and_emotion(root):
    rows, report = load(root)
    assert {clip: row["split"] for clip, row in rows.items()} == dict(
        zip(CLIPS, ("train", "train", "validation", "test", "train"), strict=True)
    )
    happy, bored = rows["03a01Fa"], rows["08a02La"]
    assert happy["label"] == PRIMARY_LABELS.index("Happy") and bored["label"] == PRIMARY_LABELS.index("Other")
    assert happy["transcript"] == "Der Lappen liegt auf dem Eisschrank."
    assert rows["12b01Na"]["transcript"] == "Was sind denn das für Tüten, die da unter dem Tisch stehen?"
    assert (happy["speaker"], happy["sex"], happy["age"], happy["duration"]) == ("emo-db-03", "male", 31, 1)
    assert not report.left_out
    assert any("rates 1 more clips than there are recordings" in note for note in report.notes)
    assert any("Bored" in note and "Other" in note for note in report.notes)


def test_the_rest_of_the_votes_is_spread_over_the_corpus_other_emotions(root):
    rows, _ = load(root)
    third = 2 / 6
    assert rows["03a01Fa"]["votes"] == votes(
        Happy=18, Angry=third, Disgust=third, Fear=third, Sad=third, Neutral=third, Other=third
    )
    # Of a bored clip the six others are all but boredom, which is Other.
    half = 3 / 6
    expected = votes(Other=17, Angry=half, Disgust=half, Fear=half, Happy=half, Sad=half, Neutral=half)
    assert rows["08a02La"]["votes"] == expected
    assert rows["12b01Na"]["votes"] == votes(Neutral=20)


def test_other_ways_to_spread(root):
    assert load(root, spread="other")[0]["03a01Fa"]["votes"] == votes(Happy=18, Other=2)
    assert load(root, spread="other")[0]["08a02La"]["votes"] == votes(Other=20)
    assert load(root, spread="none")[0]["03a01Fa"]["votes"] == votes(Happy=18)
    with pytest.raises(CorpusError, match=r"spread='all': it is one of \['uniform', 'other', 'none'\]"):
        load(root, spread="all")


def test_shares_from_0_to_1(root):
    (root / "erkennung.txt").write_text("Satz erkannt\n03a01Fa.wav 0,9\n03a05Wa.wav 1,0\n")
    rows, report = load(root, spread="none")
    assert rows["03a01Fa"]["votes"] == votes(Happy=18) and rows["03a05Wa"]["votes"] == votes(Angry=20)
    assert "3 clips have no share of listeners: the acted emotion is their one vote." in report.notes


def test_without_ratings_and_without_recordings(root):
    for clip in CLIPS:
        (root / "wav" / f"{clip}.wav").unlink()
    rows, _ = load(root, audio=False)
    assert set(rows) == {*CLIPS, "03a04Ab"}
    with pytest.raises(CorpusError, match="No recordings in"):
        load(root)
    soundfile.write(root / "wav" / "03a01Fa.WAV", np.zeros(16000), 16000, format="WAV")
    (root / "erkennung.txt").unlink()
    rows, report = load(root)
    assert rows["03a01Fa"]["votes"] == votes(Happy=1)
    assert any("no erkennung.txt" in note for note in report.notes)


def test_splits_by_actor(root):
    rows, report = load(root, train_actors="3", validation_actors=[8], test_actors="12-15")
    assert rows["12b01Na"]["split"] == "test"
    assert report.left_out == {"its actor is in no split": ["16b10Tb"]}
    with pytest.raises(CorpusError, match=r"train_actors names actors \[4\]; EMO-DB has actors 3 to 16"):
        load(root, train_actors=[4])


def test_label_sets_with_boredom_or_without_other(root):
    bored = LabelSet((*PRIMARY_LABELS[:8], "Bored"))
    assert load(root, label_set=bored)[0]["08a02La"]["label"] == 8
    four = LabelSet(("Neutral", "Happy", "Sad", "Angry"), majority=("Neutral",))
    with pytest.raises(CorpusError, match="Emotion 'Bored' has no place"):
        load(root, label_set=four)
    with pytest.raises(CorpusError, match="'other' needs a label 'Other'"):
        load(root, label_set=four, spread="other")
    rows, report = load(root, label_set=four, label_names={"Bored": None, "Disgust": "Angry", "Fear": None})
    assert rows["03a01Fa"]["votes"] == pytest.approx([2 / 6, 18, 2 / 6, 4 / 6], abs=1e-5)
    assert report.left_out == {"its label is dropped by label_names": ["08a02La"]}


@pytest.mark.parametrize("row", ["03a01Fa.wav\tvery\t1", "03a01Fa.wav", "03a01Fa.wav\t-5,0", "03a01Fa.wav\t250,0"])
def test_malformed_rating(root, row):
    (root / "erkennung.txt").write_bytes(RATINGS.replace("03a01Fa.wav\t90,00\xa0\t80,00", row).encode("latin-1"))
    with pytest.raises(CorpusError, match=r"erkennung.txt, line 2: .* gives no share from 0 to 100"):
        load(root)
    rows, report = load(root, strict=False)
    assert rows["03a01Fa"]["votes"] == votes(Happy=1)
    assert report.left_out == {"malformed row (erkennung.txt)": ["line 2"]}


def test_duplicate_rating(root):
    (root / "erkennung.txt").write_bytes((RATINGS + "03a01Fa.wav\t10,00\n").encode("latin-1"))
    with pytest.raises(CorpusError, match="line 8: 03a01Fa occurs twice with different shares"):
        load(root)
    assert load(root, strict=False, spread="none")[0]["03a01Fa"]["votes"] == votes(Happy=18)


def test_other_files(root):
    soundfile.write(root / "wav" / "noise.wav", np.zeros(16000), 16000)
    with pytest.raises(CorpusError, match=r"file noise: not an EMO-DB file name"):
        load(root)
    (root / "wav" / "03a01Fa.wav").write_bytes(b"no audio")
    rows, report = load(root, strict=False)
    assert set(rows) == set(CLIPS[1:])
    assert sorted(map(len, report.left_out.values())) == [1, 1]
    (root / "erkennung.txt").write_text("Name Anteil\n")
    with pytest.raises(CorpusError, match="expected columns 'Satz' and 'erkannt'"):
        load(root)
