"""The challenge's files: each file of the list once, legal codes and ranges; what is short or strange is refused."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer import SpeechEmotionPipeline
from sailer.cli import main
from sailer.data.challenge import CODES, check_submission, read_file_list, write_submission
from sailer.data.schema import CorpusError
from sailer.ensemble_sailer import load_system


@pytest.fixture
def waves(tmp_path: Path, different_clips: list[np.ndarray]) -> Path:
    folder = tmp_path / "Audios"
    folder.mkdir()
    for index, clip in enumerate(different_clips):
        soundfile.write(folder / f"MSP_{index}.wav", clip, 16000, subtype="FLOAT")
    return folder


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_list_is_a_column_or_a_line_each(tmp_path: Path) -> None:
    assert read_file_list(written(tmp_path / "a.csv", "Split_Set,FileName", "Test3,b.wav", "", "Test3,a.wav")) == [
        *("b.wav", "a.wav")
    ]
    assert read_file_list(written(tmp_path / "b.txt", "b.wav", "a.wav")) == ["b.wav", "a.wav"]
    for lines, message in (
        (["FileName", "a.wav", "a.wav"], r"line 3: a\.wav was named in line 2"),
        (["FileName"], "names no files"),
        (["FileName,x", ",1"], "line 2: no file"),
        (["Name,x", "a.wav,1"], "no FileName"),
    ):
        with pytest.raises(CorpusError, match=message):
            read_file_list(written(tmp_path / "c.csv", *lines))


def test_files_are_written_in_the_list_s_order_and_scale(tmp_path: Path) -> None:
    path = write_submission(
        "categorical", tmp_path / "c.csv", {"a.wav": "Surprise", "b.wav": "Neutral"}, ["b.wav", "a.wav"]
    )
    assert path.read_text() == "FileName,EmoClass\nb.wav,N\na.wav,U\n"
    path = write_submission("attributes", tmp_path / "a.csv", {"a.wav": [0, 0.5, 1]})
    assert path.read_text() == "FileName,EmoAct,EmoVal,EmoDom\na.wav,1.000000,4.000000,7.000000\n"
    assert sorted(CODES.values()) == sorted("NHSACUDF")


@pytest.mark.parametrize(
    ("kind", "said", "message"),
    [
        ("categorical", {"a.wav": "Sad"}, r"lacks 1 of the 2 files of the list: b\.wav"),
        ("categorical", {"a.wav": "Sad", "b.wav": "Sad", "c.wav": "Sad"}, r"line 4: c\.wav is not in the list"),
        ("categorical", {"a.wav": "Sad", "b.wav": "Other"}, "line 3: 'Other' for b.wav; the codes are"),
        ("attributes", {"a.wav": [0, 0, 0], "b.wav": [0, 1.1, 0]}, "line 3: b.wav has .*from 1 to 7"),
        ("attributes", {"a.wav": [0, 0, 0], "b.wav": [0, float("nan"), 0]}, "from 1 to 7"),
        ("both", {}, "choose one of"),
    ],
)
def test_what_is_short_or_strange_is_refused_and_not_written(
    kind: str, said: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=message):
        write_submission(kind, tmp_path / "s.csv", said, ["a.wav", "b.wav"])
    assert not (tmp_path / "s.csv").exists()


def test_a_file_that_others_wrote_is_checked(tmp_path: Path) -> None:
    for lines, message in (
        (["FileName,Emotion", "a.wav,N"], "must begin with FileName,EmoClass"),
        (["FileName,EmoClass", "a.wav,N", "a.wav,H"], "line 3: a.wav is there twice"),
        (["FileName,EmoClass", "a.wav"], "line 2: 1 cells"),
        (["FileName,EmoClass", "a.wav,neutral"], "'neutral'"),
    ):
        with pytest.raises(CorpusError, match=message):
            check_submission("categorical", written(tmp_path / "s.csv", *lines), ["a.wav"])
    with pytest.raises(CorpusError, match="no numbers"):
        check_submission(
            "attributes", written(tmp_path / "s.csv", "FileName,EmoAct,EmoVal,EmoDom", "a.wav,x,1,1"), ["a.wav"]
        )


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_predict_judges_the_files_of_the_list(
    format: str, waves: Path, tiny_speech_sailer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = written(tmp_path / "files.csv", "FileName", "MSP_5.wav", "MSP_2.wav")
    table = tmp_path / f"out.{format}"
    line = ["predict", str(tiny_speech_sailer), str(waves), "--output", str(table), "--file_list", str(files)]
    assert main([*line, "--submission", "categorical"]) == 0
    made = tmp_path / "out_categorical.csv"
    assert capsys.readouterr().out.endswith(f"Result: {made}\n")
    model, processor = load_system(tiny_speech_sailer)
    classifier = SpeechEmotionPipeline(model=model, processor=processor, device="cpu")
    expected = [
        (name, CODES[classifier(str(waves / name), return_all=True)["label"]]) for name in ("MSP_5.wav", "MSP_2.wav")
    ]
    with made.open(newline="") as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == expected
    assert len(table.read_text().splitlines()) == 2 + (format == "csv")

    assert main([*line, "--submission", "attributes"]) == 2
    assert "no head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "more", "message"),
    [
        (["MSP_9.wav"], [], "names 1 files that are not among the recordings: MSP_9.wav"),
        (["MSP_1.wav", "MSP_1.wav"], [], "MSP_1.wav was named in line 1"),
        (["MSP_1.wav"], ["--min_confidence", "0.5"], "leave --min_confidence out"),
        (["MSP_8.wav"], [], "MSP_8.wav could not be used"),
    ],
)
def test_predict_refuses_a_list_that_it_cannot_fill(
    lines: list[str],
    more: list[str],
    message: str,
    waves: Path,
    tiny_speech_sailer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (waves / "MSP_8.wav").write_bytes(b"no audio")
    line = ["predict", str(tiny_speech_sailer), str(waves), "--output", str(tmp_path / "out.csv"), *more]
    files = written(tmp_path / "files.txt", *lines)
    assert main([*line, "--submission", "categorical", "--file_list", str(files)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out_categorical.csv").exists()
