"""Rows written in MSP-Podcast's own form, in every form of its labels, are the rows that come back."""

import io
import json

import numpy as np
import pytest
import soundfile
from datasets import DatasetDict

from sailer.data import CorpusError, CorpusReport, LabelSet, load_corpus
from sailer.data.labels import consensus
from sailer.data.msp_writer import write_msp_podcast
from sailer.data.schema import PRIMARY_LABELS, build_dataset

DETAILED = ("csv", "csv_columns", "json", "json_workers", "txt")


def wav(seconds=0.5, rate=16000, channels=1, form="WAV"):
    file = io.BytesIO()
    time = np.arange(int(rate * seconds)) / rate
    tone = 0.5 * np.sin(2 * np.pi * 200 * time)
    soundfile.write(file, np.stack([tone] * channels, axis=1), rate, format=form)
    return file.getvalue()


def random_columns(clips, seed, prefix, audio=None):
    random = np.random.default_rng(seed)
    votes = random.multinomial(5, random.dirichlet(np.full(9, 0.3)), size=clips)
    attributes = random.uniform(0, 1, (clips, 3))
    attributes[0] = np.nan
    return {
        "id": [f"{prefix}-{row}" for row in range(clips)],
        "audio": [{"path": None, "bytes": audio} if audio else None] * clips,
        "transcript": [f"Clip {row}, «so, to; say»" if row % 3 else "" for row in range(clips)],
        "votes": votes,
        "secondary_votes": random.integers(0, 6, (clips, 17)),
        "attributes": attributes,
        "label": consensus(votes),
        "speaker": [f"s{row % 4}" if row % 5 else "" for row in range(clips)],
        "sex": [("female", "male", "")[row % 3] for row in range(clips)],
    }


@pytest.fixture(scope="module")
def corpus():
    test = random_columns(8, 3, "test")
    # A test set without labels.
    test |= {"votes": np.zeros((8, 9)), "secondary_votes": np.zeros((8, 17)), "label": np.full(8, -100)}
    return DatasetDict(
        train=build_dataset(random_columns(40, 1, "train")),
        validation=build_dataset(random_columns(20, 2, "validation")),
        test=build_dataset(test),
    )


def assert_equal_rows(datasets, read, renamed=None):
    renamed = {"test": "test1"} if renamed is None else renamed
    assert set(read) == {renamed.get(split, split) for split in datasets}
    for split, dataset in datasets.items():
        own = {row["id"]: row for row in read[renamed.get(split, split)].remove_columns("audio")}
        assert len(own) == len(dataset)
        for row in dataset.remove_columns("audio"):
            other = own[row["id"]]
            for column in ("votes", "secondary_votes", "label", "transcript", "speaker", "sex"):
                assert other[column] == row[column], (row["id"], column)
            np.testing.assert_allclose(other["attributes"], row["attributes"], atol=1e-6)


@pytest.mark.parametrize("detailed", DETAILED)
@pytest.mark.parametrize("form", ["csv", "json", "json_list"])
def test_rows_come_back_from_every_form(tmp_path, corpus, detailed, form):
    root = write_msp_podcast(corpus, tmp_path / "msp", detailed=[detailed], consensus=[form])
    report = CorpusReport()
    assert_equal_rows(corpus, load_corpus("msp_podcast", root, audio=False, report=report))
    assert not report.left_out


def test_old_spellings_and_all_files_at_once(tmp_path, corpus):
    root = write_msp_podcast(
        corpus,
        tmp_path / "msp",
        labels_folder="labels",
        consensus_name="labels_concensus",
        split_names={"test": "Test"},
    )
    assert sorted(file.name for file in (root / "labels").iterdir()) == [
        *("labels.txt", "labels_concensus.csv", "labels_concensus.json", "labels_detailed.csv", "labels_detailed.json")
    ]
    assert_equal_rows(corpus, load_corpus("msp_podcast", root, audio=False), renamed={})


def test_label_files_have_the_published_form(tmp_path):
    votes = np.zeros((2, 9))
    votes[0, [PRIMARY_LABELS.index("Happy"), PRIMARY_LABELS.index("Other")]] = 2, 1
    rows = {
        **{"id": ["one", "two"], "votes": votes, "label": [4, -1], "attributes": [[0.5, 0, 1], [np.nan] * 3]},
        **{"secondary_votes": np.eye(17)[[0, 0]] * [[1], [0]], "speaker": ["12", ""], "sex": ["male", ""]},
    }
    root = write_msp_podcast({"validation": build_dataset(rows)}, tmp_path / "msp")
    labels = root / "Labels"
    assert (labels / "labels_consensus.csv").read_text().splitlines() == [
        "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set",
        "one.wav,H,4.000000,1.000000,7.000000,12,Male,Development",
        "two.wav,X,,,,Unknown,Unknown,Development",
    ]
    assert (labels / "labels_detailed.csv").read_text().splitlines() == [
        "FileName,EmoDetail",
        "one.wav,WORKER00000001; Happy; Angry; A:4.000000; V:1.000000; D:7.000000;",
        "one.wav,WORKER00000002; Happy; A:4.000000; V:1.000000; D:7.000000;",
        "one.wav,WORKER00000003; Other-; A:4.000000; V:1.000000; D:7.000000;",
    ]
    assert (labels / "labels.txt").read_text().splitlines()[0] == "one.wav; H; A:4.000000; V:1.000000; D:7.000000;"
    answer = json.loads((labels / "labels_detailed.json").read_text())["one.wav"]["WORKER00000001"]
    expected = {"EmoClass_Major": "Happy", "EmoClass_Second": "Angry", "EmoAct": 4.0, "EmoVal": 1.0, "EmoDom": 7.0}
    assert answer == expected


@pytest.mark.parametrize(
    "source",
    [wav(), wav(rate=8000), wav(rate=44100, channels=2), wav(form="FLAC")],
    ids=["copy", "8k", "stereo", "flac"],
)
def test_recordings_become_16_khz_mono_wav(tmp_path, source):
    datasets = {"train": build_dataset(random_columns(3, 1, "a", source))}
    root = write_msp_podcast(datasets, tmp_path / "msp")
    read = load_corpus("msp_podcast", root)["train"]
    assert np.allclose(read["duration"], 0.5, atol=1e-3)
    info = soundfile.info(root / "Audios" / "a-0.wav")
    assert (info.samplerate, info.channels, info.format) == (16000, 1, "WAV")
    samples, _ = soundfile.read(root / "Audios" / "a-0.wav")
    assert 0.3 < np.abs(samples[1000:-1000]).max() < 0.6


def test_another_label_set_within_the_nine(tmp_path):
    label_set = LabelSet(("Neutral", "Happy", "Sad", "Angry"), majority=("Neutral",))
    rows = {"id": ["a"], "votes": [[1, 0, 2, 0]], "label": [2]}
    root = write_msp_podcast({"train": build_dataset(rows, label_set)}, tmp_path / "msp", label_set=label_set)
    row = load_corpus("msp_podcast", root, audio=False)["train"][0]
    assert row["label"] == PRIMARY_LABELS.index("Sad") and row["votes"][PRIMARY_LABELS.index("Sad")] == 2
    with pytest.raises(CorpusError, match=r"MSP-Podcast has no label for \['Joy'\]"):
        write_msp_podcast({}, tmp_path / "joy", label_set=LabelSet(("Joy",), majority=()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"votes": [[0.5, *[0] * 8]]}, r"'a' has votes of 0.5: only whole votes"),
        ({"secondary_votes": np.eye(17)[[0]] * 4}, "4 votes for a secondary emotion but 1 annotators"),
    ],
)
def test_votes_that_no_annotators_can_have_given(tmp_path, change, message):
    rows = {"id": ["a"], "votes": [[1, *[0] * 8]], **change}
    with pytest.raises(CorpusError, match=message):
        write_msp_podcast({"train": build_dataset(rows)}, tmp_path / "msp")
    assert not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path):
    row = build_dataset({"id": ["a/b"]})
    with pytest.raises(CorpusError, match=r"Two clips would be the file a_b\.wav"):
        write_msp_podcast({"train": row, "test": build_dataset({"id": ["a b"]})}, tmp_path / "msp")
    with pytest.raises(CorpusError, match="unknown form 'xml'"):
        write_msp_podcast({"train": row}, tmp_path / "msp", detailed=["xml"])
    with pytest.raises(CorpusError, match=r"are both the file labels_detailed\.csv"):
        write_msp_podcast({"train": row}, tmp_path / "msp", detailed=["csv", "csv_columns"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CorpusError, match="exists and is not an empty folder"):
        write_msp_podcast({"train": row}, tmp_path / "full")


def test_the_synthetic_corpus_comes_back_with_its_recordings(tmp_path):
    pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs the extra `demo`")
    corpus = load_corpus("synthetic", train_clips=12, validation_clips=4, test_clips_per_class=1)
    root = write_msp_podcast(corpus, tmp_path / "msp", detailed=["json_workers"])
    read = load_corpus("msp_podcast", root)
    assert_equal_rows(corpus, read)
    lengths = dict(zip(corpus["train"]["id"], corpus["train"]["duration"], strict=True))
    for row in read["train"]:
        assert row["duration"] == pytest.approx(lengths[row["id"]], abs=1e-3)
