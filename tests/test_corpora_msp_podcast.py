"""MSP-Podcast's forms read to the same rows, its options, and what its label files can have wrong."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer.data import CorpusError, CorpusReport, LabelSet, load_corpus
from sailer.data.schema import PRIMARY_LABELS, SECONDARY_LABELS

# File, code, attributes, speaker, gender, split; then annotators: name, primary, secondary, attributes.
CLIPS = [
    (
        *("a.wav", "H", (5.0, 4.5, 4.0), "7", "Female", "Train"),
        [
            ("WORKER1", "Happy", "Happy,Amused", (6, 5, 4)),
            ("WORKER2", "Happy", "", (5, 4, 4)),
            ("WORKER3", "Neutral", "Neutral,Other-amused,Amused", (4, 4.5, 4)),
        ],
    ),
    (
        *("b.wav", "X", (3.0, 2.5, 3.5), "7", "Female", "Train"),
        [("WORKER1", "Sad", "Dissapointed", (3, 2, 3)), ("WORKER4", "Other-bored, tired", "Other-bored", (3, 3, 4))],
    ),
    (
        *("c.wav", "O", (2.0, 3.0, 3.0), "Unknown", "Unknown", "Development"),
        [("WORKER1", "Other-", "", (2, 3, 3)), ("WORKER2", "OTHER - Amused", "", (2, 3, 3))],
    ),
    (
        *("d.wav", "X", (4.0, 4.0, 4.0), "8", "Male", "Development"),
        [("WORKER1", "Angry", "", (4, 4, 4)), ("WORKER2", "Fear", "", (4, 4, 4))],
    ),
    (
        *("e.wav", "A", (6.0, 1.0, 7.0), "8", "Male", "Development"),
        [("WORKER1", "Contempt", "", (6, 1, 7)), ("WORKER2", "Contempt", "", (6, 1, 7))],
    ),
    ("f.wav", "", ("", "", ""), "9", "Male", "Test2", []),
]
FORMS = ("csv", "csv_columns", "json", "json_workers", "txt")
FIELDS = ("FileName", "EmoClass", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Gender", "Split_Set")


def _number(value):
    return value if value == "" else f"{value:.6f}"


def _detail(name, primary, secondary, attributes):
    fields = [name, primary, *([secondary] if secondary else [])]
    return "; ".join([*fields, *(f"{key}:{value:f}" for key, value in zip("AVD", attributes, strict=True))]) + ";"


def _answer(primary, secondary, attributes):
    keys = ("EmoClass_Major", "EmoClass_Second", "EmoAct", "EmoVal", "EmoDom")
    return dict(zip(keys, (primary, secondary, *attributes), strict=True))


def write_labels(root, detailed="csv", consensus="csv", folder="Labels", stem="labels_consensus", clips=CLIPS):
    """The clips in one form of each file, written by this test alone."""
    labels = root / folder
    labels.mkdir(parents=True, exist_ok=True)
    rows = [(file, code, *map(_number, values), *rest) for file, code, values, *rest, _ in clips]
    if consensus == "csv":
        (labels / f"{stem}.csv").write_text("\n".join(",".join(row) for row in [FIELDS, *rows]) + "\n")
    elif consensus:
        entries = {row[0]: dict(zip(FIELDS[1:], row[1:], strict=True)) for row in rows}
        if consensus == "json_list":
            entries = {file: [entry] for file, entry in entries.items()}
        (labels / f"{stem}.json").write_text(json.dumps(entries))
    if detailed == "csv":
        lines = ["FileName,EmoDetail"]
        lines += [f'{file},"{_detail(*answer)}"' for file, *_, answers in clips for answer in answers]
        (labels / "labels_detailed.csv").write_text("\n".join(lines))
    elif detailed == "csv_columns":
        lines = ["FileName,Workers,EmoClass_Major,EmoClass_Second,EmoAct,EmoVal,EmoDom"]
        for file, *_, answers in clips:
            for name, primary, secondary, values in answers:
                lines.append(f'{file},{name},"{primary}","{secondary}",{",".join(map(str, values))}')
        (labels / "labels_detailed.csv").write_text("\n".join(lines))
    elif detailed == "json":
        content = {file: {name: _answer(*answer) for name, *answer in answers} for file, *_, answers in clips}
        (labels / "labels_detailed.json").write_text(json.dumps(content))
    elif detailed == "json_workers":
        content = {
            file: {"Workers": [{"Name": name, **_answer(*answer)} for name, *answer in answers]}
            for file, *_, answers in clips
        }
        (labels / "labels_detailed.json").write_text(json.dumps(content))
    elif detailed == "txt":
        blocks = []
        for file, code, values, *_, answers in clips:
            head = [file, code, *(f"{key}:{_number(value)}" for key, value in zip("AVD", values, strict=True))]
            blocks.append("\n".join(["; ".join(head) + ";", *(_detail(*answer) for answer in answers)]))
        (labels / "labels.txt").write_text("\n\n".join(blocks) + "\n")
    return root


def write_audio(root, seconds=1.0, names=None, folder="Audios"):
    (root / folder).mkdir(exist_ok=True)
    for name in names or [clip[0] for clip in CLIPS]:
        soundfile.write(root / folder / name, np.zeros(int(16000 * seconds), np.int16), 16000, format="WAV")
    return root


def rows_of(datasets):
    return {row["id"]: {**row, "split": split} for split, dataset in datasets.items() for row in dataset}


def load(root, **options):
    report = CorpusReport()
    return rows_of(load_corpus("msp_podcast", root, report=report, **{"audio": False, **options})), report


def votes(**counts):
    return [float(counts.get(label, 0)) for label in PRIMARY_LABELS]


def secondary(**counts):
    return [float(counts.get(label, 0)) for label in SECONDARY_LABELS]


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("detailed", FORMS)
@pytest.mark.parametrize("consensus", ["csv", "json", "json_list"])
def test_rows_are_the_same_in_every_form(tmp_path, detailed, consensus):
    rows, report = load(write_labels(tmp_path, detailed, consensus))
    assert {clip: row["split"] for clip, row in rows.items()} == {
        **{"a": "train", "b": "train", "c": "validation", "d": "validation", "e": "validation", "f": "test2"}
    }
    assert rows["a"]["votes"] == votes(Happy=2, Neutral=1)
    assert rows["a"]["secondary_votes"] == secondary(Happy=1, Amused=2, Neutral=1)
    np.testing.assert_allclose(rows["a"]["attributes"], [4 / 6, 3.5 / 6, 3 / 6], rtol=1e-6)
    assert rows["b"]["votes"] == votes(Sad=1, Other=1)
    assert rows["b"]["secondary_votes"] == secondary(Disappointed=1, Other=1)
    assert rows["c"]["votes"] == votes(Other=2)
    labels = {clip: row["label"] for clip, row in rows.items()}
    assert labels == {"a": 4, "b": -1, "c": 8, "d": -1, "e": 0, "f": -100}
    assert [rows[clip]["speaker"] for clip in "abcdef"] == ["7", "7", "", "8", "8", "9"]
    assert [rows[clip]["sex"] for clip in "acd"] == ["female", "", "male"]
    assert sum(rows["f"]["votes"]) == 0 and all(math.isnan(value) for value in rows["f"]["attributes"])
    assert rows["a"]["audio"] == {"path": None, "bytes": None} and math.isnan(rows["a"]["duration"])
    # e is published as Angry although both voted Contempt.
    assert any("differs from the plurality of the votes for 1 of 5 clips" in note for note in report.notes)
    assert not report.left_out


@pytest.mark.parametrize("folder", ["Labels", "labels", "label"])
@pytest.mark.parametrize("stem", ["labels_consensus", "labels_concensus"])
def test_old_spellings_of_folder_and_file(tmp_path, folder, stem):
    rows, _ = load(write_labels(tmp_path, folder=folder, stem=stem))
    assert len(rows) == len(CLIPS)


def test_labels_txt_alone_gives_classes_and_votes_but_no_splits(tmp_path):
    rows, report = load(write_labels(tmp_path, "txt", consensus=None))
    assert {row["split"] for row in rows.values()} == {"train"}
    assert rows["e"]["label"] == 0 and rows["e"]["votes"] == votes(Contempt=2)
    assert "labels.txt does not give SpkrID, Gender, Split_Set: unknown for every clip." in report.notes


def test_consensus_alone_loads_without_votes(tmp_path):
    rows, report = load(write_labels(tmp_path, detailed=None))
    assert rows["a"]["label"] == 4 and sum(rows["a"]["votes"]) == 0
    assert any("no detailed labels" in note for note in report.notes)


def test_byte_order_mark_and_carriage_returns(tmp_path):
    write_labels(tmp_path, "csv")
    for file in (tmp_path / "Labels").iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    rows, report = load(tmp_path)
    assert rows["a"]["votes"] == votes(Happy=2, Neutral=1) and len(rows) == len(CLIPS) and not report.left_out


def test_latin_1_text_is_read_and_noted(tmp_path):
    write_labels(tmp_path, "csv")
    file = tmp_path / "Labels" / "labels_detailed.csv"
    file.write_bytes(file.read_text().replace("Other-bored, tired", "Other-fatigué").encode("latin-1"))
    rows, report = load(tmp_path)
    assert rows["b"]["votes"] == votes(Sad=1, Other=1)
    assert any("labels_detailed.csv is not UTF-8: read as Latin-1" in note for note in report.notes)


@pytest.mark.parametrize(
    ("detailed", "old", "new", "place"),
    [
        ("csv", '"WORKER2; Happy; A:5', '"WORKER2 Happy A:5', "labels_detailed.csv, line 3: 'WORKER2 Happy A:5"),
        ("csv", "WORKER2; Happy; A:5", "WORKER2; Hapy; A:5", "line 3: cannot read .* unknown primary emotion ' Hapy'"),
        ("csv_columns", 'WORKER2,"Happy"', 'WORKER2,"Happy",', "line 3: 8 cells under 7 columns"),
        ("txt", "WORKER2; Happy; A:5", "WORKER2; Happy; B:5", "labels.txt, line 3: 'WORKER2; Happy; B:5"),
        (
            "json",
            '"WORKER2": {"EmoClass_Major": "Happy"',
            '"WORKER2": {"Major": "Happy"',
            "clip a.wav, annotator WORKER2",
        ),
        ("json_workers", '"Name": "WORKER2", "EmoClass_Major"', '"Name": "WORKER2", "M"', "annotator WORKER2"),
    ],
)
def test_malformed_annotator_row(tmp_path, detailed, old, new, place):
    write_labels(tmp_path, detailed)
    file = next(file for file in (tmp_path / "Labels").iterdir() if file.stem in ("labels_detailed", "labels"))
    text = file.read_text()
    file.write_text(text.replace(old, new, 1))
    assert text != file.read_text()
    with pytest.raises(CorpusError, match=place):
        load(tmp_path)
    rows, report = load(tmp_path, strict=False)
    assert rows["a"]["votes"] == votes(Happy=1, Neutral=1) and len(rows) == len(CLIPS)
    assert [len(items) for items in report.left_out.values()] == [1]
    assert "malformed annotator row" in next(iter(report.left_out))


def test_an_unclosed_quotation_mark_spoils_its_own_row_alone(tmp_path):
    write_labels(tmp_path, "csv_columns")
    edit(tmp_path / "Labels" / "labels_detailed.csv", 'WORKER1,"Sad"', 'WORKER1,"Sad')
    rows, report = load(tmp_path, strict=False)
    assert rows["b"]["votes"] == votes(Other=1) and rows["c"]["votes"] == votes(Other=2)
    assert sum(map(len, report.left_out.values())) == 1


@pytest.mark.parametrize("value", ["9.000000", "0.500000", "nan", "five"])
def test_an_annotators_attribute_that_is_impossible(tmp_path, value):
    edit(write_labels(tmp_path) / "Labels" / "labels_detailed.csv", "A:6.000000; V:5.000000", f"A:{value}; V:5.000000")
    with pytest.raises(
        CorpusError, match=f"labels_detailed.csv, line 2: attribute '{value}' is not a number from 1 to 7"
    ):
        load(tmp_path)
    rows, report = load(tmp_path, strict=False)
    assert rows["a"]["votes"] == votes(Happy=2, Neutral=1)
    assert [len(items) for items in report.left_out.values()] == [1]


@pytest.mark.parametrize("value", ["7.5", "nan", "-1"])
def test_a_published_attribute_that_is_impossible(tmp_path, value):
    edit(write_labels(tmp_path) / "Labels" / "labels_consensus.csv", "a.wav,H,5.000000", f"a.wav,H,{value}")
    with pytest.raises(
        CorpusError, match=rf"labels_consensus.csv, line 2: attribute '{value}' is not a number from 1"
    ):
        load(tmp_path)
    rows, report = load(tmp_path, strict=False)
    # The annotators' mean of 6, 5 and 4 stands in.
    np.testing.assert_allclose(rows["a"]["attributes"][0], 4 / 6, rtol=1e-6)
    assert [len(items) for items in report.left_out.values()] == [1]


@pytest.mark.parametrize("consensus", ["csv", "json"])
def test_duplicate_file_name(tmp_path, consensus):
    write_labels(tmp_path, consensus=consensus, clips=[*CLIPS, CLIPS[0]])
    file = tmp_path / "Labels" / f"labels_consensus.{consensus}"
    if consensus == "json":
        entry = json.dumps(json.loads(file.read_text())["a.wav"])
        file.write_text(file.read_text()[:-1] + f', "a.wav": {entry}}}')
    # The detailed rows of a.wav are there twice as well; each named annotator counts once.
    rows, report = load(tmp_path)
    assert len(rows) == len(CLIPS) and rows["a"]["votes"] == votes(Happy=2, Neutral=1)
    assert any("repeats 1 " in note for note in report.notes)
    assert any("repeats 3 annotators' rows" in note for note in report.notes)

    text = file.read_text()
    last = text.rindex("a.wav")
    file.write_text(text[:last] + text[last:].replace("Train", "Test1", 1))
    with pytest.raises(CorpusError, match=r"a\.wav.* occurs twice with different content"):
        load(tmp_path)
    rows, report = load(tmp_path, strict=False)
    assert rows["a"]["split"] == "train"
    assert [len(items) for items in report.left_out.values()] == [1]


def test_an_annotator_who_answers_twice_differently_counts_twice_and_nameless_ones_are_never_doubles(tmp_path):
    twice = [(*CLIPS[0][:-1], [("W1", "Happy", "", (4, 4, 4)), ("W1", "Sad", "", (4, 4, 4))])]
    rows, report = load(write_labels(tmp_path / "twice", clips=twice))
    assert rows["a"]["votes"] == votes(Happy=1, Sad=1)
    assert any("1 further answers of an annotator" in note for note in report.notes)
    nameless = [(*CLIPS[0][:-1], [("Unknown", "Happy", "", (4, 4, 4))] * 3)]
    rows, _ = load(write_labels(tmp_path / "nameless", clips=nameless))
    assert rows["a"]["votes"] == votes(Happy=3)


def test_consensus_row_without_annotators_keeps_its_label(tmp_path):
    rows, report = load(write_labels(tmp_path, clips=[(*CLIPS[0][:-1], []), *CLIPS[1:]]))
    assert rows["a"]["label"] == 4 and sum(rows["a"]["votes"]) == 0
    assert "1 clips have a published class but no annotators: kept, without votes." in report.notes


def test_annotators_without_a_consensus_row_are_counted(tmp_path):
    write_labels(tmp_path)
    write_labels(tmp_path, detailed=None, clips=CLIPS[1:])
    rows, report = load(tmp_path)
    assert set(rows) == set("bcdef")
    assert report.left_out == {"annotated, but not in the consensus file, so of no split": ["a"]}


def test_unknown_class_and_split(tmp_path):
    file = write_labels(tmp_path) / "Labels" / "labels_consensus.csv"
    edit(file, "a.wav,H", "a.wav,Q")
    with pytest.raises(CorpusError, match=r"line 2: EmoClass 'Q' is none of \['N', .*'X'\]"):
        load(tmp_path)
    edit(file, "7,Female,Train\nb.wav", "7,Female,Trian\nb.wav")
    edit(file, "a.wav,Q", "a.wav,H")
    with pytest.raises(CorpusError, match="line 2: Split_Set: split 'Trian' is none of Train, Development"):
        load(tmp_path)
    rows, report = load(tmp_path, strict=False)
    assert rows["a"]["split"] == "unassigned" and rows["a"]["label"] == 4
    assert sum(map(len, report.left_out.values())) == 1


def test_consensus_row_with_a_missing_cell(tmp_path):
    edit(write_labels(tmp_path) / "Labels" / "labels_consensus.csv", "7,Female,Train\nb", "7,Train\nb")
    with pytest.raises(CorpusError, match="line 2: 7 cells under 8 columns"):
        load(tmp_path)
    rows, report = load(tmp_path, strict=False)
    assert (
        "a" not in rows and sum(len(items) for reason, items in report.left_out.items() if "malformed" in reason) == 1
    )


@pytest.mark.parametrize("name", ["../../etc/a.wav", "/etc/a.wav", "..\\a.wav", "C:a.wav"])
def test_a_path_that_leaves_the_corpus(tmp_path, name):
    edit(write_labels(tmp_path) / "Labels" / "labels_consensus.csv", "\na.wav", f"\n{name}")
    with pytest.raises(CorpusError, match=r"line 2: .* is not the name of a file in the corpus"):
        load(tmp_path)
    rows, report = load(tmp_path, strict=False)
    assert len(rows) == len(CLIPS) - 1
    assert len(report.left_out["file name outside the corpus (labels_consensus.csv)"]) == 1


def test_json_that_is_cut_off(tmp_path):
    file = write_labels(tmp_path, "json") / "Labels" / "labels_detailed.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(CorpusError, match=r"labels_detailed.json, line 1: not valid JSON"):
        load(tmp_path, strict=False)


def test_other_columns_and_missing_folders(tmp_path):
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(CorpusError, match="has no folder Labels"):
        load(tmp_path / "empty")
    (tmp_path / "none" / "Labels").mkdir(parents=True)
    with pytest.raises(CorpusError, match=r"has none of .*labels_consensus.csv"):
        load(tmp_path / "none")
    edit(write_labels(tmp_path / "columns") / "Labels" / "labels_detailed.csv", "EmoDetail", "Detail")
    with pytest.raises(CorpusError, match=r"has the columns .*; expected 'FileName,EmoDetail'"):
        load(tmp_path / "columns")
    with pytest.raises(CorpusError, match="has no folder Audios"):
        load(write_labels(tmp_path / "labels only"), audio=True)


def test_options_splits_and_development_extra(tmp_path):
    write_labels(tmp_path)
    rows, _ = load(tmp_path, splits=["train", "Development"])
    assert set(rows) == set("abcde")
    assert set(load(tmp_path, splits="test2")[0]) == {"f"}
    with pytest.raises(CorpusError, match=r"no split \['test3'\]; it has \['test2', 'train', 'validation'\]"):
        load(tmp_path, splits=["test3"])
    rows, report = load(tmp_path, development_extra=True)
    assert {clip: row["split"] for clip, row in rows.items() if clip in "cde"} == {
        **{"c": "train", "d": "train", "e": "validation"}
    }
    assert "2 Other and no-agreement clips of the validation split joined training." in report.notes


def test_released_in_the_same_form_with_no_splits_speakers_audio_or_transcripts(tmp_path):
    clips = [(file, code, values, "Unknown", "Unknown", "NA", answers) for file, code, values, *_, answers in CLIPS]
    rows, report = load(write_labels(tmp_path, clips=clips))
    assert len(rows) == len(CLIPS)
    assert {row["split"] for row in rows.values()} == {"train"} and {row["speaker"] for row in rows.values()} == {""}
    assert "6 clips have no Split_Set: they are the split 'train'." in report.notes


def test_clips_without_a_split_beside_others_are_unassigned(tmp_path):
    clips = [(*CLIPS[0][:5], "NA", CLIPS[0][-1]), *CLIPS[1:]]
    assert load(write_labels(tmp_path, clips=clips))[0]["a"]["split"] == "unassigned"


def test_another_label_set(tmp_path):
    write_labels(tmp_path)
    four = LabelSet(("Neutral", "Happy", "Sad", "Angry"), majority=("Neutral",))
    with pytest.raises(CorpusError, match=r"Emotion 'Contempt' has no place in the label set .*label_names"):
        load(tmp_path, label_set=four)
    others = dict.fromkeys(("Disgust", "Fear", "Surprise", "Other"))
    rows, report = load(tmp_path, label_set=four, label_names={**others, "Contempt": "Angry"})
    assert rows["a"]["votes"] == [1, 2, 0, 0] and rows["e"]["votes"] == [0, 0, 0, 2] and rows["e"]["label"] == 3
    assert rows["b"]["votes"] == [0, 0, 1, 0] and rows["b"]["label"] == -1
    assert report.left_out == {"its label is dropped by label_names": ["c"]}
    with pytest.raises(CorpusError, match=r"label_names: 'Contemt' is none of .* \(did you mean 'Contempt'\?\)"):
        load(tmp_path, label_set=four, label_names={"Contemt": "Angry"})
    with pytest.raises(CorpusError, match=r"is to be 'Angri', which is not in the label set .*did you mean 'Angry'"):
        load(tmp_path, label_set=four, label_names={"Contempt": "Angri"})
    five = LabelSet((*four.labels, "Other"))
    rows, report = load(tmp_path, label_set=five)
    assert rows["e"]["votes"] == [0, 0, 0, 0, 2] and rows["d"]["votes"] == [0, 0, 0, 1, 1]
    assert any("Contempt, Disgust, Fear, Surprise" in note and "counted as Other" in note for note in report.notes)


def test_audio_and_transcripts(tmp_path):
    write_audio(write_labels(tmp_path), seconds=2.0)
    (tmp_path / "Audios" / "a.wav").rename(tmp_path / "Audios" / "A.WAV")
    (tmp_path / "Transcripts").mkdir()
    for clip, data in {"a": b"Well,  hello.\r\n", "b": b"", "c": "très bien".encode("latin-1")}.items():
        (tmp_path / "Transcripts" / f"{clip}.txt").write_bytes(data)
    rows, report = load(tmp_path, audio=True)
    assert rows["a"]["audio"] == {"path": str(tmp_path / "Audios" / "A.WAV"), "bytes": None}
    assert rows["a"]["duration"] == 2.0
    assert [rows[clip]["transcript"] for clip in "abcd"] == ["Well, hello.", "", "très bien", ""]
    assert "3 transcripts are missing (d, e, f)." in report.notes
    assert "1 transcripts are empty (b)." in report.notes
    assert "1 transcripts are not UTF-8, read as Latin-1 (c)." in report.notes


def test_minimum_seconds(tmp_path):
    write_audio(write_labels(tmp_path), seconds=2.0)
    write_audio(tmp_path, seconds=3.5, names=["b.wav"])
    rows, report = load(tmp_path, audio=True, minimum_seconds=3)
    assert set(rows) == {"b"} and len(report.left_out["shorter than 3 s"]) == 5
    with pytest.raises(CorpusError, match="minimum_seconds needs the recordings"):
        load(tmp_path, minimum_seconds=3)


def test_recordings_that_are_missing_truncated_empty_or_no_audio(tmp_path):
    write_audio(write_labels(tmp_path))
    audios = tmp_path / "Audios"
    (audios / "a.wav").unlink()
    with pytest.raises(CorpusError, match=r"1 of 6 recordings .* are missing in .*Audios: a.wav. Complete the folder"):
        load(tmp_path, audio=True)
    shutil.copy(audios / "b.wav", audios / "a.wav")
    whole = (audios / "b.wav").read_bytes()
    for content, problem in (
        (whole[:5000], "truncated"),
        (b"", "zero-length"),
        (b"text" * 99, "not readable as audio"),
    ):
        (audios / "a.wav").write_bytes(content)
        with pytest.raises(CorpusError, match=rf"Audio file .*a\.wav is {problem}"):
            load(tmp_path, audio=True)
        rows, report = load(tmp_path, audio=True, strict=False)
        assert set(rows) == set("bcdef")
        assert [len(items) for items in report.left_out.values()] == [1]


def test_recordings_that_no_label_file_lists(tmp_path):
    write_audio(write_labels(tmp_path), names=[*(clip[0] for clip in CLIPS), "z.wav"])
    rows, report = load(tmp_path, audio=True)
    assert "z" not in rows
    assert "1 recordings are not in the labels (z.wav, ...); unlisted_split loads them." in report.notes
    rows, _ = load(tmp_path, audio=True, unlisted_split="Test3")
    assert rows["z"]["split"] == "test3" and rows["z"]["label"] == -100 and len(rows) == len(CLIPS) + 1


def test_audio_in_another_format_and_in_subfolders(tmp_path):
    write_audio(write_labels(tmp_path))
    audios = tmp_path / "Audios"
    soundfile.write(audios / "a.flac", np.zeros(16000), 16000)
    (audios / "a.wav").unlink()
    rows, _ = load(tmp_path, audio=True)
    assert Path(rows["a"]["audio"]["path"]).name == "a.flac"
