"""A folder of a thousand files, three hundred of them bad, whose run is killed twice and started again."""

import csv
import io
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer.inference.outputs import named_file

RATE, FILES, BAD_FILES = 16000, 1000, 300
KILLED_AT = (200, 600)  # rows


def encoded(wave: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format=format)
    return file.getvalue()


def make_good(path: Path, index: int) -> None:
    wave = np.random.default_rng(index).normal(0, 0.1, RATE // 8 + index % 5 * 400)
    path.write_bytes(encoded(wave, ("WAV", "FLAC", "OGG")[index % 3]))


def make_bad(path: Path, index: int) -> None:
    kind, wave = index % 10, np.zeros(RATE // 4)
    flac = bytearray(encoded(wave, "FLAC"))
    flac[21:26] = b"\xff" * 5  # 2^36 samples
    wav = bytearray(encoded(wave, "WAV"))
    wav[24:28] = b"\1\0\0\0"  # 1 Hz
    if kind == 0:
        path.symlink_to("nowhere.wav")
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.symlink_to(path.name)
    else:
        contents = {
            4: b"",
            5: b"no audio",
            6: bytes(flac),
            7: bytes(wav),
            8: encoded(np.zeros(9), "WAV"),
            9: encoded(np.zeros(RATE // 4), "WAV")[:30],
        }
        path.write_bytes(contents[kind])


def make_folder(folder: Path) -> tuple[set[str], set[str]]:
    """The good files and the bad ones; every eighth has a name that a line of UTF-8 cannot hold."""
    folder.mkdir()
    good, bad = set(), set()
    odd = ("{}\n.wav", os.fsdecode(b"{}\xff.wav"), "$_$x^^{}.wav", '{}",\\x0a.wav')
    for index in range(FILES):
        name = (odd[index // 8 % 4] if index % 8 == 0 else "{}.wav").format(f"{index:04d}")
        is_bad = index * BAD_FILES // FILES != (index + 1) * BAD_FILES // FILES
        (make_bad if is_bad else make_good)(folder / name, index)
        (bad if is_bad else good).add(str(folder / name))
    return good, bad


def rows_of(output: Path) -> list[dict[str, str]]:
    """The whole rows."""
    text = output.read_text(encoding="utf-8") if output.is_file() else ""
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


@pytest.mark.slow
def test_a_folder_survives_two_kills(tiny_speech_sailer: Path, tmp_path: Path) -> None:
    good, bad = make_folder(tmp_path / "folder")
    assert (len(good), len(bad)) == (FILES - BAD_FILES, BAD_FILES)
    output = tmp_path / "out.csv"
    command = [sys.executable, "-m", "sailer.cli", "predict", tiny_speech_sailer, tmp_path / "folder"]
    command += ["--output", output, "--embeddings", tmp_path / "e.npz", "--batch_size", "8"]

    seen: list[dict[str, str]] = []
    for rows in (*KILLED_AT, None):
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
            limit = time.monotonic() + 300
            while rows is not None and process.poll() is None and len(rows_of(output)) < rows:
                assert time.monotonic() < limit, (tmp_path / "log").read_text(errors="replace")[-2000:]
                time.sleep(0.02)
            if rows is not None:
                process.kill()
            status = process.wait(timeout=300)
        assert status == (1 if rows is None else -9), (tmp_path / "log").read_text(errors="replace")[-2000:]
        now = rows_of(output)
        assert now[: len(seen)] == seen and (rows is None or rows <= len(now) < FILES)
        seen = now

    times = Counter(named_file(row["file"]) for row in seen)
    assert set(times) == good | bad and set(times.values()) == {1}
    assert {named_file(row["file"]) for row in seen if row["error"]} == bad
    assert all(row["label"] and float(row["score"]) > 0 for row in seen if not row["error"])
    with np.load(tmp_path / "e.npz") as stored:
        assert {named_file(name) for name in stored["files"]} == good and len(stored["embeddings"]) == len(good)
    assert "300 recordings could not be used" in (tmp_path / "log").read_text(errors="replace")
