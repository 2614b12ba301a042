"""`sailer predict`: what it finds, writes, keeps after an interruption and refuses."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sailer import SpeechEmotionPipeline
from sailer.cli import main
from sailer.inference.predict import (
    PredictionError,
    PredictionSettings,
    RowFile,
    find_recordings,
    load_classifier,
    predict,
)

from .sounds import noise

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of different length, one of them of 20 s in a folder below."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "below").mkdir()
    for index, seconds in enumerate((0.4, 1.1, 0.7, 2.0, 0.9)):
        soundfile.write(folder / f"clip{index}.wav", noise(seconds, seed=index), 16000)
    soundfile.write(folder / "below" / "long.flac", noise(20, seed=9), 16000)
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture
def settings(tiny_speech_sailer: Path) -> PredictionSettings:
    return PredictionSettings(str(tiny_speech_sailer))


def read(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_the_pipelines_results(
    clips: Path, tiny_speech_sailer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "new" / "out.csv"
    assert main(["predict", str(tiny_speech_sailer), str(clips), "--output", str(output), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Result: {output}"
    rows = read(output)
    assert [Path(row["file"]).name for row in rows] == ["long.flac", *(f"clip{i}.wav" for i in range(5))]
    assert [row["seconds"] for row in rows] == ["20.0", "0.4", "1.1", "0.7", "2.0", "0.9"]
    classifier = load_classifier(PredictionSettings(str(tiny_speech_sailer)))
    for row in rows:
        result = classifier(row["file"], return_all=True)
        for score in result["primary"]:
            assert float(row[score["label"]]) == pytest.approx(score["score"], abs=1e-5)
        assert row["label"] == result["label"] and row["score"] == row[row["label"]] and row["error"] == ""


def test_json_lines_with_every_head(clips: Path, tiny_sailer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "system"
    shutil.copytree(tiny_sailer, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_dropout": 0.2}))
    output = tmp_path / "out.jsonl"
    assert predict(PredictionSettings(str(folder)), [str(clips / "clip0.wav")], output) == 0
    (row,) = read(output)
    assert {"file", "seconds", "label", "score", "Angry", "secondary_Amused", "arousal", "female", "age"} <= set(row)
    assert isinstance(row["age"], float) and "error" not in row
    assert sum(value for name, value in row.items() if name.startswith("secondary_")) == pytest.approx(1, abs=1e-4)


def test_a_bad_file_is_recorded_and_the_others_go_on(
    clips: Path, tiny_speech_sailer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "with bad"
    shutil.copytree(clips, folder)
    (folder / "clip1.wav").write_bytes(b"RIFF no audio")
    (folder / "clip2.wav").write_bytes(b"")
    arguments = ["predict", str(tiny_speech_sailer), str(folder), "--output", str(tmp_path / "out.csv")]
    assert main(arguments) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"Result: {tmp_path / 'out.csv'}"
    rows = {Path(row["file"]).name: row for row in read(tmp_path / "out.csv")}
    assert "not readable audio" in rows["clip1.wav"]["error"] and "not readable audio" in rows["clip2.wav"]["error"]
    assert len(rows) == 6 and sum(row["label"] != "" for row in rows.values()) == 4
    assert main(arguments) == 1  # a failure that was recorded before still counts
    assert len(read(tmp_path / "out.csv")) == 6


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_stopped_run_goes_on(
    suffix: str, clips: Path, tiny_speech_sailer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_recordings([str(clips)])
    options = {"timeline": True, "embeddings": str(tmp_path / "embeddings.npz")}
    whole = PredictionSettings(str(tiny_speech_sailer), timeline=True, embeddings=str(tmp_path / "whole.npz"))
    predict(whole, files, tmp_path / f"whole{suffix}", batch_size=1)

    settings = PredictionSettings(str(tiny_speech_sailer), **options)
    output, timeline = tmp_path / f"out{suffix}", tmp_path / f"out_timeline{suffix}"
    postprocess, encoded = SpeechEmotionPipeline.postprocess, []
    encode = SpeechEmotionPipeline.encode

    def stop(self: SpeechEmotionPipeline, clip: object, **arguments: object) -> object:
        if len(read(output)) == 3 and "return_timestamps" not in arguments:
            raise KeyboardInterrupt
        return postprocess(self, clip, **arguments)

    def count(self: SpeechEmotionPipeline, items: list[str], *arguments: object, **more: object) -> object:
        encoded.extend(items)
        return encode(self, items, *arguments, **more)

    monkeypatch.setattr(SpeechEmotionPipeline, "postprocess", stop)
    with pytest.raises(KeyboardInterrupt):
        predict(settings, files, output, batch_size=1)
    monkeypatch.setattr(SpeechEmotionPipeline, "postprocess", postprocess)
    monkeypatch.setattr(SpeechEmotionPipeline, "encode", count)
    lines = output.read_text().splitlines()
    output.write_text("\n".join(lines) + "\n" + lines[-1].replace("clip", "CLIP")[:40])  # a torn row
    with timeline.open("a") as file:
        file.write(
            timeline.read_text().splitlines()[-1].replace("clip1.wav", "clip2.wav") + "\n"
        )  # of a file without row

    predict(settings, files, output, batch_size=1)
    assert encoded == files[3:]
    assert read(output) == read(tmp_path / f"whole{suffix}")
    assert read(timeline) == read(tmp_path / f"whole_timeline{suffix}")
    with np.load(tmp_path / "embeddings.npz") as one, np.load(tmp_path / "whole.npz") as other:
        assert one["files"].tolist() == other["files"].tolist() == files
        np.testing.assert_array_equal(one["embeddings"], other["embeddings"])
    assert not list(tmp_path.glob("*.part"))


def test_embeddings_of_a_killed_run_are_in_the_journal(
    settings: PredictionSettings, clips: Path, tmp_path: Path
) -> None:
    settings.embeddings = str(tmp_path / "e.safetensors")
    files = find_recordings([str(clips)])
    predict(settings, files, tmp_path / "out.csv")
    with safe_open(settings.embeddings, framework="np") as stored:
        embeddings, names = stored.get_tensor("embeddings"), json.loads(stored.metadata()["files"])
    assert names == files and embeddings.shape == (6, 256) and embeddings.dtype == np.float32
    # Killed after five files: there is a journal, and no matrix yet.
    journal = [
        json.dumps({"file": file, "embedding": row.tolist()}) + "\n"
        for file, row in zip(files, embeddings, strict=True)
    ]
    Path(settings.embeddings).unlink()
    (tmp_path / "e.safetensors.part").write_text("".join(journal[:5]) + journal[5][:30])
    rows = (tmp_path / "out.csv").read_text().splitlines(keepends=True)
    (tmp_path / "out.csv").write_text("".join(rows[:-1]))
    predict(settings, files, tmp_path / "out.csv")
    with safe_open(settings.embeddings, framework="np") as stored:
        np.testing.assert_allclose(stored.get_tensor("embeddings"), embeddings, atol=1e-6)


def test_timeline(settings: PredictionSettings, clips: Path, tmp_path: Path) -> None:
    settings.timeline = True
    predict(settings, [str(clips / "below")], tmp_path / "out.csv")
    windows, (whole,) = read(tmp_path / "out_timeline.csv"), read(tmp_path / "out.csv")
    assert [(float(row["start"]), float(row["end"])) for row in windows] == [(0, 15), (10, 20)]
    mean = (15 * float(windows[0]["Angry"]) + 10 * float(windows[1]["Angry"])) / 25
    assert float(whole["Angry"]) == pytest.approx(mean, abs=1e-5)
    (picture,) = (tmp_path / "out_timeline").iterdir()
    assert picture.name.startswith("long-") and picture.read_bytes().startswith(PNG)


def test_min_confidence(settings: PredictionSettings, clips: Path, tmp_path: Path) -> None:
    settings.min_confidence = 0.999
    predict(settings, [str(clips / "clip0.wav")], tmp_path / "out.csv")
    (row,) = read(tmp_path / "out.csv")
    assert row["label"] == "undecided" and 0 < float(row["score"]) < 0.999


def test_find_recordings(clips: Path) -> None:
    def names(*paths: str) -> list[str]:
        return [Path(file).name for file in find_recordings(paths)]

    assert names(str(clips)) == ["long.flac", *(f"clip{i}.wav" for i in range(5))]
    assert names(f"{clips}/clip[12].wav") == ["clip1.wav", "clip2.wav"]
    assert names(f"{clips}/**/*.flac", str(clips / "below")) == ["long.flac"]
    assert names(str(clips / "notes.txt")) == ["notes.txt"]  # a file that is named is tried
    assert names("https://example.org/a.wav", "https://example.org/a.wav") == ["a.wav"]


def test_paths_without_audio(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        find_recordings([str(clips), "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"\*\.ogg: no such file"):
        find_recordings([f"{clips}/*.ogg"])
    with pytest.raises(FileNotFoundError, match=r"has no audio files \(\.aif"):
        find_recordings([str(tmp_path)])


def test_other_settings_are_not_mixed(settings: PredictionSettings, clips: Path, tmp_path: Path) -> None:
    predict(settings, [str(clips / "clip0.wav")], tmp_path / "out.csv")
    settings.min_confidence = 0.5
    with pytest.raises(PredictionError, match=r"other settings \(min_confidence was 0\.0\)"):
        predict(settings, [str(clips)], tmp_path / "out.csv")


def test_an_output_of_another_kind_is_left_alone(settings: PredictionSettings, clips: Path, tmp_path: Path) -> None:
    for name in ("mine.csv", "mine.jsonl"):
        (tmp_path / name).write_text('{"some": "thing"}\n')
        with pytest.raises(PredictionError, match="exists and is not what a stopped run left"):
            predict(settings, [str(clips)], tmp_path / name)
        assert (tmp_path / name).read_text() == '{"some": "thing"}\n'


def test_a_row_stays_on_its_line(tmp_path: Path) -> None:
    for format in ("csv", "jsonl"):
        rows = RowFile(tmp_path / format, ["file", "error"], format)
        rows.append([{"file": 'a "quoted", file.wav', "error": "one\nline"}])
        again = RowFile(tmp_path / format, ["file", "error"], format)
        assert again.files == {'a "quoted", file.wav'} == again.failed
        assert again.read()[0]["error"] == "one line"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min_confidence", "2"], "between 0 and 1"),
        (["--embeddings", "e.pt"], r"\.safetensors"),
        (["--output", "out.xls"], "--format"),
        (["--transcriber", "some/model"], "speech-only"),
    ],
)
def test_bad_option(
    options: list[str],
    message: str,
    clips: Path,
    tiny_speech_sailer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(tiny_speech_sailer), str(clips), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("out*.csv"))


def test_a_system_that_needs_transcripts(tiny_sailer: Path, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match="--transcriber"):
        predict(PredictionSettings(str(tiny_sailer)), [str(clips)], tmp_path / "out.csv")


@pytest.mark.parametrize("damage", ["missing", "truncated", "pickle", "lacking"])
def test_a_model_without_whole_weights(
    damage: str, tiny_speech_sailer: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "system"
    shutil.copytree(tiny_speech_sailer, folder)
    weights = folder / "model.safetensors"
    tensors, content = load_file(weights), weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    elif damage == "lacking":
        del tensors["heads.primary.0.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    assert main(["predict", str(folder), str(clips), "--output", str(tmp_path / "out.csv")]) == 2
    messages = {
        "missing": "no file named model.safetensors",
        "truncated": "truncated or damaged",
        "pickle": "Pickled weights are refused",
        "lacking": "heads.primary.0.weight",
    }
    assert messages[damage] in capsys.readouterr().err
