"""Inputs that are broken, forged or of the wrong kind: each is an error of its own that costs its neighbours nothing,
is heard as far as it goes with a warning, or is heard as what it means."""

import datetime
import io
import os
import re
import resource
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch

from sailer import SpeechEmotionPipeline
from sailer.audio_sailer import read_audio
from sailer.inference.predict import PredictionSettings, load_classifier

RATE = 16000
Make = Callable[[Path], object]


def tone(seconds: float = 1.0, rate: int = RATE) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 0.01, round(seconds * rate))
    return (noise + 0.5 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encode(format: str, subtype: str | None = None, wave: np.ndarray | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(2.0, rate) if wave is None else wave, rate, format=format, subtype=subtype)
    return file.getvalue()


def patched(content: bytes, layout: str, *places: tuple[int, int]) -> bytes:
    """`content` with other numbers at some places."""
    changed = bytearray(content)
    for offset, value in places:
        struct.pack_into(layout, changed, offset, value)
    return bytes(changed)


def flac(samples: int | None = None, rate: int | None = None, wave: np.ndarray | None = None) -> bytes:
    """A FLAC file whose header claims other than what it holds (20 bits of rate, 8 of form, 36 of samples)."""
    content = bytearray(encode("FLAC", wave=wave))
    header = int.from_bytes(content[18:26], "big")
    if samples is not None:
        header = header >> 36 << 36 | samples
    if rate is not None:
        header = header & (1 << 44) - 1 | rate << 44
    content[18:26] = header.to_bytes(8, "big")
    return bytes(content)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def holed(content: bytes, start: int, length: int) -> bytes:
    return content[:start] + bytes(length) + content[start + length :]


def forged_mp3(frames: int) -> bytes:
    content = encode("MP3")
    return patched(content, ">I", (content.index(b"Xing") + 8, frames))


def stored(name: str, content: bytes = b"") -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def link(target: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "link.wav").symlink_to(target)
        return folder / "link.wav"

    return make


def fifo(folder: Path) -> str:
    os.mkfifo(folder / "pipe.wav")
    return str(folder / "pipe.wav")


def unix_socket(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # a socket's path may have no more than a hundred characters
        server.bind("socket.wav")
    return str(folder / "socket.wav")


def sparse(folder: Path) -> Path:
    """8 GB that take no room: a header that claims 37 hours, and all of their bytes."""
    path = stored("sparse.wav", patched(WAV[:44], "<I", (40, 2**32 - 16)))(folder)
    os.truncate(path, 2**33)
    return path


def decoder(result: object) -> object:
    def get_all_samples() -> object:
        if isinstance(result, Exception):
            raise result
        return result

    return SimpleNamespace(get_all_samples=get_all_samples)


class Strange:
    def __array__(self, *arguments: object) -> np.ndarray:
        raise RuntimeError("no array today")


WAV = encode("WAV")
FLOATS = np.array([1, 2, 3.5])
UNREADABLE, EMPTY, RATES = "is not readable audio", "holds no audio", r"sampling rate of .* between 1000 and 768000"

FILES: dict[str, tuple[bytes, str]] = {
    "nothing in it": (b"", UNREADABLE),
    "one byte": (b"R", UNREADABLE),
    "text": (b"this is no audio\n" * 99, UNREADABLE),
    "a page": (b"<!DOCTYPE html><html><body>404</body></html>", UNREADABLE),
    "a picture": (b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(999), UNREADABLE),
    "random bytes": (np.random.default_rng(0).bytes(9999), UNREADABLE),
    "zeros": (bytes(9999), UNREADABLE),
    "four letters of a header": (b"RIFF", UNREADABLE),
    "RIFF of another kind": (WAV[:8] + b"AVI " + WAV[12:], UNREADABLE),
    "half a header": (WAV[:20], UNREADABLE),
    "no data chunk": (WAV[:36], UNREADABLE),
    "no samples": (encode("WAV", wave=np.zeros(0)), EMPTY),
    "a size of nothing": (patched(WAV, "<I", (40, 0)), EMPTY),
    "10 ms": (encode("WAV", wave=tone(0.01)), "10 ms long"),
    "rate 0": (patched(WAV, "<I", (24, 0)), UNREADABLE),
    "rate 1": (patched(WAV, "<I", (24, 1)), RATES),
    "rate 999": (patched(WAV, "<I", (24, 999)), RATES),
    "rate 2 GHz": (patched(WAV, "<I", (24, 2**31 - 1)), RATES),
    "rate -1": (patched(WAV, "<I", (24, 2**32 - 1)), UNREADABLE),
    "no channels": (patched(WAV, "<H", (22, 0)), UNREADABLE),
    "1000 channels": (patched(WAV, "<H", (22, 1000)), "ms long"),
    "65535 channels": (patched(WAV, "<H", (22, 65535)), UNREADABLE),
    "0 bits": (patched(WAV, "<H", (34, 0)), UNREADABLE),
    "an unknown codec": (patched(WAV, "<H", (20, 0x270F)), UNREADABLE),
    "NaN": (encode("WAV", "FLOAT", np.full(RATE, np.nan, np.float32)), "not finite"),
    "one NaN": (encode("WAV", "FLOAT", np.append(tone(), np.float32("nan"))), "not finite"),
    "infinite": (encode("WAV", "FLOAT", np.full(RATE, np.inf, np.float32)), "not finite"),
    "as loud as 1e20": (encode("WAV", "FLOAT", 1e20 * tone()), "values up to .*e\\+19, where full scale is 1"),
    "as loud as 1e300": (encode("WAV", "DOUBLE", 1e300 * tone().astype(float)), "not finite|values up to"),
    "FLAC of 2^36 samples": (flac(2**36 - 1), "claims 68719476735 samples, more than"),
    "FLAC of 2^30 samples": (flac(2**30), "more than .* bytes can hold"),
    "FLAC of five hours": (flac(5 * 3600 * RATE, wave=tone(5)), r"claims 5\.0 h, which is longer than 4 h"),
    "FLAC of 1 Hz": (flac(rate=1), RATES),
    "FLAC of 1 MHz": (flac(rate=1_048_575), RATES),
    "FLAC without frames": (flac()[:60], f"{UNREADABLE}|{EMPTY}"),
    "FLAC, all frames gone": (holed(flac(), 42, 10**6), f"{UNREADABLE}|{EMPTY}"),
    "MP3 of 2^31 frames": (forged_mp3(2**31), "more than .* bytes can hold"),
    "MP3, 100 bytes": (encode("MP3")[:100], UNREADABLE),
    "a tag of 256 MB": (b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + encode("MP3"), UNREADABLE),
    "Ogg, 100 bytes": (encode("OGG")[:100], UNREADABLE),
    "Ogg, pages gone": (holed(encode("OGG"), 58, 10**6), UNREADABLE),
    "AIFF, 40 bytes": (encode("AIFF")[:40], UNREADABLE),
    "AU, rate 0": (patched(encode("AU"), ">I", (16, 0)), UNREADABLE),
    "CAF, cut": (half(encode("CAF")), UNREADABLE),
    "MP4 of zeros": (b"\0\0\0\x18ftypM4A " + bytes(999), "pip install av|" + UNREADABLE),
}

BAD: dict[str, tuple[Make, str]] = {
    **{f"file: {name}": (stored("x.wav", content), message) for name, (content, message) in FILES.items()},
    "bytes: not audio": (lambda folder: b"RIFF this is no audio", "The audio bytes is not readable"),
    "bytes: none": (lambda folder: b"", UNREADABLE),
    "bytes: a memoryview of text": (lambda folder: memoryview(b"text" * 99), UNREADABLE),
    "path: nowhere": (lambda folder: "nowhere.wav", r"No such audio file: nowhere\.wav"),
    "path: empty": (lambda folder: "", "No such audio file"),
    "path: a folder": (lambda folder: str(folder), "folder, pipe"),
    "path: below a file": (lambda folder: stored("a.wav")(folder) / "b.wav", r"b\.wav cannot be opened"),
    "path: a dangling link": (link("gone.wav"), r"link\.wav is a link to gone\.wav, which does not exist"),
    "path: a link to itself": (link("link.wav"), r"link\.wav cannot be opened"),
    "path: a FIFO": (fifo, "pipe, socket"),
    "path: a socket": (unix_socket, "pipe, socket"),
    "path: a device": (lambda folder: "/dev/zero", "device"),
    "path: too long": (lambda folder: "x" * 5000 + ".wav", "cannot be opened"),
    "path: with a NUL": (lambda folder: "a\0.wav", "cannot be opened.*null"),
    "path: 8 GB of nothing": (sparse, r"claims 37\.3 h"),
    "URL: a space": (lambda folder: "http://foo bar", "http://foo bar cannot be fetched: InvalidURL"),
    "URL: half an address": (lambda folder: "http://[::1", "cannot be fetched"),
    "URL: no host": (lambda folder: "http://", "cannot be fetched"),
    "URL: nobody there": (lambda folder: "http://127.0.0.1:1/a.wav", "cannot be fetched.*refused"),
    "array: empty": (lambda folder: np.zeros(0), EMPTY),
    "array: empty list": (lambda folder: [], EMPTY),
    "array: no channels": (lambda folder: np.zeros((0, RATE)), EMPTY),
    "array: three axes": (lambda folder: np.zeros((1, 1, RATE)), r"shape \(1, 1, 16000\)"),
    "array: one number": (lambda folder: np.float32(1), EMPTY),
    "array: NaN": (lambda folder: np.full(RATE, np.nan), "not finite"),
    "array: infinite": (lambda folder: torch.full((RATE,), -torch.inf), "not finite"),
    "array: as loud as 1e20": (lambda folder: 1e20 * tone(), "full scale is 1"),
    "array: int16 as floats": (lambda folder: 32767 * tone(), "divide integer samples"),
    "array: 1e300": (lambda folder: np.full(RATE, 1e300), "not finite"),
    "array: int64 beyond int16": (lambda folder: np.full(RATE, 2**40), "beyond int16"),
    "array: integers beyond int16": (lambda folder: [40000] * RATE, "from 40000 to 40000, beyond int16"),
    "array: huge integers": (lambda folder: [10**30] * RATE, "of object where"),
    "array: uint16": (lambda folder: np.ones(RATE, np.uint16), "of uint16 where"),
    "array: booleans": (lambda folder: np.ones(RATE, bool), "of bool where"),
    "array: complex": (lambda folder: torch.ones(RATE, dtype=torch.complex64), "of complex64 where"),
    "array: texts": (lambda folder: ["a"] * RATE, "of <U1 where"),
    "array: times": (lambda folder: np.array([datetime.datetime(2026, 1, 1)] * RATE, "M8[s]"), "of datetime64"),
    "array: records": (lambda folder: np.zeros(RATE, "f4,f4"), EMPTY),
    "array: two clips in a list": (lambda folder: {"audio": [tone(), tone()]}, "a list of 2 waveforms"),
    "array: lists in a list": (lambda folder: {"audio": [[0.1] * RATE] * 2}, "a list of 2 waveforms"),
    "array: ragged": (lambda folder: [0.1, [0.1, 0.2]], "is no waveform"),
    "array: refuses": (lambda folder: Strange(), "is no waveform: no array today"),
    "array: too short": (lambda folder: tone(0.01), "10 ms long; at least 100"),
    **{
        f"rate: {rate!r}": (lambda folder, rate=rate: {"array": tone(), "sampling_rate": rate}, RATES)
        for rate in (0, -RATE, 1, 999.9, 768_001, 1e300, 10**400, float("inf"), float("nan"), "16000", [RATE], 1j)
    },
    "rate: None": (lambda folder: {"raw": tone(), "sampling_rate": None}, "no 'sampling_rate'"),
    "rate: missing": (lambda folder: {"array": tone()}, "no 'sampling_rate'"),
    "mapping: empty": (lambda folder: {}, "no 'array', 'raw', 'bytes' or 'path'"),
    "mapping: of nothing": (lambda folder: {"path": None, "bytes": None}, "no 'array'"),
    "mapping: empty bytes": (lambda folder: {"path": None, "bytes": b""}, "no 'array'"),
    "mapping: bytes of a number": (lambda folder: {"bytes": 5}, "no 'array'"),
    "mapping: path of a number": (lambda folder: {"path": 5}, "5 has no 'array'"),
    "mapping: no audio": (lambda folder: {"audio": None}, EMPTY),
    "mapping: text of a number": (lambda folder: {"audio": tone(), "text": 3}, "transcript is int"),
    "kind: None": (lambda folder: None, "NoneType of object where a path"),
    "kind: a number": (lambda folder: 5, EMPTY),
    "kind: an object": (lambda folder: object(), EMPTY),
    "kind: a set": (lambda folder: {0.1, 0.2}, EMPTY),
    "kind: a generator": (lambda folder: (value for value in FLOATS), EMPTY),
    "kind: an open file": (lambda folder: io.BytesIO(WAV), "BytesIO of"),
    "decoder: fails": (lambda folder: decoder(RuntimeError("lost")), "RuntimeError: lost"),
    "decoder: fails without a word": (lambda folder: decoder(MemoryError()), "MemoryError"),
    "decoder: rate 0": (lambda folder: decoder(SimpleNamespace(data=FLOATS, sample_rate=0)), RATES),
}

PART: dict[str, tuple[object, float]] = {
    "WAV, half": (half(WAV), 1.0),
    "WAV of floats, half": (half(encode("WAV", "FLOAT")), 1.0),
    "WAV of 24 bits, half": (half(encode("WAV", "PCM_24")), 1.0),
    "WAV, ADPCM, half": (half(encode("WAV", "IMA_ADPCM")), 1.0),
    "WAV of 4 GB": (patched(WAV, "<I", (4, 2**32 - 1), (40, 2**32 - 1)), 2.0),
    "WAV of 2 GB": (patched(WAV, "<I", (40, 2**31 - 1)), 2.0),
    "AIFF, half": (half(encode("AIFF")), 1.0),
    "AU, half": (half(encode("AU")), 1.0),
    "W64, half": (half(encode("W64")), 1.0),
    "RF64, half": (half(encode("RF64")), 1.0),
    "FLAC, half": (half(flac()), 1.0),
    "FLAC with a hole": (holed(flac(), len(flac()) // 2, 99), 1.0),
    "FLAC of a minute": (flac(60 * RATE), 2.0),
    "MP3, half": (half(encode("MP3")), 1.0),
    "five channels": (np.stack([tone(2)] * 5), 2.0),
    "five channels, upright": (np.stack([tone(2)] * 5, axis=1), 2.0),
}

MEANT: dict[str, object] = {
    "memoryview": memoryview(encode("WAV", wave=tone())),
    "bytearray": bytearray(encode("WAV", wave=tone())),
    "unsigned bytes": encode("WAV", "PCM_U8", tone()),
    "24 bits": encode("WAV", "PCM_24", tone()),
    "FLAC of unknown length": flac(0, wave=tone()),
    "a tail of garbage": encode("WAV", wave=tone()) + bytes(999),
    "stereo": encode("WAV", wave=np.stack([tone()] * 2, axis=1)),
    "six channels of a file": encode("WAV", wave=np.stack([tone()] * 6, axis=1)),
    "768 kHz": encode("WAV", wave=soxr.resample(tone(), RATE, 768_000), rate=768_000),
    "Python's integers": (32767 * tone()).astype(int).tolist(),
    "int64": (32767 * tone()).astype(np.int64),
    "a tensor of int64": torch.tensor((32767 * tone()).astype(np.int64)),
    "int16": (32767 * tone()).astype(np.int16),
    "int32": (2**31 * tone().astype(float)).astype(np.int32),
    "int8": (127 * tone()).astype(np.int8),
    "uint8": (127 * tone() + 128).astype(np.uint8),
    "float16": tone().astype(np.float16),
    "bfloat16 with a gradient": torch.tensor(tone()).bfloat16().requires_grad_(),
    "two channels": np.stack([tone()] * 2),
    "two channels, upright": np.stack([tone()] * 2, axis=1),
    "read backwards": tone()[::-1][::-1],
    "a rate of its own kind": {"array": tone(), "sampling_rate": torch.tensor(RATE)},
}


@pytest.fixture(scope="module")
def speech(tiny_speech_sailer: Path) -> SpeechEmotionPipeline:
    return load_classifier(PredictionSettings(str(tiny_speech_sailer)))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def most_memory(since: bool = False) -> int:
    """The most bytes that this process had (since now on; where Linux does not tell, since its start)."""
    own = Path("/proc/self")
    if not (own / "clear_refs").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if since:  # not tracemalloc, which now and then stops a thread that starts for ever (Python 3.11)
        (own / "clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", (own / "status").read_text())[1])


def test_there_are_many() -> None:
    assert len(BAD) >= 115 and len(BAD) + len(PART) + len(MEANT) >= 150


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_error_among_good_results(
    name: str, speech: SpeechEmotionPipeline, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, message = BAD[name]
    item, good, begun = make(place), tone(), time.monotonic()
    most = most_memory(since=True)
    results = speech([good, item, good], on_error="return", batch_size=4, num_workers=0)
    peak = most_memory() - most
    assert list(results[1]) == ["error"] and re.search(message, results[1]["error"]), results[1]
    assert results[0] == results[2] and len(results[0]) == 9
    assert peak < 64e6 and time.monotonic() - begun < 5

    if not name.startswith(("kind: a generator", "array: empty list", "kind: a set")):  # alone these are many inputs
        with pytest.raises((ValueError, OSError, ImportError, RuntimeError, MemoryError)) as raised:
            speech([item] if isinstance(item, list) else item)
        assert re.search(message, f"{type(raised.value).__name__}: {raised.value}")


@pytest.mark.parametrize("name", PART)
def test_what_is_used_in_part_is_told(
    name: str, speech: SpeechEmotionPipeline, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, seconds = PART[name]
    if isinstance(source, bytes):
        source = str(stored("part of it.wav", source)(place))
    recording = read_audio(source)
    assert len(recording.waveform) / RATE == pytest.approx(seconds, abs=0.25)
    reference = tone(2)[: len(recording.waveform)]
    assert np.corrcoef(recording.waveform[: len(reference)], reference)[0, 1] > 0.98
    told = "cut short or damaged: the .* are used" if isinstance(source, str) else "mean of 5 channels"
    assert re.search(told, recording.warning)
    caplog.clear()
    with caplog.at_level("WARNING", logger="sailer.pipeline_sailer"):
        assert len(speech(source)) == 9
    assert recording.warning in caplog.messages
    if isinstance(source, str):
        assert "part of it.wav" in recording.warning
        assert read_audio(source, max_seconds=0.5).warning is None  # all that was asked for is there


@pytest.mark.parametrize("name", MEANT)
def test_what_is_meant_is_heard(name: str, speech: SpeechEmotionPipeline) -> None:
    recording = read_audio(MEANT[name])
    assert recording.warning is None and recording.waveform.dtype == np.float32
    np.testing.assert_allclose(recording.waveform, tone(), atol=0.02)
    assert len(speech([MEANT[name]])[0]) == 9


def test_silence_that_unfolds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = flac(0, wave=np.zeros(61 * RATE, np.float32))
    assert len(bomb) < 10_000
    assert len(read_audio(bomb).waveform) == 61 * RATE
    monkeypatch.setattr("sailer.audio_sailer.MAXIMUM_SECONDS", 60.0)
    with pytest.raises(ValueError, match=r"The audio bytes is longer than .*cut it into pieces"):
        read_audio(bomb)
    assert len(read_audio(bomb, max_seconds=1).waveform) == RATE
    with pytest.raises(ValueError, match="longer than"):
        read_audio(np.zeros(61 * RATE))
