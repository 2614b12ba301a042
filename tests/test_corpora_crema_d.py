"""CREMA-D in its released layout: votes on the voice alone, speaker-disjoint splits, what can be wrong with it."""

import math

import numpy as np
import pytest
import soundfile

from sailer.data import CorpusError, CorpusReport, LabelSet, load_corpus
from sailer.data.schema import PRIMARY_LABELS

HEADER = '"","A","D","F","H","N","S","fileName","numResponses","agreement","emoVote","meanEmoResp"'
ROWS = [
    '"100001",0,0,0,1,10,0,"1001_IEO_NEU_XX",11,0.909090909090909,"N",71.7',
    '"100009",5,5,0,0,1,1,"1001_IEO_ANG_MD",12,0.416666666666667,"A:D",50.6',
    '"100300",0,0,6,0,2,1,"1018_TAI_FEA_XX",9,0.67,"F",50',
    '"100400",0,0,0,0,2,7,"1043_WSI_SAD_X",9,0.67,"S",50',
    '"100500",0,0,0,0,2,7,"1076_MTI_SAD_XX",9,0.67,"S",50',
    # The same clips seen, and seen and heard.
    '"200001",0,9,0,0,1,0,"1001_IEO_NEU_XX",10,0.9,"D",62',
    '"300001",0,9,0,0,1,0,"1001_IEO_NEU_XX",10,0.9,"D",62',
]


def votes(**counts):
    return [float(counts.get(label, 0)) for label in PRIMARY_LABELS]


def write_votes(root, rows, header=HEADER):
    (root / "processedResults").mkdir(exist_ok=True)
    (root / "processedResults" / "tabulatedVotes.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def root(tmp_path):
    write_votes(tmp_path, ROWS)
    (tmp_path / "VideoDemographics.csv").write_text(
        '"ActorID","Age","Sex","Race","Ethnicity"\n1001,51,"Male","Caucasian","Not Hispanic"\n'
        '1018,25,"Female","Caucasian","Hispanic"\n1043,25,"Female","Caucasian","Hispanic"\n'
    )
    (tmp_path / "AudioWAV").mkdir()
    for row in ROWS[:5]:
        soundfile.write(tmp_path / "AudioWAV" / f"{row.split(',')[7].strip(chr(34))}.wav", np.zeros(16000), 16000)
    return tmp_path


def load(root, **options):
    report = CorpusReport()
    datasets = load_corpus("crema_d", root, report=report, **options)
    return {row["id"]: {**row, "split": split} for split, rows in datasets.items() for row in rows}, report


def test_votes_on_the_voice_alone_with_sentence_sex_and_age(root):
    rows, report = load(root)
    assert {clip: row["split"] for clip, row in rows.items()} == {
        "1001_IEO_NEU_XX": "train",
        "1001_IEO_ANG_MD": "train",
        "1018_TAI_FEA_XX": "test",
        "1043_WSI_SAD_X": "validation",
    }
    neutral, tie = rows["1001_IEO_NEU_XX"], rows["1001_IEO_ANG_MD"]
    assert neutral["votes"] == votes(Happy=1, Neutral=10) and neutral["label"] == PRIMARY_LABELS.index("Neutral")
    assert tie["votes"] == votes(Angry=5, Disgust=5, Neutral=1, Sad=1) and tie["label"] == -1
    assert (neutral["transcript"], neutral["speaker"], neutral["sex"]) == (
        "It's eleven o'clock.",
        "crema-d-1001",
        "male",
    )
    assert neutral["age"] == 51 and neutral["duration"] == 1
    assert neutral["audio"]["path"].endswith("AudioWAV/1001_IEO_NEU_XX.wav")
    assert report.left_out == {"excluded (by default the recording without sound)": ["1076_MTI_SAD_XX"]}
    assert any("emoVote differs from the plurality of the votes for 0 of 5 clips" in note for note in report.notes)


def test_labels_alone_and_without_demographics(root):
    (root / "VideoDemographics.csv").unlink()
    (root / "AudioWAV").rename(root / "elsewhere")
    rows, report = load(root, audio=False)
    assert len(rows) == 5 and math.isnan(rows["1018_TAI_FEA_XX"]["age"]) and rows["1018_TAI_FEA_XX"]["sex"] == ""
    assert any("no VideoDemographics.csv" in note for note in report.notes)
    with pytest.raises(CorpusError, match="neither AudioWAV nor AudioMP3"):
        load(root)


def test_mp3_layout(root):
    (root / "AudioMP3").mkdir()
    for file in (root / "AudioWAV").iterdir():
        soundfile.write(root / "AudioMP3" / f"{file.stem}.mp3", np.zeros(16000), 16000)
        file.unlink()
    (root / "AudioWAV").rmdir()
    rows, _ = load(root)
    assert rows["1001_IEO_NEU_XX"]["audio"]["path"].endswith("AudioMP3/1001_IEO_NEU_XX.mp3")


def test_default_splits_have_ninety_one_actors_and_share_none(tmp_path):
    rows = [f'"{100000 + actor}",0,0,0,0,1,0,"{actor}_IEO_NEU_XX",1,1,"N",1' for actor in range(1001, 1092)]
    write_votes(tmp_path, rows)
    rows, report = load(tmp_path, audio=False)
    splits = [row["split"] for row in rows.values()]
    assert [splits.count(split) for split in ("train", "validation", "test")] == [71, 10, 10]
    assert not report.left_out


def test_splits_by_actor(root):
    rows, report = load(root, train_actors=[1018], validation_actors="1043", test_actors=1001)
    assert rows["1018_TAI_FEA_XX"]["split"] == "train" and rows["1001_IEO_NEU_XX"]["split"] == "test"
    assert report.left_out == {"its actor is in no split": ["1076_MTI_SAD_XX"]}
    with pytest.raises(CorpusError, match="Actor 1043 is in both validation_actors and test_actors"):
        load(root, test_actors=[1043])
    with pytest.raises(CorpusError, match=r"test_actors names actors \[7\]; CREMA-D has actors 1001 to 1091"):
        load(root, test_actors=[7])


def test_published_vote_is_the_label_and_a_difference_is_counted(root):
    write_votes(root, [ROWS[0].replace('"N"', '"H"'), *ROWS[1:]])
    rows, report = load(root)
    assert rows["1001_IEO_NEU_XX"]["label"] == PRIMARY_LABELS.index("Happy")
    assert any("differs from the plurality of the votes for 1 of 5 clips" in note for note in report.notes)


def test_without_votes_a_clip_is_unlabelled(root):
    write_votes(root, ['"100001",0,0,0,0,0,0,"1001_IEO_NEU_XX",0,0,"",0', *ROWS[1:]])
    rows, _ = load(root)
    assert rows["1001_IEO_NEU_XX"]["label"] == -100


def test_another_label_set(root):
    four = LabelSet(("Neutral", "Happy", "Sad", "Angry"), majority=("Neutral",))
    with pytest.raises(CorpusError, match="Emotion 'Disgust' has no place"):
        load(root, label_set=four)
    rows, report = load(root, label_set=four, label_names={"Disgust": "Angry", "Fear": None})
    assert rows["1001_IEO_ANG_MD"]["votes"] == [1, 0, 1, 10]
    assert report.left_out["its label is dropped by label_names"] == ["1018_TAI_FEA_XX"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '"100001",0,0,x,1,10,0,"1001_IEO_NEU_XX",11,0.9,"N",71.7',
            "line 2: .* is no stimulus number with six counts",
        ),
        ('"100001",0,0,-2,1,10,0,"1001_IEO_NEU_XX",11,0.9,"N",71.7', "line 2: .* a count is negative"),
        (
            '"100001",0,0,0,1,10,0,"../../1001_IEO_NEU_XX",11,0.9,"N",71.7',
            "line 2: '../../1001_.*no CREMA-D file name",
        ),
        ('"100001",0,0', "line 2: .* is no stimulus number"),
    ],
)
def test_malformed_row(root, row, message):
    write_votes(root, [row, *ROWS[1:]])
    with pytest.raises(CorpusError, match=message):
        load(root)
    rows, report = load(root, strict=False)
    assert len(rows) == 3
    assert report.left_out["malformed row (tabulatedVotes.csv)"] == ["line 2"]


def test_duplicate_clip(root):
    write_votes(root, [*ROWS, ROWS[0].replace("100001", "100011")])
    assert any("repeats 1001_IEO_NEU_XX" in note for note in load(root)[1].notes)
    write_votes(root, [*ROWS, ROWS[0].replace(",10,0", ",9,1")])
    with pytest.raises(CorpusError, match="line 9: 1001_IEO_NEU_XX occurs twice with different content"):
        load(root)
    rows, report = load(root, strict=False)
    assert rows["1001_IEO_NEU_XX"]["votes"] == votes(Happy=1, Neutral=10)
    assert report.left_out["second row of a clip (tabulatedVotes.csv)"] == ["line 9"]


def test_recordings_that_are_missing_damaged_or_have_no_votes(root):
    (root / "AudioWAV" / "1001_IEO_NEU_XX.wav").rename(root / "AudioWAV" / "1091_IEO_NEU_XX.wav")
    (root / "AudioWAV" / "1001_IEO_ANG_MD.wav").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"1 of 4 recordings .* are missing in .*AudioWAV: 1001_IEO_NEU_XX"):
        load(root)
    rows, report = load(root, strict=False)
    assert len(rows) == 2
    assert report.left_out["recording missing"] == ["1001_IEO_NEU_XX"]
    assert report.left_out["recording without votes"] == ["1091_IEO_NEU_XX"]
    assert len(report.left_out["audio file zero-length (0 bytes)"]) == 1


def test_a_folder_that_is_no_crema_d(root):
    write_votes(root, [], "version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CorpusError, match=r"Git LFS pointer.*git lfs pull"):
        load(root)
    write_votes(root, ROWS, HEADER.replace('"F"', '"X"'))
    with pytest.raises(CorpusError, match=r"has no columns \['F'\]"):
        load(root)
    (root / "processedResults" / "tabulatedVotes.csv").unlink()
    with pytest.raises(CorpusError, match=r"has no processedResults/tabulatedVotes.csv"):
        load(root)
