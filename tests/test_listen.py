"""`sailer listen`: files, pipes and microphones, what is shown of them, and audio that breaks off."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import sailer
from sailer.cli import main
from sailer.inference import listen
from sailer.inference.listen import ListenError, bars_of, line_of, microphone, show, standard_input

from .sounds import RATE, noise

OPTIONS = ["--chunk_s", "1", "--hop_s", "0.5"]
RESULT = {
    "timestamp": (1.0, 4.0),
    "primary": [{"label": "Happy", "score": 0.75}, {"label": "Angry", "score": 0.25}],
    "label": "Happy",
    "attributes": {"arousal": 0.5, "valence": 1.0, "dominance": 0.0},
}


class Pipe(io.RawIOBase):
    """Bytes that come a few at a time and cannot be gone back in."""

    def __init__(self, content: bytes, piece: int = 1000) -> None:
        self.content, self.piece = content, piece

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        taken = self.content[: min(self.piece, len(buffer))]
        self.content = self.content[len(taken) :]
        buffer[: len(taken)] = taken
        return len(taken)


def piped(content: bytes, **options) -> listen.Heard:
    return standard_input(io.BufferedReader(Pipe(content), 16), **options)


def wav(audio: np.ndarray, rate: int = RATE, subtype: str = "PCM_16", kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, subtype=subtype, format=kind)
    return file.getvalue()


def heard_of(heard: listen.Heard) -> np.ndarray:
    return np.concatenate(list(heard.blocks))


# Through the command line


def run(folder: Path, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sailer.cli", "listen", str(folder), *words]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=120)


def test_a_file_in_lines_is_what_the_pipeline_hears(tiny_speech_sailer: Path, tmp_path: Path, capsys) -> None:
    audio = noise(2.3)
    soundfile.write(tmp_path / "a.wav", audio, RATE, subtype="FLOAT")
    assert main(["listen", str(tiny_speech_sailer), str(tmp_path / "a.wav"), *OPTIONS]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = sailer.load(tiny_speech_sailer)(
        audio, chunk_length_s=1, stride_length_s=(0, 0.5), return_timestamps=True, return_all=True
    )
    assert len(lines) == len(expected) == 4
    for line, result in zip(lines, expected, strict=True):
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", line)]
        assert numbers[:2] == pytest.approx(result["timestamp"], abs=0.005)
        scores = dict(re.findall(r"(\w+) (\d\.\d\d)", line.partition(" s  ")[2]))
        assert {row["label"]: f"{row['score']:.2f}" for row in result["primary"]}.items() <= scores.items()
        assert line.partition(" s  ")[2].split()[0] == result["label"]


def test_a_pipe_of_raw_samples_in_json(tiny_speech_sailer: Path, monkeypatch, capsys) -> None:
    audio = np.round(noise(1.7) * 32768).clip(-32768, 32767).astype("<i2")
    stereo = np.stack([audio, audio], axis=1).tobytes()
    raw = ["-", "--rate", str(RATE), "--channels", "2", "--style", "json", "--smooth_s", "1", *OPTIONS]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stereo)))
    assert main(["listen", str(tiny_speech_sailer), *raw]) == 0
    stream = sailer.EmotionStream(sailer.load(tiny_speech_sailer), 1, 0.5, 1, return_all=True, return_embedding=False)
    expected = list(stream.run([audio]))
    actual = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["timestamp"] for result in actual] == [list(result["timestamp"]) for result in expected]
    for one, other in zip(actual, expected, strict=True):
        for row, same in zip(one["primary"], other["primary"], strict=True):
            assert row["label"] == same["label"] and row["score"] == pytest.approx(same["score"], abs=1e-5)


@pytest.mark.slow
def test_a_pipe_that_stops_in_mid_sample_gives_what_came_and_says_so(tiny_speech_sailer: Path) -> None:
    content = np.zeros((RATE + 800, 2), "<i2").tobytes() + b"\x00\x01\x02"
    done = run(tiny_speech_sailer, "-", "--rate", str(RATE), "--channels", "2", *OPTIONS, stdin=content)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 2  # a whole window, and the last one
    message = done.stderr.decode()
    assert "stopped in mid-sample, 3 bytes into the 4 of a frame (2 x int16), after 1.05 s" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.wav"], "No such audio file: nowhere.wav"),
        (["clip.wav", "--hop_s", "9"], "hop_s is 9.0 and chunk_s 3.0"),
        (["clip.wav", "--chunk_s", "40"], r"Windows of 40 s \(chunk_s\) cannot be judged"),
    ],
)
def test_what_cannot_be_heard(words: list[str], message: str, tiny_speech_sailer: Path, capsys) -> None:
    assert main(["listen", str(tiny_speech_sailer), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_sounddevice_a_microphone_is_an_error_that_names_it(monkeypatch, tiny_speech_sailer, capsys) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["listen", str(tiny_speech_sailer)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'sailer[microphone]'" in error and "- for standard input" in error


def test_a_pipe_without_audio(tiny_speech_sailer: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    assert main(["listen", str(tiny_speech_sailer), "-", "--rate", "16000"]) == 2
    assert "There was no audio" in capsys.readouterr().err


# Standard input


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
def test_wav_files_of_every_kind(subtype: str, kind: str) -> None:
    audio = np.stack([noise(0.35), noise(0.35, 1)], axis=1)
    heard = piped(wav(audio, 22050, subtype, kind))
    assert heard.rate == 22050
    blocks = list(heard.blocks)
    assert {len(block) for block in blocks[:-1]} == {2205} and blocks[0].shape[1] == 2
    values = np.concatenate(blocks)
    if values.dtype.kind != "f":
        full = 128 if subtype == "PCM_U8" else -float(np.iinfo(values.dtype).min)
        values = (values.astype(np.float64) - (128 if subtype == "PCM_U8" else 0)) / full
    np.testing.assert_allclose(values, audio, atol=1 / 100 if subtype == "PCM_U8" else 1 / 32000)


def test_a_wav_file_of_unknown_length_is_heard_to_its_end() -> None:
    content = bytearray(wav(noise(0.5)))
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff\xff\xff\xff"  # as ffmpeg writes to a pipe
    assert len(heard_of(piped(bytes(content)))) == RATE // 2
    content[place : place + 4] = b"\x00\x00\x00\x00"
    assert len(heard_of(piped(bytes(content)))) == RATE // 2


def test_what_follows_the_samples_is_not_heard() -> None:
    assert len(heard_of(piped(wav(noise(0.5)) + b"LIST\x04\x00\x00\x00abcd"))) == RATE // 2


def test_a_wav_file_that_was_cut_short_is_told(caplog: pytest.LogCaptureFixture) -> None:
    content = wav(noise(0.5))
    assert len(heard_of(piped(content[: 44 + 8000]))) == 4000
    assert "ended after 0.25 s; its header promises 0.50 s" in caplog.text
    blocks = piped(content[: 44 + 7999]).blocks
    with pytest.raises(ListenError, match=r"mid-sample, 1 bytes into the 2 of a frame \(1 x int16\), after 0.25 s"):
        list(blocks)


@pytest.mark.parametrize("sample_format", ["int16", "int32", "float32"])
def test_raw_samples(sample_format: str) -> None:
    audio = (noise(0.25) * 1000).astype(listen.SAMPLE_FORMATS[sample_format])
    heard = piped(audio.tobytes(), rate=8000, sample_format=sample_format)
    np.testing.assert_array_equal(heard_of(heard)[:, 0], audio)
    assert heard.rate == 8000


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "no WAV file"),
        (b"fLaC1234", {}, r"give their --rate in Hz.*ffmpeg -i FILE"),
        (wav(noise(0.2)), {"rate": 8000}, r"--rate is 8000, but the piped WAV file has 16000"),
        (wav(noise(0.2)), {"channels": 2}, r"--channels is 2, but .* has 1"),
        (wav(noise(0.2), subtype="PCM_24"), {}, "format 1 with 24 bits; convert it to 16"),
        (wav(noise(0.2), subtype="ALAW"), {}, "format 6 with 8 bits"),
        (wav(noise(0.2))[:30], {}, "ended within the header"),
        (b"RIFF\x00\x00\x00\x00WAVEdata\x08\x00\x00\x0012345678", {}, "does not say what its samples are"),
        (b"RIFF\x00\x00\x00\x00WAVELIST\xff\xff\xff\x7f", {}, "bytes of b'LIST' before its samples"),
        (b"\x00" * 8, {"rate": 0.0}, "--rate is 0.0"),
        (b"\x00" * 8, {"rate": float("nan")}, "--rate is nan"),
        (b"\x00" * 8, {"rate": 16000, "channels": 0}, "--channels is 0"),
    ],
)
def test_a_pipe_that_cannot_be_used(content: bytes, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        piped(content, **options)


# A microphone, whose library is stood in for: where the tests run there is none


class SoundDevice:
    """The part of sounddevice that is used: an input whose blocks come from another thread's callback."""

    PortAudioError = type("PortAudioError", (Exception,), {})

    def __init__(self, blocks: list[np.ndarray]) -> None:
        self.blocks = blocks

    def query_devices(self, device: object, kind: str) -> dict:
        if device == "none":
            raise ValueError("No input device matching 'none'")
        assert kind == "input"
        return {"default_samplerate": 48000.0}

    def InputStream(self, rate, size, device, channels, dtype, callback) -> SimpleNamespace:
        assert (rate, size, channels, dtype) == (48000, 4800, 1, "float32")
        shared = np.empty((size, 1), np.float32)

        class Running:
            def __enter__(self) -> None:
                for block in self.blocks:
                    shared[:] = block[:, None]  # the library uses its memory again
                    callback(shared, size, None, None)

            def __exit__(self, *error: object) -> None: ...

            blocks = self.blocks

        return Running()


def test_a_microphones_blocks_are_heard_at_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [np.full(4800, value, np.float32) for value in (0.1, 0.2, 0.3)]
    monkeypatch.setitem(sys.modules, "sounddevice", SoundDevice(blocks))
    heard = microphone()
    assert heard.rate == 48000
    for block in blocks:
        np.testing.assert_array_equal(next(heard.blocks)[:, 0], block)


def test_a_model_that_is_left_behind_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", SoundDevice([np.zeros(4800, np.float32)] * 301))
    with pytest.raises(ListenError, match=r"30 s behind the microphone.*hop_s"):
        list(microphone().blocks)
    with pytest.raises(ListenError, match=r"no microphone 'none'"):
        microphone("none")


def test_an_interruption_ends_with_the_last_result(tiny_speech_sailer: Path) -> None:
    def blocks():
        yield noise(1.2)
        raise KeyboardInterrupt

    stream = sailer.EmotionStream(sailer.load(tiny_speech_sailer), 1, 1)
    times = [result["timestamp"] for result in listen.results(stream, listen.Heard(blocks(), RATE))]
    assert times == [(0, 1), (pytest.approx(0.2), 1.2)]


# What is shown


def test_a_line() -> None:
    expected = "    1.00 -     4.00 s  Happy      Happy 0.75  Angry 0.25  arousal 0.50  valence 1.00  dominance 0.00"
    assert line_of(RESULT) == expected
    without = {"timestamp": (0.0, 0.5), "attributes": {"arousal": 0.5}}
    assert line_of(without) == "    0.00 -     0.50 s  arousal 0.50"


def test_bars() -> None:
    lines = bars_of(RESULT, width=9 + 8 + 8)
    assert lines == [
        "1.00 - 4.00 s   Happy",
        "Angry     ██       0.25",
        "Happy     ██████   0.75",
        "arousal   ████     0.50",
        "valence   ████████ 1.00",
        "dominance          0.00",
    ]
    assert bars_of({**RESULT, "attributes": {"x": 0.5 / 8}}, width=5 + 8 + 8)[3] == "x     ▌        0.06"
    assert bars_of(RESULT, 25, fine=False)[2] == "Happy     ######   0.75"


def test_bars_are_drawn_over_the_last_ones() -> None:
    file = io.StringIO()
    show([RESULT, RESULT], "bars", file)
    first, second = file.getvalue().split("\x1b[6A")
    assert first.count("\n") == second.count("\n") == 6
