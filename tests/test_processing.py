"""SailerProcessor and load_audio: what goes in is converted or refused by name, and leaves padded and masked."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from transformers import (
    AudioClassificationPipeline,
    AutoFeatureExtractor,
    AutoTokenizer,
    BatchFeature,
    SequenceFeatureExtractor,
    WhisperFeatureExtractor,
    pipeline,
)

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.audio_sailer import load_audio
from sailer.pipeline_sailer import SpeechEmotionPipeline
from sailer.training.tiny_backbones import make_tiny_wavlm


@pytest.fixture(scope="module")
def speech(tiny_whisper: Path) -> SailerProcessor:
    return SailerProcessor(AutoFeatureExtractor.from_pretrained(tiny_whisper))


@pytest.fixture(scope="module")
def both(tiny_whisper: Path, tiny_text: Path) -> SailerProcessor:
    return SailerProcessor(
        AutoFeatureExtractor.from_pretrained(tiny_whisper), AutoTokenizer.from_pretrained(tiny_text)
    )


def tone(seconds: float, rate: int = 16000, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def test_log_mel_inputs_and_their_mask(speech: SailerProcessor) -> None:
    inputs = speech(audio=[tone(0.5), tone(1.0)], sampling_rate=16000)
    assert inputs["input_features"].shape == (2, 80, 102)  # 100 frames and the two of the tail
    assert inputs["attention_mask"].sum(1).tolist() == [50, 100]
    assert inputs["attention_mask"][0, :50].all()


@pytest.mark.parametrize("padding", ["longest", "max_length"])
@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_the_extractors(padding: str, mels: int) -> None:
    """Clip by clip, and of a padded batch of waveforms as on a GPU; loud and soft, and ends anywhere within a hop."""
    extractor = WhisperFeatureExtractor(feature_size=mels, chunk_length=3)
    processor = SailerProcessor(extractor, audio_padding=padding)
    random = np.random.default_rng(0)
    lengths = [1600, 1759, 1760, 7990, 16000 + 121, 31999, 32000, 48000 + 77]
    clips = [random.normal(0, 10.0**-place, length).astype(np.float32) for place, length in enumerate(lengths)]
    clips = [clip.clip(-1, 1) for clip in clips]
    longest = {} if padding == "max_length" else {"padding": "longest", "truncation": False}
    silent = [np.pad(clip, (0, 320 if longest else 0)) for clip in clips]
    expected = extractor(silent, sampling_rate=16000, return_tensors="pt", **longest)["input_features"]
    inputs = processor(audio=clips, sampling_rate=16000)
    torch.testing.assert_close(inputs["input_features"], expected, rtol=0, atol=1e-5)
    later = processor.waveforms(clips, sampling_rate=16000)
    torch.testing.assert_close(processor.log_mel(later["waveforms"]), expected, rtol=0, atol=1e-5)
    assert torch.equal(later["attention_mask"], inputs["attention_mask"])


def test_dither_is_heard_all_over_the_batch() -> None:
    processor = SailerProcessor(WhisperFeatureExtractor(dither=0.01))
    features = processor(audio=[tone(0.2), tone(1.0)], sampling_rate=16000)["input_features"]
    assert features[0, :, 60:].std() > 0.01


def test_waveforms_are_for_log_mel_alone(tiny_wavlm: Path) -> None:
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(tiny_wavlm))
    assert not processor.makes_log_mel
    with pytest.raises(ValueError, match="Wav2Vec2FeatureExtractor makes no log-mel"):
        processor.waveforms([tone(0.5)], sampling_rate=16000)


def test_one_waveform_and_a_list_of_one_are_the_same(speech: SailerProcessor) -> None:
    one = speech(audio=tone(0.4), sampling_rate=16000)
    for same in ([tone(0.4)], torch.from_numpy(tone(0.4)), tone(0.4).tolist(), tone(0.4)[None]):
        torch.testing.assert_close(speech(audio=same, sampling_rate=16000)["input_features"], one["input_features"])


def test_waveform_extractor(tiny_wavlm: Path) -> None:
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(tiny_wavlm))
    inputs = processor(audio=[tone(0.5), tone(1.0)], sampling_rate=16000)
    assert inputs["input_values"].shape == (2, 16000)
    assert inputs["attention_mask"].sum(1).tolist() == [8000, 16000]


def test_fixed_length_padding_is_the_extractors(tiny_whisper: Path) -> None:
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(tiny_whisper), audio_padding="max_length")
    inputs = processor(audio=[tone(0.5), tone(31.0)], sampling_rate=16000)
    assert inputs["input_features"].shape == (2, 80, 3000)
    assert inputs["attention_mask"].sum(1).tolist() == [50, 3000]
    with pytest.raises(ValueError, match="audio_padding is 'none'"):
        SailerProcessor(processor.feature_extractor, audio_padding="none")


def test_transcripts(both: SailerProcessor) -> None:
    inputs = both(audio=[tone(0.2)] * 3, text=["so happy", "", "  "], sampling_rate=16000)
    tokens = inputs["text_attention_mask"].sum(1)
    assert tokens[0] > 2 and tokens[1] == tokens[2] == 0
    assert both(audio=tone(0.2), sampling_rate=16000)["text_attention_mask"].sum() == 0
    long = both(audio=tone(0.2), text="happy " * 1000, sampling_rate=16000)
    assert long["input_ids"].shape[1] == 126


def test_transcripts_that_cannot_be(both: SailerProcessor, speech: SailerProcessor) -> None:
    with pytest.raises(ValueError, match="Transcript 1 is NoneType"):
        both(audio=[tone(0.2)] * 2, text=["a", None], sampling_rate=16000)
    with pytest.raises(ValueError, match="1 transcripts for 2 clips"):
        both(audio=[tone(0.2)] * 2, text=["a"], sampling_rate=16000)
    with pytest.raises(ValueError, match="speech-only"):
        speech(audio=tone(0.2), text="a", sampling_rate=16000)


def test_bad_waveforms_name_their_position(speech: SailerProcessor) -> None:
    with pytest.raises(ValueError, match="clip 1 of 2 is 10 ms long; at least 100 ms"):
        speech(audio=[tone(0.2), tone(0.01)], sampling_rate=16000)
    with pytest.raises(ValueError, match="clip 0 of 1 holds no audio"):
        speech(audio=np.zeros(0, np.float32), sampling_rate=16000)
    with pytest.raises(ValueError, match=r"clip 0 of 1 holds values that are not finite"):
        speech(audio=np.full(8000, np.nan), sampling_rate=16000)
    with pytest.raises(ValueError, match="No audio"):
        speech(text="a")


def test_without_a_sampling_rate_it_warns(
    speech: SailerProcessor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    speech(audio=tone(0.2))
    assert "sampling_rate" in caplog.text


def test_other_rates_are_resampled(speech: SailerProcessor) -> None:
    expected = speech(audio=tone(1.0), sampling_rate=16000)["input_features"]
    resampled = speech(audio=tone(1.0, 8000), sampling_rate=8000)["input_features"]
    assert resampled.shape == expected.shape
    assert expected.mean(-1).argmax() == resampled.mean(-1).argmax()


def soxr_at_once(waveform: np.ndarray, rate: int) -> np.ndarray:
    return soxr.resample(waveform, rate, 16000, quality="HQ")


def librosas(waveform: np.ndarray, rate: int) -> np.ndarray:
    import librosa  # whose numba compiles for 20 s where it has not done so before

    return librosa.resample(waveform, orig_sr=rate, target_sr=16000)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
@pytest.mark.parametrize("resample", [soxr_at_once, pytest.param(librosas, marks=pytest.mark.slow)])
def test_resampling_is_soxrs_and_librosas(
    resample: Callable[[np.ndarray, int], np.ndarray], rate: int, tmp_path: Path
) -> None:
    waveform = np.random.default_rng(0).normal(0, 0.1, 3 * rate).astype(np.float32)
    expected = resample(waveform, rate)
    np.testing.assert_allclose(load_audio({"array": waveform, "sampling_rate": rate}), expected, atol=1e-6)
    soundfile.write(tmp_path / "clip.wav", waveform, rate, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "clip.wav"), expected, atol=1e-5)  # block by block


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_of_any_rate_and_channels(rate: int, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    wave = tone(1.0, rate)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate)
    loaded = load_audio(path)
    assert loaded.dtype == np.float32 and loaded.shape == (16000,)
    assert np.abs(np.fft.rfft(loaded)).argmax() == 440
    np.testing.assert_array_equal(load_audio(path.read_bytes()), loaded)
    np.testing.assert_array_equal(load_audio({"path": None, "bytes": path.read_bytes()}), loaded)
    np.testing.assert_array_equal(load_audio({"path": str(path), "bytes": None}), loaded)
    assert load_audio(path, max_seconds=0.25).shape == (4000,)


def test_arrays_of_any_kind() -> None:
    wave = tone(0.5)
    np.testing.assert_array_equal(load_audio(wave), wave)
    stereo = np.stack([wave, np.zeros_like(wave)])
    np.testing.assert_allclose(load_audio(stereo), wave / 2)
    np.testing.assert_allclose(load_audio(stereo.T), wave / 2)
    np.testing.assert_allclose(load_audio((wave * 32767).astype(np.int16)), wave, atol=1e-4)
    assert load_audio({"array": tone(0.5, 8000), "sampling_rate": 8000}).shape == (8000,)
    assert load_audio({"raw": wave, "sampling_rate": 16000}).shape == (8000,)


def test_sources_that_hold_no_audio(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        load_audio(tmp_path / "missing.wav")
    empty = tmp_path / "empty.wav"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.wav is not readable audio"):
        load_audio(empty)
    text = tmp_path / "text.wav"
    text.write_text("this is no audio")
    with pytest.raises(ValueError, match=r"text\.wav is not readable audio.*ffmpeg"):
        load_audio(text)
    with pytest.raises(ValueError, match="no 'sampling_rate'"):
        load_audio({"array": tone(0.1)})
    with pytest.raises(ValueError, match="sampling rate of 0"):
        load_audio({"array": tone(0.1), "sampling_rate": 0})
    with pytest.raises(ValueError, match="no 'array', 'raw', 'bytes' or 'path'"):
        load_audio({"path": None, "bytes": None})


def test_a_systems_folder_asks_no_questions(tiny_sailer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prompt: str) -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", refuse)
    assert SailerProcessor.from_pretrained(tiny_sailer).tokenizer is not None


def test_round_trip(both: SailerProcessor, speech: SailerProcessor, tmp_path: Path) -> None:
    for name, processor in (("both", both), ("speech", speech)):
        processor.save_pretrained(tmp_path / name)
        again = SailerProcessor.from_pretrained(tmp_path / name)
        assert (again.tokenizer is None) == (processor.tokenizer is None)
        text = None if processor.tokenizer is None else "so happy"
        first, second = (p(audio=tone(0.3), text=text, sampling_rate=16000) for p in (processor, again))
        assert first.keys() == second.keys() == set(processor.model_input_names)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_tokenizer_loaded_offline_does_not_keep_others_from_the_hub(both: SailerProcessor, tmp_path: Path) -> None:
    both.tokenizer.init_kwargs["local_files_only"] = True
    both.save_pretrained(tmp_path)
    assert "local_files_only" not in (tmp_path / "tokenizer_config.json").read_text()


def system(
    backbone: Path, folder: Path, audio_padding: str = "longest"
) -> tuple[SailerForAudioClassification, SailerProcessor]:
    """A system, and the processor that is saved in the folder."""
    torch.manual_seed(0)
    attended = audio_padding == "max_length"
    model = SailerForAudioClassification.from_audio_text_pretrained(
        backbone, heads=["primary"], attend_to_padding=attended
    )
    SailerProcessor(AutoFeatureExtractor.from_pretrained(backbone), audio_padding=audio_padding).save_pretrained(
        folder
    )
    return model.eval(), SailerProcessor.from_pretrained(folder)


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(16000 * seconds)).astype(np.float32)


@pytest.mark.parametrize("audio_padding", ["longest", "max_length"])
def test_a_stock_extractor_serves_a_whisper_system(audio_padding: str, tiny_whisper: Path, tmp_path: Path) -> None:
    model, processor = system(tiny_whisper, tmp_path, audio_padding)
    stock = AutoFeatureExtractor.from_pretrained(tmp_path)
    clips = [noise(seconds) for seconds in (0.5, 1.00005, 1.005, 2.02)]
    with torch.no_grad():
        ours = model(**processor(audio=clips, sampling_rate=16000))
        inputs = stock(clips, sampling_rate=16000, return_tensors="pt")
        assert inputs["input_features"].shape == (4, 80, 3000)
        theirs = model(**inputs)
        torch.testing.assert_close(theirs.embeddings, ours.embeddings, atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs.logits, ours.logits, atol=1e-5, rtol=0)
        # Asked for its mask, it rounds the last frame up where ours rounds down: one position of 20 ms more at most.
        asked = stock(clips, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        more = asked["attention_mask"].sum(1) - processor(audio=clips, sampling_rate=16000)["attention_mask"].sum(1)
        assert more.tolist() == [0, 1, 1, 0]
        rounded = model(**asked)
        assert (rounded.logits - ours.logits).abs().max() < 2e-3
        torch.testing.assert_close(rounded.logits[[0, 3]], ours.logits[[0, 3]], atol=1e-5, rtol=0)
        # The padding without a mask would be heard as speech.
        with pytest.raises(ValueError, match=r"3000 frames \(30 s\) came without attention_mask.*SailerProcessor"):
            model(input_features=inputs["input_features"])


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_stock_extractor_serves_a_waveform_system(norm: str, tmp_path: Path) -> None:
    backbone = make_tiny_wavlm(tmp_path / "wavlm", norm=norm)
    model, processor = system(backbone, tmp_path / "system")
    stock = AutoFeatureExtractor.from_pretrained(tmp_path / "system")
    assert AutoFeatureExtractor.from_pretrained(backbone).return_attention_mask == (norm == "layer")
    clips = [noise(seconds) for seconds in (0.5, 1.005, 0.77)]
    with torch.no_grad():
        ours = model(**processor(audio=clips, sampling_rate=16000)).embeddings
        for options in ({}, {"return_attention_mask": True}):
            inputs = stock(clips, sampling_rate=16000, return_tensors="pt", padding=True, **options)
            torch.testing.assert_close(model(**inputs).embeddings, ours, atol=1e-5, rtol=0)


def test_a_stock_pipeline_gives_the_processors_scores(tiny_whisper: Path, tmp_path: Path) -> None:
    model, processor = system(tiny_whisper, tmp_path)
    stock = AutoFeatureExtractor.from_pretrained(tmp_path)
    classifier = pipeline("audio-classification", model=model, feature_extractor=stock)
    assert type(classifier) is AudioClassificationPipeline
    clip = noise(1.005)
    with torch.no_grad():
        expected = model.probabilities(model(**processor(audio=clip, sampling_rate=16000)).logits)[0]
    scores = {result["label"]: result["score"] for result in classifier(clip, top_k=None)}
    np.testing.assert_allclose([scores[label] for label in model.config.labels], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"needs processor=SailerProcessor\.from_pretrained"):
        SpeechEmotionPipeline(model, feature_extractor=stock)


def test_the_processor_leaves_the_extractor_it_is_given_as_it_was(tiny_whisper: Path) -> None:
    extractor = AutoFeatureExtractor.from_pretrained(tiny_whisper)
    assert SailerProcessor(extractor).feature_extractor.return_attention_mask
    assert not extractor.return_attention_mask


class LoudestExtractor(SequenceFeatureExtractor):
    """Levels by the loudest sample of a batch: what some of transformers' extractors do in parts of theirs."""

    model_input_names = ("input_values", "attention_mask")

    def __call__(self, clips: np.ndarray | list[np.ndarray], padding: bool, **options) -> BatchFeature:
        clips = clips if isinstance(clips, list) else [clips]
        loudest = max(np.abs(clip).max() for clip in clips)
        inputs = BatchFeature({"input_values": [clip / loudest for clip in clips]})
        return self.pad(inputs, padding, return_attention_mask=True, return_tensors="pt")


def test_extractors_are_given_one_clip_at_a_time() -> None:
    processor = SailerProcessor(LoudestExtractor(feature_size=1, sampling_rate=16000, padding_value=0.0))
    inputs = processor(audio=[tone(0.5), 0.1 * tone(0.3), tone(0.2)], sampling_rate=16000)
    assert inputs["attention_mask"].sum(1).tolist() == [8000, 4800, 3200]
    torch.testing.assert_close(inputs["input_values"].abs().amax(1), torch.ones(3))
    assert (inputs["input_values"][inputs["attention_mask"] == 0] == 0).all()
