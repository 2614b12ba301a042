"""The pipeline: every kind of input, batches of like length in order, windows, transcripts, priors, bad input."""

import copy
import functools
import http.server
import io
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    Wav2Vec2FeatureExtractor,
)
from transformers import pipeline as auto_pipeline
from transformers.pipelines.pt_utils import KeyDataset

from sailer import SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline
from sailer.data.schema import SECONDARY_LABELS

from .scores import assert_same, difference, scores
from .sounds import RATE, noise


def load(folder: Path, **options: object) -> SpeechEmotionPipeline:
    model = SailerForAudioClassification.from_pretrained(folder)
    return SpeechEmotionPipeline(
        model=model, processor=SailerProcessor.from_pretrained(folder), device="cpu", **options
    )


@pytest.fixture(scope="module")
def speech(tiny_speech_sailer: Path) -> SpeechEmotionPipeline:
    return load(tiny_speech_sailer)


@pytest.fixture(scope="module")
def both(tiny_sailer: Path) -> SpeechEmotionPipeline:
    return load(tiny_sailer)


@pytest.fixture
def with_text_dropout(tiny_sailer: Path) -> SpeechEmotionPipeline:
    classifier = load(tiny_sailer)
    classifier.model.config.text_dropout = 0.3
    return classifier


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "clip.wav"
    soundfile.write(path, noise(1.3), RATE, subtype="FLOAT")
    return path


# ---- inputs


def test_every_kind_of_input_gives_the_same(speech: SpeechEmotionPipeline, wav: Path) -> None:
    wave = noise(1.3)
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=torch.tensor(wave)[None], sample_rate=RATE))
    expected = speech(wav)
    assert sum(scores(expected).values()) == pytest.approx(1) and len(expected) == 9
    assert [row["score"] for row in expected] == sorted((row["score"] for row in expected), reverse=True)
    for source in (
        str(wav),
        wav.read_bytes(),
        wave,
        torch.tensor(wave),
        np.stack([wave, wave]),
        {"array": wave, "sampling_rate": RATE},
        {"raw": wave, "sampling_rate": RATE},
        {"path": str(wav), "bytes": None},
        {"path": None, "bytes": wav.read_bytes()},
        {"audio": wave},
        {"audio": wave, "sampling_rate": RATE, "text": "a speech-only system does without"},
        {"audio": {"array": wave, "sampling_rate": RATE}},
        {"audio": str(wav), "transcript": "as in a corpus"},
        decoder,
    ):
        assert_same(speech(source), expected)


def test_url(speech: SpeechEmotionPipeline, wav: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(wav.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert_same(speech(f"{address}/clip.wav"), speech(wav))
        with pytest.raises(ValueError, match=r"nothing\.wav cannot be fetched.*404"):
            speech(f"{address}/nothing.wav")
        server.shutdown()


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_any_rate(speech: SpeechEmotionPipeline, rate: int) -> None:
    def sound(rate: int) -> np.ndarray:
        time = np.arange(2 * rate) / rate
        return (0.2 * np.sin(2 * np.pi * 300 * time) * (1 + np.sin(20 * time))).astype(np.float32)

    expected = speech(sound(RATE))
    assert_same(speech({"array": sound(rate), "sampling_rate": rate}), expected, tolerance=0.02)
    assert difference(speech({"array": sound(rate), "sampling_rate": RATE}), expected) > 0.1, "as it is not resampled"


def test_many(speech: SpeechEmotionPipeline, wav: Path) -> None:
    expected = speech(wav)
    rows = [{"audio": {"path": str(wav), "bytes": None}, "transcript": ""}] * 3
    stored = datasets.Dataset.from_list(rows)

    class MapStyle:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> str:
            return str(wav)  # never an IndexError

    class Lazy(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[str]:
            return iter([str(wav)] * 3)

    assert isinstance(speech([wav] * 3), list) and isinstance(speech((wav, wav)), list)
    for many in (
        [wav] * 3,
        iter([wav] * 3),
        (wav for _ in range(3)),
        stored,
        KeyDataset(stored, "audio"),
        MapStyle(),
        Lazy(),
    ):
        results = list(speech(many, batch_size=2))
        assert len(results) == 3
        for result in results:
            assert_same(result, expected)
    assert speech([]) == []


@pytest.mark.parametrize("workers", [0, 3])
def test_order_is_kept_and_company_changes_nothing(speech: SpeechEmotionPipeline, workers: int) -> None:
    clips = [noise(0.2 + 0.37 * (7 * i % 11), seed=i) for i in range(20)]
    alone = [speech(clip) for clip in clips]
    assert min(difference(one, other) for one, other in itertools.pairwise(alone)) > 1e-3
    for batch_size in (1, 3, 16):
        for one, other in zip(speech(clips, batch_size=batch_size, num_workers=workers), alone, strict=True):
            assert_same(one, other)


def test_clips_of_like_length_are_batched(speech: SpeechEmotionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    monkeypatch.setattr(speech, "processor", _Spy(speech.processor, batches))
    speech([noise(seconds) for seconds in (1.0, 0.3, 1.0, 0.3, 0.3, 1.0)], batch_size=3)
    assert batches == [[16000] * 3, [4800] * 3]
    batches.clear()
    speech([noise(12)] * 3, batch_size=3)  # 30 s at once is what a CPU's cache holds
    assert [len(batch) for batch in batches] == [2, 1]


class _Spy:
    def __init__(self, processor: SailerProcessor, batches: list[list[int]]) -> None:
        self._processor, self._batches = processor, batches

    def __call__(self, audio: list[np.ndarray], **options: object) -> object:
        self._batches.append([len(clip) for clip in audio])
        return self._processor(audio=audio, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._processor, name)


@pytest.mark.parametrize(("batch_size", "workers", "most"), [(1, 0, 3), (2, 0, 19), (2, 2, 24)])
def test_an_endless_generator_is_read_no_further_than_the_buffer(
    speech: SpeechEmotionPipeline, batch_size: int, workers: int, most: int
) -> None:
    taken = itertools.count()
    stream = speech(
        (noise(0.2, seed=next(taken)) for _ in itertools.count()), batch_size=batch_size, num_workers=workers
    )
    for _ in range(3):
        assert len(next(stream)) == 9
    stream.close()
    assert next(taken) <= most


# ---- options and results


def test_top_k_and_options_given_early(tiny_speech_sailer: Path, speech: SpeechEmotionPipeline) -> None:
    early = load(tiny_speech_sailer, top_k=2, batch_size=4, num_workers=1)
    assert early(noise(1)) == speech(noise(1), top_k=2) == speech(noise(1))[:2]
    assert len(early(noise(1), top_k=5)) == 5 and len(early(noise(1))) == 2


def test_return_all(both: SpeechEmotionPipeline) -> None:
    item = {"audio": noise(1), "text": "i am so happy"}
    result, plain = both(item, return_all=True), both(item)
    assert list(result) == [
        *("primary", "label", "attributes", "attributes_1_7", "secondary", "sex", "age", "transcript", "embedding")
    ]
    assert result["primary"] == plain and result["transcript"] == "i am so happy"
    scored = [row["label"] for row in plain if row["label"] != "Other"]
    assert result["label"] == scored[0]
    assert sorted(scores(result["secondary"])) == sorted(SECONDARY_LABELS)
    for name in ("arousal", "valence", "dominance"):
        assert 0 < result["attributes"][name] < 1
        assert result["attributes_1_7"][name] == pytest.approx(1 + 6 * result["attributes"][name])
    assert sum(scores(result["sex"]).values()) == pytest.approx(1) and 0 < result["age"] < 100
    with torch.no_grad():
        inputs = both.processor(noise(1), text="i am so happy", sampling_rate=RATE)
        np.testing.assert_allclose(result["embedding"], both.model(**inputs).embeddings[0], atol=1e-6)


def test_a_decision_is_never_other(speech: SpeechEmotionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = torch.zeros(9)
    bias[8], bias[3] = 50.0, 20.0
    monkeypatch.setattr(speech.model.heads["primary"][-1].bias, "data", bias)
    result = speech(noise(1), return_all=True)
    assert result["primary"][0]["label"] == "Other" and result["label"] == "Fear"


def test_without_the_primary_head(tiny_sailer: Path, tiny_whisper: Path) -> None:
    processor = SailerProcessor(SailerProcessor.from_pretrained(tiny_sailer).feature_extractor)
    for heads, labels in ((["attributes"], ["arousal", "valence", "dominance"]), (["age"], ["age"])):
        model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, heads=heads)
        result = SpeechEmotionPipeline(model=model, processor=processor)(noise(1))
        assert [row["label"] for row in result] == labels and all(row["score"] > 0 for row in result)
        windows = SpeechEmotionPipeline(model=model, processor=processor)(noise(20), return_timestamps=True)
        assert set(windows[0]) == {"timestamp", heads[0]}


def test_prior(speech: SpeechEmotionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech.model.config, "label_weights", [2.0, 1, 1, 1, 1, 1, 1, 1, 0])
    balanced, natural = scores(speech(noise(1))), scores(speech(noise(1), prior="natural"))
    assert natural["Other"] == 0
    rest = {label: score / (2 if label == "Angry" else 1) for label, score in balanced.items() if label != "Other"}
    assert natural["Angry"] == pytest.approx(rest["Angry"] / sum(rest.values()), rel=1e-4)


def test_silence_has_a_result(speech: SpeechEmotionPipeline, tiny_wavlm: Path) -> None:
    assert sum(scores(speech(np.zeros(RATE))).values()) == pytest.approx(1)
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_wavlm)
    raw = SpeechEmotionPipeline(
        model=model, processor=SailerProcessor(Wav2Vec2FeatureExtractor(return_attention_mask=True))
    )
    assert sum(scores(raw(np.zeros(RATE))).values()) == pytest.approx(1)


# ---- long audio


def test_windows_cover_the_audio_as_hand_computed(speech: SpeechEmotionPipeline) -> None:
    def timestamps(seconds: float, **options: object) -> list[tuple[float, float]]:
        return [window["timestamp"] for window in speech(noise(seconds), return_timestamps=True, **options)]

    assert timestamps(15) == [(0, 15)]
    assert timestamps(32) == [(0, 15), (10, 25), (20, 32)]
    assert timestamps(25) == [(0, 15), (10, 25)]
    assert timestamps(4, chunk_length_s=2, stride_length_s=0) == [(0, 2), (2, 4)]
    assert timestamps(5, chunk_length_s=2, stride_length_s=0) == [(0, 2), (2, 4), (4, 5)]
    assert timestamps(4.01, chunk_length_s=2, stride_length_s=0) == [(0, 2), (2, 4), (3.01, 4.01)]
    assert timestamps(5, chunk_length_s=3, stride_length_s=(0.5, 1)) == [(0, 3), (1.5, 4.5), (3, 5)]
    assert timestamps(20, chunk_length_s=0) == [(0, 20)]


def test_long_audio_is_the_mean_weighted_by_duration(both: SpeechEmotionPipeline) -> None:
    wave, text = noise(5), "leave me alone"
    options = {"chunk_length_s": 2, "stride_length_s": 0}
    windows = both({"audio": wave, "text": text}, return_all=True, return_timestamps=True, **options)
    whole = both({"audio": wave, "text": text}, return_all=True, **options)
    parts = [both({"audio": wave[2 * RATE * i :][: 2 * RATE], "text": text}, return_all=True) for i in range(3)]
    for window, part in zip(windows, parts, strict=True):
        assert_same(window["primary"], part["primary"])
        assert window["transcript"] == text
    for label, score in scores(whole["primary"]).items():
        expected = (
            sum(weight * scores(part["primary"])[label] for weight, part in zip((2, 2, 1), parts, strict=True)) / 5
        )
        assert score == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(
        whole["embedding"], np.average([part["embedding"] for part in parts], axis=0, weights=(2, 2, 1)), atol=1e-5
    )
    assert whole["age"] == pytest.approx(np.average([part["age"] for part in parts], weights=(2, 2, 1)), abs=1e-3)


def test_long_audio_among_short_in_small_batches(speech: SpeechEmotionPipeline) -> None:
    clips = [noise(1), noise(70, seed=1), noise(0.5, seed=2), noise(31, seed=3)]
    for one, other in zip(speech(clips, batch_size=2), [speech(clip) for clip in clips], strict=True):
        assert_same(one, other)


def test_longer_than_the_encoder_takes(speech: SpeechEmotionPipeline) -> None:
    with pytest.raises(ValueError, match=r"40\.0 s.*30 s.*chunk_length_s"):
        speech(noise(40), chunk_length_s=0)


# ---- transcripts


def test_transcript_is_heard(both: SpeechEmotionPipeline) -> None:
    one, other = (both({"audio": noise(1), "text": text}) for text in ("so happy", "leave me alone"))
    assert difference(one, other) > 0.05


@pytest.mark.parametrize("item", [noise(1), {"audio": noise(1)}, {"audio": noise(1), "text": " "}])
def test_no_transcript_where_one_is_needed(both: SpeechEmotionPipeline, item: object) -> None:
    with pytest.raises(ValueError, match="transcriber="):
        both(item)


def test_no_transcript_is_told_once(
    with_text_dropout: SpeechEmotionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        results = with_text_dropout([noise(1), {"audio": noise(1), "text": None}])
        assert "transcript" not in with_text_dropout(noise(1), return_all=True)
    assert len([record for record in caplog.records if "speech alone" in record.message]) == 1
    inputs = with_text_dropout.processor(noise(1), text="", sampling_rate=RATE)
    with torch.no_grad():
        expected = with_text_dropout.model(**inputs).logits.softmax(-1)[0].max().item()
    assert results[0][0]["score"] == pytest.approx(expected, abs=1e-6)


def test_transcriber_hears_each_window_that_has_no_transcript(both: SpeechEmotionPipeline) -> None:
    heard: list[int] = []

    def transcriber(sources: list[dict], batch_size: int) -> list[dict]:
        heard.extend(len(source["raw"]) for source in sources)
        return [{"text": f" so happy {len(source['raw']) // RATE}"} for source in sources]

    items = [noise(1), {"audio": noise(2), "text": "leave me alone"}, {"audio": noise(20), "text": ""}]
    results = both(items, transcriber=transcriber, batch_size=8, return_all=True)
    assert [result["transcript"] for result in results] == ["so happy 1", "leave me alone", "so happy 15 so happy 10"]
    assert sorted(heard) == [RATE, 10 * RATE, 15 * RATE]
    assert_same(results[0]["primary"], both({"audio": noise(1), "text": "so happy 1"}))


def test_transcriber_by_model_id_or_pipeline(both: SpeechEmotionPipeline, recognizer: Path) -> None:
    by_name = both(noise(1), transcriber=str(recognizer), return_all=True)
    assert set(by_name["transcript"]) == {"a"}
    made = auto_pipeline("automatic-speech-recognition", model=str(recognizer), device="cpu")
    assert both(noise(1), transcriber=made, return_all=True)["transcript"] == by_name["transcript"]
    assert len(both._transcribers) == 1


# ---- device and precision


def test_half_precision_is_close(
    tiny_speech_sailer: Path, speech: SpeechEmotionPipeline, different_clips: list[np.ndarray]
) -> None:
    half = auto_pipeline(model=str(tiny_speech_sailer), trust_remote_code=True, dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16
    full = speech(different_clips)
    assert min(difference(one, other) for one, other in itertools.combinations(full, 2)) > 0.1
    for clip, expected in zip(different_clips, full, strict=True):
        assert_same(half(clip), expected, tolerance=0.08)


def test_device_map(tiny_speech_sailer: Path, speech: SpeechEmotionPipeline) -> None:
    mapped = auto_pipeline(model=str(tiny_speech_sailer), trust_remote_code=True, device_map="cpu")
    assert_same(mapped(noise(1)), speech(noise(1)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tiny_speech_sailer: Path, speech: SpeechEmotionPipeline) -> None:
    model, processor = copy.deepcopy(speech.model), speech.processor
    assert_same(
        SpeechEmotionPipeline(model=model, processor=processor, device="cuda")(noise(1)), speech(noise(1)), 1e-3
    )


def test_features_come_from_the_models_device(speech: SpeechEmotionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    log_mel = speech.processor.log_mel

    def spy(waveforms: torch.Tensor, device: torch.device) -> torch.Tensor:
        devices.append(str(device))
        return log_mel(waveforms)

    monkeypatch.setattr(speech.processor, "log_mel", spy)
    monkeypatch.setattr(speech, "forward", lambda inputs: speech.model(**inputs))
    monkeypatch.setattr(speech, "device", torch.device("cuda:0"))
    with torch.no_grad():
        speech(noise(1))
    assert devices == ["cuda:0"]


def test_save_pretrained_takes_the_processor_along(both: SpeechEmotionPipeline, tmp_path: Path) -> None:
    both.save_pretrained(tmp_path)
    again = auto_pipeline(model=str(tmp_path), trust_remote_code=True)
    item = {"audio": noise(1), "text": "so happy"}
    assert again(item) == both(item)


# ---- bad input


def wav_bytes(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format="WAV")
    return buffer.getvalue()


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no file": (lambda: "nowhere.wav", r"nowhere\.wav"),
    "not audio": (lambda: b"RIFF this is no audio", "not readable audio"),
    "no bytes": (lambda: b"", "not readable audio"),
    "empty file": (lambda: wav_bytes(np.zeros(0)), "holds no audio"),
    "empty array": (lambda: np.zeros(0), "holds no audio"),
    "too short": (lambda: noise(0.01), "10 ms long; at least 100"),
    "NaN": (lambda: np.full(RATE, np.nan), "not finite"),
    "rate 0": (lambda: {"array": noise(1), "sampling_rate": 0}, "rate of 0"),
    "no rate": (lambda: {"array": noise(1)}, "sampling_rate"),
    "nothing in it": (lambda: {"path": None, "bytes": None}, "no 'array', 'raw', 'bytes' or 'path'"),
    "transcript": (lambda: {"audio": noise(1), "text": 3}, "transcript is int, not a string"),
    "no recording": (lambda: None, "holds no audio"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recording(name: str, speech: SpeechEmotionPipeline) -> None:
    make, message = BAD[name]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        speech(make())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_bad_item_among_good_ones(speech: SpeechEmotionPipeline, wav: Path, batch_size: int) -> None:
    items = [wav, noise(1), b"no audio", "nowhere.wav", wav]
    with pytest.raises(ValueError, match=r"Item 2: .*not readable audio"):
        speech(items, batch_size=batch_size)
    stream = speech(iter(items), batch_size=batch_size)
    assert_same(next(stream), speech(wav))  # those before it are not lost
    results = speech(items, batch_size=batch_size, on_error="return", num_workers=2)
    assert "not readable audio" in results[2]["error"] and "nowhere.wav" in results[3]["error"]
    assert_same(results[4], results[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "neutral"}, "prior is 'neutral'.*balanced"),
        ({"top_k": 0}, "top_k is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"chunk_length_s": -1}, "chunk_length_s is -1"),
        ({"chunk_length_s": 2, "stride_length_s": 1}, "leaves nothing"),
        ({"transcriber": "some/model"}, "speech-only"),
    ],
)
def test_bad_option(options: dict, message: str, speech: SpeechEmotionPipeline) -> None:
    with pytest.raises(ValueError, match=message):
        speech(noise(1), on_error=options.pop("on_error", "return"), **options)


def test_unknown_option_names_the_nearest(speech: SpeechEmotionPipeline) -> None:
    with pytest.raises(TypeError, match="'chunk_length'; did you mean 'chunk_length_s'"):
        speech(noise(1), chunk_length=3)


def test_no_processor(speech: SpeechEmotionPipeline) -> None:
    with pytest.raises(ValueError, match="processor="):
        SpeechEmotionPipeline(model=speech.model)
