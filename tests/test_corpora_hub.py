"""Datasets that `datasets` loads in canonical rows: saved folders, folders of files, canonical rows as they are."""

import io
import json
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, List, Value

from sailer.data import CorpusError, CorpusReport, LabelSet, load_corpus
from sailer.data.schema import PRIMARY_LABELS, build_dataset, canonical_features

FOUR = LabelSet(("Neutral", "Happy", "Sad", "Angry"), majority=("Neutral",))
OPTIONS = {
    "label_set": FOUR,
    "columns": {"audio": "speech", "label": "emotion", "votes": "answers", "speaker": "who"},
    "label_names": {"ang": "Angry", "hap": "Happy", "neu": "Neutral"},
}


def wav(seconds=1.0):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(int(16000 * seconds)), 16000, format="WAV")
    return file.getvalue()


def dataset(recordings, first=0):
    """Rows as an emotion dataset on the Hub has them: encoded audio and numbered classes."""
    names = ClassLabel(names=["ang", "hap", "neu"])
    # `datasets` would encode through torchcodec what is made as Audio; what is cast to it later it leaves alone.
    speech = {"path": Value("string"), "bytes": Value("binary")}
    features = {"speech": speech, "emotion": names, "answers": List(names), "who": Value("int32")}
    size = len(recordings)
    rows = {
        "speech": recordings,
        "emotion": [(first + row) % 3 for row in range(size)],
        "answers": [[(first + row) % 3, (first + row) % 3, 2] for row in range(size)],
        "who": [row // 2 for row in range(size)],
    }
    return Dataset.from_dict(rows, Features(features)).cast_column("speech", Audio(decode=False))


def load(path, **options):
    report = CorpusReport()
    datasets = load_corpus("hub", path, report=report, **options)
    for rows in datasets.values():
        assert rows.features == canonical_features(options.get("label_set"))
    return {row["id"]: {**row, "split": split} for split, rows in datasets.items() for row in rows}, report


@pytest.fixture
def saved(tmp_path):
    recordings = [{"path": f"{row}.wav", "bytes": wav(1 + row)} for row in range(4)]
    others = [{"path": f"{row}.wav", "bytes": wav()} for row in (7, 8)]
    # Decoding is on in a dataset as people save it.
    DatasetDict(train=dataset(recordings), dev=dataset(others, 1)).cast_column("speech", Audio()).save_to_disk(
        tmp_path / "saved"
    )
    return tmp_path / "saved"


def test_a_saved_dataset_with_a_mapping(saved):
    rows, report = load(saved, **OPTIONS)
    assert {clip: row["split"] for clip, row in rows.items()} == {
        **dict.fromkeys("0123", "train"),
        **dict.fromkeys("78", "validation"),
    }
    assert rows["0"]["label"] == 3 and rows["0"]["votes"] == [1, 0, 0, 2]
    assert rows["7"]["label"] == 1 and rows["7"]["votes"] == [1, 2, 0, 0]
    assert rows["1"]["audio"] == {"path": None, "bytes": wav(2)} and rows["1"]["duration"] == 2
    assert rows["3"]["speaker"] == "1" and not report.left_out


def test_the_recordings_are_not_copied_where_all_rows_stay(saved):
    import pyarrow

    before = pyarrow.total_allocated_bytes()
    datasets = load_corpus("hub", saved, **OPTIONS)
    assert pyarrow.total_allocated_bytes() - before < len(wav(1))
    assert len(datasets["train"][3]["audio"]["bytes"]) == len(wav(4))


def test_labels_alone(saved):
    rows, _ = load(saved, audio=False, **OPTIONS)
    assert rows["0"]["audio"] == {"path": None, "bytes": None} and len(rows) == 6


def test_some_recordings_cannot_be_used(tmp_path):
    whole = wav()
    recordings = [
        *({"path": "a.wav", "bytes": whole}, {"path": "b.wav", "bytes": b"text"}, {"path": "c.wav", "bytes": whole}),
        *({"path": "d.wav", "bytes": whole[:5000]}, None),
    ]
    dataset(recordings).save_to_disk(tmp_path / "saved")
    with pytest.raises(CorpusError, match=r"Audio file of clip row-0000001 in .*saved is not readable as audio"):
        load(tmp_path / "saved", **OPTIONS)
    rows, report = load(tmp_path / "saved", strict=False, **OPTIONS)
    assert set(rows) == {"row-0000000", "row-0000002"} and rows["row-0000002"]["label"] == 0
    assert rows["row-0000002"]["audio"]["bytes"] == whole
    assert sorted(map(len, report.left_out.values())) == [1, 1, 1]


def test_minimum_seconds_and_splits(saved):
    rows, report = load(saved, minimum_seconds=2.5, splits=["train"], **OPTIONS)
    assert set(rows) == {"2", "3"} and len(report.left_out["shorter than 2.5 s"]) == 2
    assert set(load(saved, splits="Development", **OPTIONS)[0]) == {"7", "8"}
    with pytest.raises(CorpusError, match=r"no split \['test'\]; it has \['train', 'validation'\]"):
        load(saved, splits="test", **OPTIONS)


def test_splits_from_a_column_or_by_speaker(tmp_path):
    recordings = [{"path": f"{row}.wav", "bytes": wav()} for row in range(6)]
    rows = dataset(recordings).add_column("part", ["train", "train", "test", "test", "dev", "dev"])
    rows.save_to_disk(tmp_path / "saved")
    columns = {**OPTIONS["columns"], "split": "part"}
    loaded, _ = load(tmp_path / "saved", **OPTIONS | {"columns": columns})
    assert {clip: row["split"] for clip, row in loaded.items()} == {
        **dict.fromkeys("01", "train"),
        **dict.fromkeys("23", "test"),
        **dict.fromkeys("45", "validation"),
    }
    assert loaded["4"]["audio"]["bytes"] == wav()
    loaded, _ = load(tmp_path / "saved", split_fractions={"test": 0.3}, **OPTIONS)
    assert sorted(row["split"] for row in loaded.values()) == ["test"] * 2 + ["train"] * 4
    assert len({row["speaker"] for row in loaded.values() if row["split"] == "test"}) == 1


def test_splits_with_names_of_their_own(tmp_path):
    recordings = [{"path": "0.wav", "bytes": wav()}]
    DatasetDict(full=dataset(recordings)).save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one", **OPTIONS)[0]["0"]["split"] == "train"
    DatasetDict(first=dataset(recordings), second=dataset(recordings)).save_to_disk(tmp_path / "two")
    with pytest.raises(CorpusError, match=r"split 'first' is none of .* say with split_names"):
        load(tmp_path / "two", **OPTIONS)
    datasets = load_corpus("hub", tmp_path / "two", split_names={"first": "train", "second": "test2"}, **OPTIONS)
    assert set(datasets) == {"train", "test2"}
    with pytest.raises(CorpusError, match="leave out split_fractions"):
        load(tmp_path / "two", split_fractions={"test": 0.5}, **OPTIONS)


def test_a_folder_of_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    recordings = [{"path": f"{row}.wav", "bytes": wav()} for row in range(4)]
    dataset(recordings).cast_column("speech", Audio()).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    dataset(recordings[:1]).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    datasets = load_corpus("hub", tmp_path / "data", **OPTIONS)
    assert {split: len(rows) for split, rows in datasets.items()} == {"train": 4, "test": 1}
    assert datasets["train"][2]["audio"] == {"path": None, "bytes": wav()} and datasets["train"][2]["label"] == 0


@pytest.mark.skipif(find_spec("torchcodec") is not None, reason="shows the message where torchcodec is missing")
def test_a_folder_of_recordings_needs_torchcodec_or_the_manifest(tmp_path):
    (tmp_path / "a.wav").write_bytes(wav())
    (tmp_path / "metadata.csv").write_text("file_name,emotion\na.wav,sad\n")
    with pytest.raises(CorpusError, match=r"without a library: .*torchcodec.* by the corpus 'manifest'"):
        load(tmp_path, columns={"audio": "audio", "label": "emotion"})
    columns = {"audio": "file_name", "label": "emotion"}
    assert load_corpus("manifest", tmp_path, columns=columns)["train"][0]["label"] == PRIMARY_LABELS.index("Sad")


def test_recordings_given_as_paths(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(wav())
    columns = {"audio": "file", "label": "emotion"}
    Dataset.from_dict({"file": ["clips/a.wav"], "emotion": ["sad"]}).save_to_disk(tmp_path / "saved")
    rows, _ = load(tmp_path / "saved", columns=columns, audio_folder=str(tmp_path))
    assert rows["clips/a"]["audio"]["path"] == str(tmp_path / "clips" / "a.wav")
    Dataset.from_dict({"file": ["../clips/a.wav"], "emotion": ["sad"]}).save_to_disk(tmp_path / "outside")
    with pytest.raises(CorpusError, match="leaves the folder"):
        load(tmp_path / "outside", columns=columns)


def test_unknown_labels_and_columns(saved):
    with pytest.raises(CorpusError, match=r"split train, row 0: unknown label 'ang'.*known are \['Neutral', 'Happy'"):
        load(saved, **OPTIONS | {"label_names": {}})
    with pytest.raises(
        CorpusError, match=r"has no column 'audio', which is to be audio; it has \['speech', 'emotion'"
    ):
        load(saved, **OPTIONS | {"columns": {"audio": "audio"}})
    with pytest.raises(CorpusError, match="no column said to be audio"):
        load(saved, **OPTIONS | {"columns": {"id": "who", "label": "emotion"}, "strict": False})


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(CorpusError, match="read from a dataset id or a folder"):
        load(None)
    with pytest.raises(CorpusError, match="`datasets` cannot load nobody/nothing"):
        load("nobody/nothing")
    (tmp_path / "table.csv").write_text("audio\na.wav\n")
    with pytest.raises(CorpusError, match=r"table.csv is a file: read it with the corpus 'manifest'"):
        load(tmp_path / "table.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"`datasets` cannot load .*empty"):
        load(tmp_path / "empty")


@pytest.fixture
def canonical(tmp_path):
    (tmp_path / "b.wav").write_bytes(wav())
    columns = {
        "id": ["a", "b"],
        "audio": [{"path": None, "bytes": wav()}, {"path": str(tmp_path / "b.wav"), "bytes": None}],
        "duration": [1.0, 2.0],
        "votes": np.eye(9)[[1, 2]],
        "label": [1, 2],
        "transcript": ["so", ""],
    }
    train = build_dataset(columns)
    DatasetDict(train=train, test1=build_dataset({"id": ["c"], "audio": [columns["audio"][0]]})).save_to_disk(
        tmp_path / "canonical"
    )
    return tmp_path / "canonical"


def test_canonical_rows_need_no_mapping(canonical):
    rows, report = load(canonical)
    assert rows["a"]["split"] == "train" and rows["c"]["split"] == "test1"
    assert rows["a"]["votes"] == [0, 1, 0, 0, 0, 0, 0, 0, 0] and rows["a"]["transcript"] == "so"
    assert rows["a"]["audio"]["bytes"] == wav() and not report.left_out
    assert set(load(canonical, splits="test1")[0]) == {"c"}
    assert set(load(canonical, minimum_seconds=1.5, splits="train")[0]) == {"b"}
    with pytest.raises(CorpusError, match="holds canonical rows already"):
        load(canonical, label_names={"ang": "Angry"})


def test_canonical_rows_whose_recordings_are_gone(canonical):
    (canonical.parent / "b.wav").unlink()
    with pytest.raises(CorpusError, match=r"1 of 2 recordings of .* are missing: b \(.*b.wav\)"):
        load(canonical)
    rows, report = load(canonical, strict=False)
    assert set(rows) == {"a", "c"} and len(report.left_out["recording missing"]) == 1
    assert len(load(canonical, audio=False)[0]) == 3


def test_canonical_rows_of_another_label_set(canonical):
    with pytest.raises(CorpusError, match=r"votes over 9 labels; asked for are \['Neutral', 'Happy'"):
        load(canonical, label_set=FOUR)
    (canonical / "label_set.json").write_text(json.dumps({"labels": list(PRIMARY_LABELS)}))
    other = LabelSet(tuple(reversed(PRIMARY_LABELS)))
    with pytest.raises(CorpusError, match=r"was written with the labels \['Angry', .*; asked for are \['Other'"):
        load(canonical, label_set=other)
