"""Anyone's table in canonical rows: every file form, rows per clip and per annotation, and what can be wrong in it."""

import csv
import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from sailer.data import CorpusError, CorpusReport, LabelSet, load_corpus
from sailer.data.schema import PRIMARY_LABELS, SECONDARY_LABELS

FOUR = LabelSet(
    ("Neutral", "Happy", "Sad", "Angry"), majority=("Neutral",), scored=("Neutral", "Happy", "Sad", "Angry")
)
COLUMNS = {
    "audio": "file",
    "transcript": "text",
    "label": "emotion",
    "secondary": "others",
    "attributes": {"arousal": "act", "valence": "val"},
    "speaker": "who",
    "sex": "gender",
    "age": "years",
    "split": "part",
}
OPTIONS = {
    "label_set": FOUR,
    "columns": COLUMNS,
    "label_names": {"ang": "Angry", "hap": "Happy", "xxx": "no agreement", "oth": None},
    "attribute_scale": [1, 5],
    "split_names": {"Session5": "test", "Session1": "train"},
}
ROWS = [
    *({"file": "wav/a.wav", "text": "Hello,  «you»", "emotion": "ang", "others": "Annoyed, Frustrated"},),
    *({"file": "wav/b.wav", "text": "", "emotion": "happy", "others": ""},),
    *({"file": "wav/c.wav", "text": "So", "emotion": "xxx", "others": "Sad"},),
    *({"file": "wav/d.wav", "text": "So", "emotion": "oth", "others": "Sad"},),
    *({"file": "wav/e.wav", "text": "So", "emotion": "", "others": ""},),
]
for position, row in enumerate(ROWS):
    row |= {"act": "4", "val": "" if position else "2.5", "who": f"s{position % 2}", "gender": "FM"[position % 2]}
    row |= {"years": "" if position else "31", "part": "Session5" if position % 2 else "Session1"}


def write(root, rows=ROWS, form="csv", name="table", **options):
    root.mkdir(exist_ok=True)
    file = root / f"{name}.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(file, "w", newline="", **options) as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return file


def write_audio(root, names=None):
    for name in names or [row["file"] for row in ROWS]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, np.zeros(16000), 16000, format="WAV")


def load(path, **options):
    report = CorpusReport()
    datasets = load_corpus("manifest", path, report=report, **{"audio": False, **options})
    return {row["id"]: {**row, "split": split} for split, rows in datasets.items() for row in rows}, report


def edited(column, value, row=0):
    rows = [dict(row) for row in ROWS]
    rows[row][column] = value
    return rows


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet"])
def test_a_row_per_clip_in_every_form(tmp_path, form):
    rows, report = load(write(tmp_path, form=form), **OPTIONS)
    assert {clip: row["split"] for clip, row in rows.items()} == {
        **{"wav/a": "train", "wav/b": "test", "wav/c": "train", "wav/e": "train"}
    }
    a = rows["wav/a"]
    assert a["label"] == 3 and a["votes"] == [0, 0, 0, 1]
    assert a["secondary_votes"] == [float(name in ("Annoyed", "Frustrated")) for name in SECONDARY_LABELS]
    np.testing.assert_allclose(a["attributes"], [0.75, 0.375, np.nan], rtol=1e-6)
    assert (a["transcript"], a["speaker"], a["sex"], a["age"]) == ("Hello, «you»", "s0", "female", 31)
    assert rows["wav/b"]["label"] == 1 and math.isnan(rows["wav/b"]["age"]) and rows["wav/b"]["sex"] == "male"
    assert rows["wav/c"]["label"] == -1 and rows["wav/e"]["label"] == -100 and sum(rows["wav/c"]["votes"]) == 0
    place = {"parquet": "row 4", "jsonl": "line 4"}.get(form, "line 5")
    assert report.left_out == {"label or vote 'oth', dropped by label_names": [place]}


def test_byte_order_mark_carriage_returns_latin_1_and_a_line_break_in_a_cell(tmp_path):
    file = write(tmp_path, edited("text", "two\nlines", 1))
    text = file.read_text()
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load(file, **OPTIONS)[0]["wav/b"]["transcript"] == "two lines"
    file.write_bytes(text.replace("\n", "\r\n").encode("latin-1"))
    rows, report = load(file, **OPTIONS)
    assert rows["wav/a"]["transcript"] == "Hello, «you»" and rows["wav/b"]["transcript"] == "two lines"
    assert any("not UTF-8: read as Latin-1" in note for note in report.notes)
    # The line in a message is the one where the row begins.
    file.write_text(text.replace("xxx", "yyy"))
    with pytest.raises(CorpusError, match=r"table.csv, line 5: unknown label 'yyy'"):
        load(file, **OPTIONS)


def test_own_names_need_no_mapping(tmp_path):
    rows = [{"audio": "x.wav", "label": "fear", "speaker": 7, "arousal": 7.0, "valence": None, "dominance": 1.0}]
    rows, _ = load(write(tmp_path, rows, "parquet"))
    assert rows["x"]["label"] == PRIMARY_LABELS.index("Fear") and rows["x"]["speaker"] == "7"
    np.testing.assert_allclose(rows["x"]["attributes"], [1, np.nan, 0])
    assert rows["x"]["split"] == "train"


@pytest.mark.parametrize("with_annotator", [True, False])
def test_a_row_per_annotation(tmp_path, with_annotator):
    answers = [("a", "w1", "ang", "Annoyed", 2), ("a", "w2", "ang", "Annoyed,Annoyed", 4), ("b", "w1", "oth", "", 1)]
    answers += [("a", "w3", "hap", "", None), ("a", "w1", "ang", "Annoyed", 2), ("c", "w1", "hap", "", 3)]
    answers += [("c", "w2", "ang", "", 3)]
    rows = [dict(zip(("clip", "rater", "answer", "others", "act"), answer, strict=True)) for answer in answers]
    columns = {"id": "clip", "label": "answer", "secondary": "others", "attributes": {"arousal": "act"}}
    columns |= {"annotator": "rater"} if with_annotator else {}
    options = {**OPTIONS, "columns": columns, "rows": None if with_annotator else "annotation"}
    rows, report = load(write(tmp_path, rows, "jsonl"), **options)
    assert set(rows) == {"a", "c"}
    # The first annotator's repeated answer is one answer where annotators are known.
    angry = 2 if with_annotator else 3
    assert rows["a"]["votes"] == [0, 1, 0, angry] and rows["a"]["label"] == 3 and rows["c"]["label"] == -1
    assert rows["a"]["secondary_votes"][SECONDARY_LABELS.index("Annoyed")] == angry
    assert rows["a"]["attributes"][0] == pytest.approx((np.mean([2, 4] if with_annotator else [2, 4, 2]) - 1) / 4)
    assert any("repeats 1 rows" in note for note in report.notes) == with_annotator
    assert report.left_out == {"label or vote 'oth', dropped by label_names": ["line 3"]}


def test_votes_as_counts_lists_and_objects(tmp_path):
    rows = [{"file": "a.wav", "n_ang": "2", "n_hap": "", "n_sad": "1"}]
    columns = {"audio": "file", "votes": {"ang": "n_ang", "hap": "n_hap", "Sad": "n_sad"}}
    rows, _ = load(write(tmp_path, rows), **OPTIONS | {"columns": columns})
    assert rows["a"]["votes"] == [0, 0, 1, 2] and rows["a"]["label"] == 3
    columns = {"audio": "file", "votes": "votes"}
    for votes in (
        *("ang;ang;sad", "ang|ang| Sad", '["ang", "ang", "sad"]', '{"ang": 2, "Sad": 1}', ["ang", "ang", "sad"]),
        *({"ang": 2, "sad": 1}, [0, 0, 1, 2], [0.0, 0.0, 1.0, 2.0]),
    ):
        rows, _ = load(write(tmp_path, [{"file": "a.wav", "votes": votes}], "jsonl"), **OPTIONS | {"columns": columns})
        assert rows["a"]["votes"] == [0, 0, 1, 2], votes


def test_published_label_stands_beside_votes(tmp_path):
    rows = [{"file": "a.wav", "label": "sad", "votes": "ang;ang;sad"}]
    columns = {"audio": "file", "votes": "votes", "label": "label"}
    rows, _ = load(write(tmp_path, rows), **OPTIONS | {"columns": columns})
    assert rows["a"]["votes"] == [0, 0, 1, 2] and rows["a"]["label"] == 2


def test_recordings(tmp_path):
    file = write(tmp_path)
    write_audio(tmp_path)
    (tmp_path / "wav" / "b.wav").rename(tmp_path / "wav" / "B.WAV")
    rows, _ = load(file, audio=True, **OPTIONS)
    assert rows["wav/b"]["audio"]["path"] == str(tmp_path / "wav" / "B.WAV") and rows["wav/a"]["duration"] == 1
    # An absolute path is taken where it lies in the folder of the recordings.
    moved = write(tmp_path / "elsewhere", edited("file", str(tmp_path / "wav" / "a.wav")))
    rows, _ = load(moved, audio=True, audio_folder=str(tmp_path), **OPTIONS)
    assert len(rows) == 4
    assert load(file, audio=True, splits=["test"], **OPTIONS)[0].keys() == {"wav/b"}
    with pytest.raises(CorpusError, match=r"gave no clips.*shorter than 2"):
        load(file, audio=True, minimum_seconds=2, **OPTIONS)
    with pytest.raises(CorpusError, match="minimum_seconds needs the recordings"):
        load(file, minimum_seconds=2, **OPTIONS)


@pytest.mark.parametrize("path", ["../secret.wav", "/etc/passwd", "wav/../../secret.wav"])
def test_a_path_that_leaves_the_corpus_folder(tmp_path, path):
    (tmp_path / "corpus").mkdir()
    write_audio(tmp_path, ["secret.wav"])
    write_audio(tmp_path / "corpus")
    file = write(tmp_path / "corpus", edited("file", path))
    with pytest.raises(CorpusError, match=r"leaves the folder .*corpus"):
        load(file, audio=True, **OPTIONS)
    rows, report = load(file, audio=True, strict=False, **OPTIONS)
    assert set(rows) == {"wav/b", "wav/c", "wav/e"} and len(report.left_out["path outside it (table.csv)"]) == 1


@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "zero-length"), (b"text", "not readable"), (None, "missing"), (5000, "truncated")]
)
def test_unusable_recordings(tmp_path, content, problem):
    file = write(tmp_path)
    write_audio(tmp_path)
    target = tmp_path / "wav" / "a.wav"
    content = target.read_bytes()[:content] if isinstance(content, int) else content
    target.write_bytes(content) if content is not None else target.unlink()
    with pytest.raises(CorpusError, match=problem):
        load(file, audio=True, **OPTIONS)
    rows, report = load(file, audio=True, strict=False, **OPTIONS)
    assert set(rows) == {"wav/b", "wav/c", "wav/e"}
    assert [len(items) for reason, items in report.left_out.items() if problem in reason] == [1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"audio": "fiel"},
            r"table.csv has no column 'fiel', which is to be audio \(did you mean 'file'\?\); it has \['file",
        ),
        ({"audio": "file", "attributes": {"arousal": "akt"}}, r"no column 'akt', .* \(did you mean 'act'\?\)"),
        ({"audio": "file", "lable": "emotion"}, r"unknown key 'lable' \(did you mean 'label'\?\); known are"),
        (
            {"audio": "file", "attributes": {"arusal": "act"}},
            r"attributes has no 'arusal' \(did you mean 'arousal'\?\)",
        ),
        ({"audio": "file", "attributes": "act"}, "it takes a mapping such as"),
        ({"audio": "file", "speaker": {"a": "who"}}, "it takes one column"),
        (
            {"audio": "file", "votes": {"Agry": "act"}},
            r"votes has 'Agry' \(did you mean 'Angry'\?\), which is no label",
        ),
        ({"label": "emotion"}, "none is said to be the clip's audio or id"),
        (None, "none is said to be the clip's audio or id"),
    ],
)
def test_mappings_that_do_not_fit(tmp_path, columns, message):
    with pytest.raises(CorpusError, match=message):
        load(write(tmp_path), **OPTIONS | {"columns": columns})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": "clips"}, "rows is 'clips'; it is 'clip' or 'annotation'"),
        ({"attribute_scale": [5, 1]}, "attribute_scale is .* give the lowest and the highest"),
        ({"label_names": {"ang": "Angri"}}, r"'ang' is to be 'Angri', which is not in the label set .*'Angry'"),
        ({"split_names": {"Session1": "trian"}}, "split 'trian' is none of Train"),
        ({"split_fractions": {"test": 0.1}}, "A split column and split_fractions are both given"),
        ({"colums": {}}, r"no option 'colums' \(did you mean 'columns'\?\)"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    with pytest.raises(CorpusError, match=message):
        load(write(tmp_path), **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("column", "value", "message", "kept"),
    [
        ("emotion", "hpy", r"table.csv, line 2: unknown label 'hpy'.*known are \['Neutral', 'Happy', .*'ang'", 3),
        ("others", "Bored", r"line 2: unknown label 'Bored'.*known are \['Angry', 'Sad'", 4),
        ("act", "6", r"line 2: arousal is 6, outside attribute_scale \[1, 5\]", 4),
        ("act", "high", "line 2: arousal is 'high', not a number", 4),
        ("years", "old", "line 2: age is 'old', not a number", 4),
        ("part", "Session9", "line 2: split 'Session9' is none of .* say with split_names", 4),
        ("file", "", "line 2: the row names no clip", 3),
    ],
)
def test_a_value_that_cannot_be_read(tmp_path, column, value, message, kept):
    file = write(tmp_path, edited(column, value))
    with pytest.raises(CorpusError, match=message):
        load(file, **OPTIONS)
    rows, report = load(file, strict=False, **OPTIONS)
    assert len(rows) == kept
    assert sum(len(items) for reason, items in report.left_out.items() if "dropped" not in reason) == 1


@pytest.mark.parametrize("votes", ["-1", "inf", "many"])
def test_impossible_votes(tmp_path, votes):
    file = write(tmp_path, [{"file": "a.wav", "n": votes, "m": 1}])
    options = OPTIONS | {"columns": {"audio": "file", "votes": {"Sad": "n", "Happy": "m"}}}
    with pytest.raises(CorpusError, match="line 2: votes of Sad is"):
        load(file, **options)
    rows, report = load(file, strict=False, **options)
    assert rows["a"]["votes"] == [0, 1, 0, 0] and sum(map(len, report.left_out.values())) == 1


def test_duplicate_clips(tmp_path):
    rows, report = load(write(tmp_path, [*ROWS, ROWS[0]]), **OPTIONS)
    assert len(rows) == 4 and any("repeats 1 rows with equal content: read once" in note for note in report.notes)
    file = write(tmp_path, [*ROWS, {**ROWS[0], "emotion": "hap"}])
    with pytest.raises(
        CorpusError, match=r"line 7: clip 'wav/a' was already at line 2 with different content .*rows: ann"
    ):
        load(file, **OPTIONS)
    rows, report = load(file, strict=False, **OPTIONS)
    assert rows["wav/a"]["label"] == 3 and report.left_out["second row of a clip (table.csv)"] == ["line 7"]


def test_annotations_of_a_clip_that_differ_in_what_they_share(tmp_path):
    rows = [{"file": "a.wav", "emotion": "ang", "who": "s1"}, {"file": "a.wav", "emotion": "ang", "who": "s2"}]
    options = OPTIONS | {"columns": {"audio": "file", "label": "emotion", "speaker": "who"}, "rows": "annotation"}
    with pytest.raises(CorpusError, match=r"line 2: the rows of clip 'a' differ in speaker: \['s1', 's2'\]"):
        load(write(tmp_path, rows), **options)
    rows, _ = load(write(tmp_path, rows), strict=False, **options)
    assert rows["a"]["speaker"] == "s1" and rows["a"]["votes"] == [0, 0, 0, 2]


@pytest.mark.parametrize(
    ("form", "spoil", "message", "kept"),
    [
        ("csv", lambda text: text.replace("wav/b.wav,", "wav/b.wav,x,"), "line 3: 11 cells under 10 columns", 3),
        ("jsonl", lambda text: text.replace('{"file": "wav/b', '{file: "wav/b'), "line 2: not a JSON object", 3),
        (
            "csv",
            lambda text: text.replace("wav/b.wav", '"wav/b.wav'),
            "line 3: unexpected end of data. Close its",
            None,
        ),
        ("csv", lambda text: text.replace("text", "file", 1), r"two columns of the same name: \['file'\]", None),
        ("parquet", lambda text: "no parquet", "is not a Parquet file", None),
        ("csv", lambda text: text.splitlines()[0], "has no rows", None),
    ],
)
def test_spoilt_files(tmp_path, form, spoil, message, kept):
    file = write(tmp_path, form=form)
    file.write_text(spoil(file.read_text(errors="replace")))
    with pytest.raises(CorpusError, match=message):
        load(file, **OPTIONS)
    if kept:
        rows, report = load(file, strict=False, **OPTIONS)
        assert len(rows) == kept and len(report.left_out[f"malformed row (table.{form})"]) == 1


def test_where_the_table_is(tmp_path):
    with pytest.raises(CorpusError, match="is read from a file"):
        load(None)
    with pytest.raises(CorpusError, match="does not exist"):
        load(tmp_path / "none.csv")
    with pytest.raises(CorpusError, match=r"holds 0 tables"):
        load(tmp_path)
    file = write(tmp_path)
    assert len(load(tmp_path, **OPTIONS)[0]) == 4
    file.rename(tmp_path / "table.xlsx")
    with pytest.raises(CorpusError, match=r"is none of \.csv, \.tsv"):
        load(tmp_path / "table.xlsx")
    semicolons = write(tmp_path, name="semicolons")
    semicolons.write_text("file;emotion\na.wav;ang\n")
    rows, _ = load(semicolons, **OPTIONS | {"columns": {"audio": "file", "label": "emotion"}}, delimiter=";")
    assert rows["a"]["label"] == 3


def test_split_fractions_keep_speakers_apart(tmp_path):
    rows = [{"file": f"{clip}.wav", "emotion": "ang", "who": f"s{clip % 20}"} for clip in range(200)]
    options = OPTIONS | {"columns": {"audio": "file", "label": "emotion", "speaker": "who"}}
    options |= {"split_fractions": {"validation": 0.1, "test": 0.2}}
    rows, _ = load(write(tmp_path, rows), **options)
    speakers = {}
    for row in rows.values():
        speakers.setdefault(row["speaker"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in speakers.values())
    splits = [row["split"] for row in rows.values()]
    assert [splits.count(split) for split in ("train", "validation", "test")] == [140, 20, 40]
    with pytest.raises(CorpusError, match="give shares from 0 to 1"):
        load(tmp_path / "table.csv", **options | {"split_fractions": {"test": 1}})


def test_labels_without_a_column_of_recordings(tmp_path):
    file = write(tmp_path, [{"clip": "a", "emotion": "ang"}])
    options = OPTIONS | {"columns": {"id": "clip", "label": "emotion"}}
    assert load(file, **options)[0]["a"]["label"] == 3
    with pytest.raises(CorpusError, match="no column said to be audio"):
        load(file, audio=True, **options)


def test_names_that_occur_nowhere_are_noted(tmp_path):
    _, report = load(write(tmp_path), **OPTIONS | {"label_names": {**OPTIONS["label_names"], "fru": "Angry"}})
    assert "label_names: hap, fru occur in no row." in report.notes
