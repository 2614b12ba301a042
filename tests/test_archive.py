"""An archive as one Parquet table: the CSV's rows, in parts that are gone on with, shared out and checked."""

import csv
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from sailer import SpeechEmotionPipeline
from sailer.cli import main
from sailer.data.team import TeamError
from sailer.inference.archive import Archive, predict_archive
from sailer.inference.predict import PredictionError, PredictionSettings
from sailer.inference.sources import find_sources, source_of

from .sounds import noise


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips, one of them of 20 s, and one that is no audio."""
    folder = tmp_path_factory.mktemp("clips")
    for index, seconds in enumerate((0.4, 1.1, 0.7, 2.0, 0.9, 0.5)):
        soundfile.write(folder / f"clip{index}.wav", noise(seconds, seed=index), 16000)
    soundfile.write(folder / "long.flac", noise(20, seed=9), 16000)
    (folder / "clip7.wav").write_bytes(b"RIFF no audio")
    return folder


@pytest.fixture
def settings(tiny_speech_sailer: Path) -> PredictionSettings:
    return PredictionSettings(str(tiny_speech_sailer))


def as_text(path: Path) -> list[dict[str, str]]:
    """A Parquet table as a CSV's reader would give it."""
    rows = pq.read_table(path).to_pylist()
    return [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]


def assert_alike(one: Path, other: Path) -> None:
    """The same rows, judged in batches of other clips: scores may differ by rounding."""
    for row, expected in zip(as_text(one), as_text(other), strict=True):
        assert row.keys() == expected.keys()
        for name in row:
            if name in ("Angry", "Sad", "score") and row[name]:
                assert float(row[name]) == pytest.approx(float(expected[name]), abs=1e-5)
            elif name in ("file", "seconds", "label", "warning", "error"):
                assert row[name] == expected[name]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_rows_windows_and_embeddings_are_those_of_the_csv(
    clips: Path, tiny_speech_sailer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = [str(clips / name) for name in ("clip0.wav", "long.flac", "clip7.wav", "clip1.wav")]
    common = ["predict", str(tiny_speech_sailer), *few, "--timeline", "--chunk_length_s", "6"]
    common += ["--prior", "natural", "--min_confidence", "0.2"]
    files = {"csv": tmp_path / "a.csv", "parquet": tmp_path / "b.parquet"}
    embeddings = {"csv": tmp_path / "a.npz", "parquet": tmp_path / "b_embeddings.parquet"}
    for kind, output in files.items():
        parts = ["--part_size", "3"] if kind == "parquet" else []
        command = [*common, "--output", str(output), "--embeddings", str(embeddings[kind]), *parts]
        assert main(command) == 1  # one is no audio
        assert capsys.readouterr().out.splitlines()[-1] == f"Result: {output}"
    assert as_text(files["parquet"]) == read_csv(files["csv"])
    assert list(as_text(files["parquet"])[0]) == list(read_csv(files["csv"])[0])
    assert as_text(tmp_path / "b_timeline.parquet") == read_csv(tmp_path / "a_timeline.csv")
    assert len(list((tmp_path / "b_timeline").glob("*.png"))) == 3
    with np.load(embeddings["csv"]) as stored:
        table = pq.read_table(embeddings["parquet"])
        assert table["file"].to_pylist() == stored["files"].tolist()
        np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), stored["embeddings"], atol=1e-6)
    assert not list(tmp_path.glob("*.parts"))


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    encode, encoded = SpeechEmotionPipeline.encode, []

    def count(self: SpeechEmotionPipeline, items: object, *arguments: object, **more: object) -> object:
        return encode(self, (encoded.append(item) or item for item in items), *arguments, **more)

    monkeypatch.setattr(SpeechEmotionPipeline, "encode", count)
    return encoded


def test_a_run_that_was_stopped_goes_on_with_its_parts(
    settings: PredictionSettings, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_archive(settings, [str(clips)], tmp_path / "whole.parquet", part_size=3)
    output, write = tmp_path / "out.parquet", Archive.write

    def stop(self: Archive, part: int, tables: dict) -> None:
        if part == 1:
            raise KeyboardInterrupt
        write(self, part, tables)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Archive, "write", stop)
        predict_archive(settings, [str(clips)], output, part_size=3, batch_size=1, num_workers=0)
    assert not output.exists()
    encoded = count_encoded(monkeypatch)
    assert predict_archive(settings, [str(clips)], output, part_size=3) == 1
    assert encoded == find_sources([str(clips)])[3:]
    assert_alike(output, tmp_path / "whole.parquet")
    del encoded[:]
    assert predict_archive(settings, [str(clips)], output, part_size=3) == 1 and encoded == []


def test_a_run_that_left_no_part_does_not_stand_in_the_way(
    settings: PredictionSettings, clips: Path, tmp_path: Path
) -> None:
    """Its settings may be what it failed over: they are not those of anything that is there."""
    output, given = tmp_path / "out.parquet", [str(clips / "clip0.wav")]
    with pytest.raises(PredictionError, match="torch cannot use here"):
        predict_archive(settings, given, output, part_size=3, device="nosuch")
    assert (tmp_path / "out.parquet.parts").is_dir()
    assert predict_archive(settings, given, output, part_size=4) == 0
    assert pq.read_table(output).num_rows == 1


def test_parts_and_results_of_another_run_are_refused(
    settings: PredictionSettings, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.parquet"

    def run(**changes: object) -> None:
        given = {"settings": settings, "paths": [str(clips)], "part_size": 3} | changes
        predict_archive(given.pop("settings"), given.pop("paths"), output, **given)

    natural = PredictionSettings(settings.model, prior="natural")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Archive, "merge", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        run()
    parts = sorted((tmp_path / "out.parquet.parts").glob("rows-*"))
    assert len(parts) == 3
    with pytest.raises(PredictionError, match=r"parts is of another run \(prior was 'balanced', is 'natural'\)"):
        run(settings=natural)
    with pytest.raises(PredictionError, match=r"recordings was '8 recordings, .*is '1 recordings"):
        run(paths=[str(clips / "clip0.wav")])
    with pytest.raises(PredictionError, match=r"part_size was 3, is 4"):
        run(part_size=4)
    other = tmp_path / "other.parquet"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Archive, "merge", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        predict_archive(natural, [str(clips)], other, part_size=3)
    own = parts[1].read_bytes()
    parts[1].write_bytes((tmp_path / "other.parquet.parts" / parts[1].name).read_bytes())
    with pytest.raises(PredictionError, match=r"rows-0000001\.parquet is of another run"):
        run()
    parts[1].write_bytes(b"PAR1 and no more")
    with pytest.raises(PredictionError, match=r"rows-0000001\.parquet is not what a run left"):
        run()
    parts[1].write_bytes(parts[0].read_bytes())  # of this run, and of other recordings
    with pytest.raises(PredictionError, match="has not one row for each of its recordings"):
        run()
    parts[1].write_bytes(own)
    run()
    with pytest.raises(PredictionError, match=r"out\.parquet is of another run"):
        run(settings=natural)
    output.write_bytes(b"mine")
    with pytest.raises(PredictionError, match="is not what a run left"):
        run()
    assert output.read_bytes() == b"mine"
    output.unlink()
    (tmp_path / "out.parquet.parts").mkdir()
    (tmp_path / "out.parquet.parts" / "notes.txt").write_text("mine")
    with pytest.raises(PredictionError, match="holds other files"):
        run()


@pytest.mark.parametrize("form", ["bytes", "struct", "path"])
def test_rows_of_parquet_files_are_recordings(
    form: str, settings: PredictionSettings, clips: Path, tmp_path: Path
) -> None:
    files = find_sources([str(clips)])
    values = {
        "bytes": [Path(file).read_bytes() for file in files],
        "struct": [{"bytes": Path(file).read_bytes(), "path": "a name"} for file in files],
        "path": [{"bytes": None, "path": file} for file in files],
    }[form]
    kind = pa.binary() if form == "bytes" else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    shard = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"speech": pa.array(values, kind)}), shard, row_group_size=3)
    column = {"audio_column": "speech", "part_size": 5}
    assert predict_archive(settings, [f"{tmp_path}/sh*.parquet"], tmp_path / "out.parquet", **column) == 1
    predict_archive(settings, files, tmp_path / "files.parquet")
    ours, theirs = as_text(tmp_path / "out.parquet"), as_text(tmp_path / "files.parquet")
    assert [row.pop("file") for row in ours] == [f"{shard}#{row}" for row in range(8)]
    names = [row.pop("file") for row in theirs]
    errors = [row.pop("error") != "" for row in ours]
    assert errors == [row.pop("error") != "" for row in theirs] == [name.endswith("clip7.wav") for name in names]
    assert ours == theirs


def test_an_object_store_is_read_through_fsspec(settings: PredictionSettings, clips: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe(
        {f"/archive/below/{path.name}": path.read_bytes() for path in clips.iterdir()} | {"/archive/a.txt": b""}
    )
    names = find_sources(["memory://archive"])
    assert len(names) == 8 and names[0] == "memory:///archive/below/clip0.wav"
    assert find_sources(["memory://archive/below/clip[01].wav"]) == names[:2]
    assert predict_archive(settings, ["memory://archive"], tmp_path / "out.parquet") == 1
    predict_archive(settings, [str(clips)], tmp_path / "files.parquet")
    ours, theirs = ([row["Angry"] for row in as_text(tmp_path / f"{name}.parquet")] for name in ("out", "files"))
    assert ours == theirs and ours.count("") == 1
    store.rm("/archive/below/clip0.wav")
    assert dict(source_of(names[1]))["bytes"][:4] == b"RIFF"
    with pytest.raises(FileNotFoundError, match=r"No such audio file: memory:///archive/below/clip0\.wav"):
        dict(source_of(names[0]))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://nowhere/at-all", "memory://nowhere/at-all: nothing is there"),
        ("memory://nowhere/*.wav", "nothing is there"),
        ("nonsense://bucket/a.wav", "cannot be opened: Protocol not known: nonsense"),
        ("nowhere.parquet", "no such file or folder"),
        ("other.parquet", r"has no column 'audio'; it has \['id', 'text'\].*--audio_column"),
        ("text.parquet", r"The column 'audio' of text\.parquet is string, not audio"),
        ("none.parquet", "is no Parquet file"),
    ],
)
def test_sources_that_are_not_there_or_hold_no_audio(
    path: str, message: str, tiny_speech_sailer: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), "other.parquet")
    pq.write_table(pa.table({"audio": ["a.wav"]}), "text.parquet")
    Path("none.parquet").write_bytes(b"nothing")
    assert main(["predict", str(tiny_speech_sailer), path, "--output", "out.parquet"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--engine", "ray"], {}, "--engine goes with a Parquet output"),
        (["--part_size", "5"], {}, "--part_size goes with a Parquet output"),
        ([], {"WORLD_SIZE": "2"}, r"Several processes cannot write predictions\.csv"),
        (["--output", "o.parquet", "--embeddings", "e.npz"], {}, r"\.parquet file too"),
        (["--embeddings", "e.parquet"], {}, "beside a Parquet output alone"),
        (["--output", "o.parquet", "--submission", "categorical"], {}, "made of a CSV"),
        (["--output", "o.parquet", "--part_size", "0"], {}, "at least one recording"),
        (["--output", "s3://bucket/o.parquet"], {}, r"--output s3:/bucket/o\.parquet is an address"),
        (["--output", "file:///tmp/o.csv"], {}, "--output file:/tmp/o.csv is an address: .* copy them from there"),
        (["--output", "o.parquet", "--embeddings", "gs://b/e.parquet"], {}, "--embeddings gs:/b/e.parquet is an add"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str],
    environment: dict,
    message: str,
    clips: Path,
    tiny_speech_sailer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["predict", str(tiny_speech_sailer), str(clips), *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def together(work: object, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, list]:
    """What two processes of one launch return of `work(rank)`, or the error that they fail with; and the processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run(rank: int) -> None:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        try:
            queue.put((rank, work(rank)))
        except Exception as error:
            queue.put((rank, error))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    found = {}
    while not queue.empty():
        rank, value = queue.get()
        found[rank] = value
    return found, processes


def test_two_processes_judge_their_share_and_the_first_merges(
    settings: PredictionSettings, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_archive(settings, [str(clips)], tmp_path / "one.parquet", part_size=2)

    def work(rank: int) -> list[str]:
        encoded = count_encoded(monkeypatch)
        predict_archive(settings, [str(clips)], tmp_path / "two.parquet", part_size=2)
        return encoded

    encoded, _ = together(work, monkeypatch)
    files = find_sources([str(clips)])
    assert encoded == {0: [*files[0:2], *files[4:6]], 1: [*files[2:4], *files[6:8]]}
    assert_alike(tmp_path / "one.parquet", tmp_path / "two.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.parquet", "two.parquet"]


def test_a_process_that_dies_is_named_and_the_next_run_goes_on(
    settings: PredictionSettings, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = tmp_path / "out.parquet", Archive.write

    def work(rank: int) -> None:
        def die(self: Archive, part: int, tables: dict) -> None:
            if rank == 1 and part == 3:
                os._exit(9)
            write(self, part, tables)

        monkeypatch.setattr(Archive, "write", die)
        predict_archive(settings, [str(clips)], output, part_size=2)

    found, processes = together(work, monkeypatch)
    assert isinstance(found[0], TeamError)
    assert re.search(rf"Process 1 \(\S+, pid {processes[1].pid}\) died .* it goes on from there", str(found[0]))
    assert not output.exists() and len(list((tmp_path / "out.parquet.parts").glob("rows-*"))) == 3
    monkeypatch.undo()
    encoded = count_encoded(monkeypatch)
    assert predict_archive(settings, [str(clips)], output, part_size=2) == 1
    assert encoded == find_sources([str(clips)])[6:]
    assert [row["file"] for row in as_text(output)] == find_sources([str(clips)])


def test_processes_that_see_other_files_are_told_of(
    settings: PredictionSettings, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(rank: int) -> None:
        seen = find_sources([str(clips)])[: 8 - rank]
        predict_archive(settings, seen, tmp_path / "out.parquet", part_size=2)

    found, _ = together(work, monkeypatch)
    assert isinstance(found[1], PredictionError)
    assert re.search(r"Process 1 does not see what process 0 sees \(recordings: '7 rec.* here, '8 rec", str(found[1]))
    assert isinstance(found[0], TeamError) and "Process 1 failed: PredictionError" in str(found[0])
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.slow
def test_torchrun_predicts_an_archive(clips: Path, tiny_speech_sailer: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "sailer.cli", "predict", str(tiny_speech_sailer), str(clips), "--part_size", "2"]
    command += ["--output", str(tmp_path / "out.parquet")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "1 recordings could not be used; the column 'error' says why.",
        f"Result: {tmp_path / 'out.parquet'}",
    ]
    assert [row["file"] for row in as_text(tmp_path / "out.parquet")] == find_sources([str(clips)])
    told = json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"sailer"])
    assert told["model"] == str(tiny_speech_sailer) and told["recordings"].startswith("8 recordings")
