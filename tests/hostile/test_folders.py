"""`sailer predict` among odd names, strange entries and files that are not ours: a row each, nothing else touched."""

import csv
import json
import os
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sailer import SpeechEmotionPipeline
from sailer.cli import main
from sailer.inference.outputs import RowFile, named_file, written_name
from sailer.inference.predict import PredictionError, PredictionSettings, find_recordings, predict

RATE = 16000
NOISE = np.random.default_rng(0).normal(0, 0.1, RATE // 4)
PNG = b"\x89PNG"
ODD_NAMES = [
    *("plain.wav", "two\nlines.wav", "a\rreturn.wav", "\u2028line\x85ends.wav", "tab\tand bell\x07.wav"),
    *(
        "$_$x^^.wav",
        "\\frac{.wav",
        "$$.wav",
        "a, comma.wav",
        '"quoted".wav',
        "'; DROP TABLE.wav",
        "=1+1.wav",
        "-x.wav",
    ),
    *("ünï.wav", "感情.wav", "🙂.wav", "[1].wav", "*.wav", " .wav", "\\x41.wav", "\\x5cx41.wav", "\\n.wav", "%s.wav"),
    *(os.fsdecode(b"\xff\xfe.wav"), os.fsdecode(b"caf\xe9.wav"), os.fsdecode(b"\\xff.wav"), "x" * 240 + ".wav"),
]


@pytest.fixture
def settings(tiny_speech_sailer: Path) -> PredictionSettings:
    return PredictionSettings(str(tiny_speech_sailer))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return recordings(tmp_path / "clips", ["a.wav", "b.wav"])


def recordings(folder: Path, names: Iterable[str]) -> Path:
    folder.mkdir()
    for index, name in enumerate(names):
        soundfile.write(folder / "made", NOISE + index / 1000, RATE, format="WAV")
        (folder / "made").rename(folder / name)
    return folder


def read(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- names


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_odd_names_have_one_row_however_often_it_is_started(
    suffix: str, settings: PredictionSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recordings(tmp_path / "odd", ODD_NAMES)
    settings.embeddings = str(tmp_path / "e.safetensors")
    output = tmp_path / f"out{suffix}"
    encode, encoded = SpeechEmotionPipeline.encode, []

    def count(self: SpeechEmotionPipeline, items: list[str], **options: Any) -> Iterable:
        encoded.append(len(items))
        return encode(self, items, **options)

    monkeypatch.setattr(SpeechEmotionPipeline, "encode", count)
    for _ in range(3):
        assert predict(settings, [str(folder)], output) == 0
    assert encoded == [len(ODD_NAMES), 0, 0]
    rows = read(output)
    assert sorted(named_file(row["file"]) for row in rows) == sorted(str(folder / name) for name in ODD_NAMES)
    assert all(os.path.isfile(named_file(row["file"])) for row in rows)
    assert "plain.wav" in {Path(row["file"]).name for row in rows}


def test_odd_names_in_pictures(settings: PredictionSettings, tmp_path: Path) -> None:
    names = [name for name in ODD_NAMES if re.search(r"\$_|\n|x{9}|\udcff.*\udcfe", name)]
    assert len(names) == 4
    folder = recordings(tmp_path / "odd", names)
    settings.timeline = True
    assert predict(settings, [str(folder)], tmp_path / "out.csv") == 0
    pictures = list((tmp_path / "out_timeline").iterdir())
    assert len(pictures) == len(names) and all(picture.read_bytes().startswith(PNG) for picture in pictures)
    assert len({row["file"] for row in read(tmp_path / "out_timeline.csv")}) == len(names)


def test_names_are_written_so_that_they_can_be_read_back() -> None:
    names = {*ODD_NAMES, "\\", "\\x", "\\xg0", "\\\\x00", "\0", os.fsdecode(bytes(range(128, 256)))}
    written = {written_name(name) for name in names}
    assert len(written) == len(names) and {named_file(name) for name in written} == names
    assert all(name.isprintable() or name.isspace() for name in written) and all(map(str.encode, written))
    assert written_name("C:\\new folder\\ünï.wav") == "C:\\new folder\\ünï.wav"
    assert written_name("a\nb\udcff\\x41.wav") == r"a\x0ab\xff\x5cx41.wav"
    written_name("\ud800 as no file system has it \udfff").encode()


# ---- entries of a folder


def test_every_entry_with_an_audio_suffix_has_a_row(
    settings: PredictionSettings, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (clips / "to a.wav").symlink_to("a.wav")
    (clips / "dangling.wav").symlink_to("gone.wav")
    (clips / "loop.wav").symlink_to("loop.wav")
    os.mkfifo(clips / "pipe.flac")
    recordings(clips / "folder.wav", ["within.wav"])
    (clips / "PHONE.M4A").write_bytes(b"\0\0\0\x18ftypM4A ")
    (clips / "film.mp4").write_bytes(b"no film")
    (clips / "notes.txt").write_text("no audio")
    recordings(tmp_path / "elsewhere", ["c.wav"])
    (clips / "linked").symlink_to(tmp_path / "elsewhere")
    bad = {"dangling.wav", "loop.wav", "pipe.flac", "folder.wav", "PHONE.M4A", "film.mp4"}
    with caplog.at_level("WARNING", logger="sailer"):
        assert predict(settings, [str(clips), f"{clips}/*.wav"], tmp_path / "out.csv") == len(bad)
    rows = {Path(row["file"]).name: row for row in read(tmp_path / "out.csv")}
    assert set(rows) == {"a.wav", "b.wav", "to a.wav", "within.wav", *bad}
    assert {name for name, row in rows.items() if row["error"]} == bad
    assert "link to gone.wav" in rows["dangling.wav"]["error"] and "pipe" in rows["pipe.flac"]["error"]
    assert "linked is a link to a folder and not followed" in caplog.text
    assert predict(settings, [str(clips)], tmp_path / "out.csv") == len(bad)
    assert len(read(tmp_path / "out.csv")) == 4 + len(bad)


def test_a_path_that_is_named_is_tried_whatever_it_is(tmp_path: Path) -> None:
    (tmp_path / "dangling[1].wav").symlink_to("gone.wav")
    os.mkfifo(tmp_path / "pipe")
    named = [str(tmp_path / "dangling[1].wav"), str(tmp_path / "pipe"), "HTTP://host/a.wav"]
    assert find_recordings(named) == named


def test_what_was_cut_short_is_told_in_its_row(settings: PredictionSettings, clips: Path, tmp_path: Path) -> None:
    content = (clips / "a.wav").read_bytes()
    (clips / "half.wav").write_bytes(content[: len(content) // 2])
    assert predict(settings, [str(clips)], tmp_path / "out.csv") == 0
    rows = {Path(row["file"]).name: row for row in read(tmp_path / "out.csv")}
    assert re.search(r"half\.wav is cut short or damaged: the 0\.12 s", rows["half.wav"]["warning"])
    assert rows["half.wav"]["label"] and not rows["half.wav"]["error"] and not rows["a.wav"]["warning"]


# ---- failures past reading


def test_a_recording_that_fails_later_has_a_row_too(
    settings: PredictionSettings, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.timeline = True

    def draw(name: str, *arguments: object) -> None:
        if name.endswith("a.wav"):
            raise RuntimeError("no pen")

    monkeypatch.setattr("sailer.inference.predict.plot_timeline", draw)
    assert predict(settings, [str(clips)], tmp_path / "out.csv") == 1
    assert [row["error"] for row in read(tmp_path / "out.csv")] == ["RuntimeError: no pen", ""]
    assert {Path(row["file"]).name for row in read(tmp_path / "out_timeline.csv")} == {"b.wav"}


def test_a_system_that_fails_on_silence_ends_the_run(
    settings: PredictionSettings, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: SpeechEmotionPipeline, inputs: object) -> None:
        raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr(SpeechEmotionPipeline, "forward", forward)
    with pytest.raises(PredictionError, match="fails, on silence too: RuntimeError: CUDA error"):
        predict(settings, [str(clips)], tmp_path / "out.csv")
    assert read(tmp_path / "out.csv") == []  # so that another start tries them again


# ---- files that are not ours


def run(tiny: Path, clips: Path, *options: str) -> int:
    return main(["predict", str(tiny), str(clips), *options])


FOREIGN_OUTPUTS = {
    "no final newline.csv": b"my notes",
    "no final newline.jsonl": b'{"my": "notes"}',
    "a header of ours, unfinished.csv": b"file,seconds,label",
    "other columns.csv": b"file,mine\na.wav,1\n",
    "other fields.jsonl": b'{"file": "a.wav", "mine": 1}\n',
    "lists.jsonl": b"[1, 2]\n",
    "a list for a file.jsonl": b'{"file": ["a.wav"]}\n',
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "a long field.csv": b"notes\n" + b"x" * 200_000 + b"\n",
    "not UTF-8.csv": b"caf\xe9\n",
    "binary.csv": bytes(range(256)) * 9,
    "one line.csv": b"\n",
}


@pytest.mark.parametrize("with_settings", [False, True])
@pytest.mark.parametrize("name", FOREIGN_OUTPUTS)
def test_an_output_that_is_not_ours_is_refused_untouched(
    name: str, with_settings: bool, settings: PredictionSettings, clips: Path, tmp_path: Path
) -> None:
    output = tmp_path / name
    if with_settings:  # of a run whose output has been replaced since
        predict(settings, [str(clips)], output)
    output.write_bytes(FOREIGN_OUTPUTS[name])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(PredictionError, match=f"{re.escape(name)} exists and is not what a stopped run left"):
        predict(settings, [str(clips)], output)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_an_empty_output_may_be_begun(settings: PredictionSettings, clips: Path, tmp_path: Path) -> None:
    for name in ("out.csv", "out.jsonl"):
        (tmp_path / name).touch()
        assert predict(settings, [str(clips)], tmp_path / name) == 0
        assert len(read(tmp_path / name)) == 2


def test_an_output_that_is_no_file(
    tiny_speech_sailer: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "folder.csv", tmp_path / "pipe.csv"):
        assert run(tiny_speech_sailer, clips, "--output", str(path), "--format", "csv") == 2
        assert f"{path} exists and is not what a stopped run left (it is no file)" in capsys.readouterr().err
    assert (tmp_path / "folder.csv").is_dir() and (tmp_path / "pipe.csv").is_fifo()


@pytest.mark.parametrize("content", [b"[]", b"", b"{}", b"null", b'{"model": ', b"\xff", b"[" * 100_000])
def test_settings_that_are_none(
    content: bytes, tiny_speech_sailer: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output, path = tmp_path / "out.csv", tmp_path / "out.csv.settings.json"
    path.write_bytes(content)
    assert run(tiny_speech_sailer, clips, "--output", str(output)) == 2
    assert f"{path} is not what a run left" in capsys.readouterr().err
    assert path.read_bytes() == content and not output.exists()


def foreign_embeddings(name: str) -> bytes:
    path = Path(name)
    if name.startswith("pickle"):
        return pickle.dumps({"a": 1})
    if name.startswith("arrays"):
        with path.open("wb") as file:
            np.savez(file, mine=np.zeros(3))
    elif name.startswith("objects"):
        with path.open("wb") as file:
            np.savez(file, files=np.array(["a", None], object), embeddings=np.zeros((2, 3)))
    elif name.startswith("other shapes"):
        with path.open("wb") as file:
            np.savez(file, files=np.array(["a"]), embeddings=np.zeros(3, np.float32))
    elif name.startswith("another run"):
        with path.open("wb") as file:
            np.savez(file, files=np.array(["a.wav"]), embeddings=np.zeros((1, 3), np.float32))
    elif name.startswith("model"):
        from safetensors.numpy import save_file

        save_file({"weight": np.zeros(3)}, path)
    else:
        return b"my notes"
    return path.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        *("pickle.npz", "arrays.npz", "objects.npz", "other shapes.npz", "another run.npz", "text.npz"),
        *("model.safetensors", "text.safetensors"),
    ],
)
def test_embeddings_that_are_not_ours(
    name: str,
    tiny_speech_sailer: Path,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    content = foreign_embeddings(name)
    Path(name).write_bytes(content)
    assert run(tiny_speech_sailer, clips, "--output", "out.csv", "--embeddings", name) == 2
    assert re.search(f"{name} exists and .*choose another file for --embeddings", capsys.readouterr().err)
    assert Path(name).read_bytes() == content and sorted(os.listdir()) == sorted(["clips", name])


def test_a_journal_and_a_timeline_that_are_not_ours(settings: PredictionSettings, clips: Path, tmp_path: Path) -> None:
    settings.embeddings, settings.timeline = str(tmp_path / "e.npz"), True
    for name in ("e.npz.part", "out_timeline.csv"):
        (tmp_path / name).write_text("my notes")
        with pytest.raises(PredictionError, match=f"{name} exists and is not what"):
            predict(settings, [str(clips)], tmp_path / "out.csv")
        assert (tmp_path / name).read_text() == "my notes" and not (tmp_path / "out.csv").exists()
        (tmp_path / name).unlink()


def test_a_field_of_any_length_is_read_back(tmp_path: Path) -> None:
    rows = RowFile(tmp_path / "out.csv", ["file", "transcript"], "csv")
    rows.append([{"file": "a.wav", "transcript": "so happy " * 50_000}])
    limit = csv.field_size_limit()
    assert RowFile(tmp_path / "out.csv", ["file", "transcript"], "csv").read()[0]["transcript"] == "so happy " * 50_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "nonsense"], "device is 'nonsense', which torch cannot use here"),
        (["--device", ""], "device is ''"),
        (["--device", "meta"], "device is 'meta'"),
        (["--dtype", "nonsense"], "dtype is 'nonsense'; choose one of"),
        (["--dtype", "manual_seed"], "dtype is 'manual_seed'"),
        (["--batch_size", "0"], "batch_size is 0"),
        (["--num_workers", "-1"], "num_workers is -1"),
        (["--chunk_length_s", "nan"], "chunk_length_s is nan"),
        (["--stride_length_s", "inf"], "stride_length_s is inf"),
        (["--min_confidence", "nan"], "min_confidence is nan"),
    ],
)
def test_options_that_cannot_be(
    options: list[str],
    message: str,
    tiny_speech_sailer: Path,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tiny_speech_sailer, clips, *options) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == ["clips"]


def test_a_prior_that_is_not_known_ends_the_run(
    tiny_speech_sailer: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "system"
    shutil.copytree(tiny_speech_sailer, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"target_weighting": "product"}))
    assert run(folder, clips, "--prior", "natural", "--output", str(tmp_path / "out.csv")) == 2
    assert "needs the training weights" in capsys.readouterr().err
    assert read(tmp_path / "out.csv") == []
