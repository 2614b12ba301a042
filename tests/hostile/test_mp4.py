"""M4A and MP4: decoded where the av package is installed, else named with the way out."""

import io
from pathlib import Path

import numpy as np
import pytest

from sailer.audio_sailer import read_audio
from sailer.inference.predict import PredictionSettings, predict

RATE = 16000


def tone(seconds: float, rate: int) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def m4a(seconds: float = 1.0, rate: int = RATE, channels: int = 1, **options: str) -> bytes:
    av = pytest.importorskip("av")
    file, layout = io.BytesIO(), "mono" if channels == 1 else "stereo"
    with av.open(file, "w", format="mp4", options=options) as container:
        stream = container.add_stream("aac", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.stack([tone(seconds, rate)] * channels), format="fltp", layout=layout)
        frame.sample_rate = rate
        frames = av.AudioResampler(format="fltp", layout=layout, rate=rate, frame_size=1024)
        for part in (*frames.resample(frame), *frames.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
def test_it_is_heard(rate: int, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "clip.m4a"
    path.write_bytes(m4a(1.0, rate, channels))
    recording = read_audio(path)
    assert recording.warning is None and len(recording.waveform) / RATE == pytest.approx(1, abs=0.15)
    middle = recording.waveform[4000:12000]
    assert np.abs(np.fft.rfft(middle)).argmax() == 220  # 440 Hz over half a second
    assert np.abs(middle).max() == pytest.approx(0.3, abs=0.05)
    np.testing.assert_array_equal(read_audio(path.read_bytes()).waveform, recording.waveform)
    assert len(read_audio(path, max_seconds=0.25).waveform) == RATE // 4


@pytest.mark.slow
def test_it_is_bounded_and_used_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    content = m4a(4.0, movflags="frag_keyframe+empty_moov", frag_duration="500000")
    cut = read_audio(content[: len(content) // 2], name="half.m4a")
    assert 1 < len(cut.waveform) / RATE < 3 and cut.warning.startswith("half.m4a is cut short or damaged: the ")
    with pytest.raises(ValueError, match=r"is not readable audio|without sound"):
        read_audio(content[:100])
    monkeypatch.setattr("sailer.audio_sailer.MAXIMUM_SECONDS", 3.0)
    with pytest.raises(ValueError, match="longer than"):
        read_audio(content)
    assert len(read_audio(content, max_seconds=1).waveform) == RATE


@pytest.mark.slow
def test_it_has_a_row(tiny_speech_sailer: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "phone.m4a").write_bytes(m4a())
    (tmp_path / "clips" / "film.MP4").write_bytes(m4a(2.0, 44100, 2))
    assert predict(PredictionSettings(str(tiny_speech_sailer)), [str(tmp_path / "clips")], tmp_path / "out.csv") == 0


def test_without_a_decoder_it_is_named(
    tiny_speech_sailer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sailer.audio_sailer.av", None)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "phone.m4a").write_bytes(b"\0\0\0\x18ftypM4A " + bytes(999))
    assert predict(PredictionSettings(str(tiny_speech_sailer)), [str(tmp_path / "clips")], tmp_path / "out.csv") == 1
    assert "phone.m4a is MP4 (M4A): reading it needs the av package" in (tmp_path / "out.csv").read_text()
