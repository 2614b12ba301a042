"""Durations from headers: every format, every way in which a file can be unusable."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer.data import CorpusError, CorpusReport
from sailer.data.corpora.audio_files import audio_reference, find_audio, read_durations

FORMATS = ("wav", "flac", "ogg", "mp3")


def write_noise(path: Path, seconds: float = 1.5, sampling_rate: int = 16000, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, (round(seconds * sampling_rate), channels))
    soundfile.write(path, samples, sampling_rate, format=path.suffix[1:].upper())
    return path


@pytest.mark.parametrize("extension", [*FORMATS, "WAV"])
@pytest.mark.parametrize(("sampling_rate", "channels"), [(8000, 1), (16000, 1), (48000, 2)])
def test_duration_of_any_rate_and_channels(tmp_path: Path, extension: str, sampling_rate: int, channels: int) -> None:
    path = write_noise(tmp_path / f"clip.{extension}", 1.5, sampling_rate, channels)
    report = CorpusReport()
    durations = read_durations([path], strict=True, report=report, progress=False)
    assert durations == pytest.approx([1.5], abs=1e-3)
    assert report.left_out == {}


def test_durations_keep_the_order(tmp_path: Path) -> None:
    lengths = [0.2, 0.9, 0.4, 0.6] * 10
    paths = [write_noise(tmp_path / f"{index}.wav", seconds, 8000) for index, seconds in enumerate(lengths)]
    assert read_durations(paths, strict=True, report=CorpusReport(), progress=False) == pytest.approx(lengths)


def spoil(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "zero-length":
        path.write_bytes(b"")
    elif how == "not readable as audio":
        path.write_bytes(b"This is a text file." * 100)
    elif how == "shorter than the minimum of 0.1 s":
        write_noise(path, 0.01)
    else:
        path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize(
    "how",
    ["missing", "zero-length", "not readable as audio", "shorter than the minimum of 0.1 s", "truncated"],
)
def test_unusable_file_is_refused_or_counted(tmp_path: Path, extension: str, how: str) -> None:
    good, bad = (write_noise(tmp_path / f"{name}.{extension}") for name in ("good", "bad"))
    spoil(bad, how)
    # A cut FLAC file cannot be told from a damaged one.
    words = "damaged" if (extension, how) == ("flac", "truncated") else how
    with pytest.raises(CorpusError, match=words) as caught:
        read_durations([good, bad], strict=True, report=CorpusReport(), progress=False)
    assert str(bad) in str(caught.value)
    assert "strict=False" in str(caught.value)

    report = CorpusReport()
    durations = read_durations([bad, good], strict=False, report=report, progress=False)
    assert durations[0] is None
    assert durations[1] == pytest.approx(1.5, abs=1e-3)
    ((reason, files),) = report.left_out.items()
    assert words in reason
    assert files == [str(bad)]


def test_wav_written_to_a_pipe_is_no_truncated_one(tmp_path: Path) -> None:
    path = write_noise(tmp_path / "streamed.wav")
    whole = bytearray(path.read_bytes())
    whole[4:8] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(whole)
    assert read_durations([path], strict=True, report=CorpusReport(), progress=False) == pytest.approx([1.5])


def test_found_audio(tmp_path: Path) -> None:
    wanted = [write_noise(tmp_path / name) for name in ("b/c.WAV", "a.flac", "b/a.wav")]
    outside = write_noise(tmp_path.with_name(f"{tmp_path.name}_elsewhere") / "linked.wav")
    (tmp_path / "link").symlink_to(outside.parent, target_is_directory=True)
    (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "notes.txt").write_text("no audio")
    (tmp_path / "._a.wav").write_bytes(b"resource fork")
    assert find_audio(tmp_path) == sorted([*wanted, tmp_path / "link" / "linked.wav"])


def test_reference_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert audio_reference("clip.wav") == {"path": os.path.join(tmp_path, "clip.wav"), "bytes": None}
