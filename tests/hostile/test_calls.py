"""The pipeline's options and failures past reading: what one recording does in the model stays with it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor
from transformers import pipeline as auto_pipeline

from sailer import SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline

RATE = 16000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(RATE * seconds)).astype(np.float32)


def load(folder: Path, **options: object) -> SpeechEmotionPipeline:
    model, processor = SailerForAudioClassification.from_pretrained(folder), SailerProcessor.from_pretrained(folder)
    return SpeechEmotionPipeline(model=model, processor=processor, device="cpu", **options)


@pytest.fixture(scope="module")
def speech(tiny_speech_sailer: Path) -> SpeechEmotionPipeline:
    return load(tiny_speech_sailer)


# ---- failures in the model


def failing_on(frames: int, error: Exception, forward: Callable) -> Callable:
    """A forward pass that fails for a batch with a clip of so many frames."""

    def wrapped(inputs: dict[str, torch.Tensor], **options: object) -> object:
        if (inputs["attention_mask"].sum(-1) == frames).any():
            raise error
        return forward(inputs, **options)

    return wrapped


@pytest.mark.parametrize("error", [RuntimeError("out of order"), MemoryError(), ValueError("no such clip")])
def test_a_failing_batch_is_halved_down_to_the_clip(
    error: Exception, speech: SpeechEmotionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [noise(1, seed) for seed in range(7)]
    clips[3] = noise(0.77)
    alone = [speech(clip) for clip in clips]
    monkeypatch.setattr(speech, "forward", failing_on(77, error, speech.forward))
    results = speech(clips, on_error="return", batch_size=7)
    text = {"RuntimeError": "RuntimeError: out of order", "MemoryError": "MemoryError: "}.get(type(error).__name__)
    assert results.pop(3) == {"error": text or "no such clip"}
    for result, expected in zip(results, alone[:3] + alone[4:], strict=True):
        assert {row["label"]: row["score"] for row in result} == pytest.approx(
            {row["label"]: row["score"] for row in expected}, abs=1e-5
        )
    with pytest.raises(type(error)) as raised:
        speech(clips, batch_size=7)
    told = f"{raised.value} {getattr(raised.value, '__notes__', '')}"
    assert "Item 3" in told


def test_a_window_that_fails_ends_its_recording_alone(
    speech: SpeechEmotionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "forward", failing_on(177, RuntimeError("lost"), speech.forward))
    items = [noise(5.77), noise(1), noise(5)]  # the first has windows of 2, 2 and 1.77 s
    results = speech(items, on_error="return", chunk_length_s=2, stride_length_s=0, batch_size=2)
    assert results[0] == {"error": "RuntimeError: lost"} and len(results[1]) == len(results[2]) == 9
    short = speech([noise(1), noise(1)], on_error="return", chunk_length_s=0.05, stride_length_s=0)
    assert all("50 ms long; at least 100" in result["error"] for result in short)


def test_scores_that_are_not_finite_are_an_error(
    speech: SpeechEmotionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = speech.forward

    def strange(inputs: dict[str, torch.Tensor]) -> object:
        outputs = forward(inputs)
        outputs["logits"] = outputs["logits"].clone()
        outputs["logits"][inputs["attention_mask"].sum(-1) == 77] = torch.nan
        return outputs

    monkeypatch.setattr(speech, "forward", strange)
    good, bad = speech([noise(1), noise(0.77)], on_error="return", batch_size=2)
    assert len(good) == 9 and bad == {
        "error": "The system's logits for this recording are not finite (NaN or infinity)."
    }


def test_a_transcriber_that_fails_for_one(tiny_sailer: Path) -> None:
    both, calls = load(tiny_sailer), []

    def transcriber(sources: list[dict], batch_size: int) -> list[dict]:
        calls.append(len(sources))
        if any(len(source["raw"]) == 2 * RATE for source in sources):
            raise KeyError("text")
        return [{"text": "so happy"} for _ in sources]

    results = both([noise(1), noise(2), noise(1)], transcriber=transcriber, on_error="return", batch_size=3)
    assert results[1] == {"error": "KeyError: 'text'"} and len(results[0]) == len(results[2]) == 9
    assert sum(calls) <= 7


def test_an_interruption_is_nobodys_error(speech: SpeechEmotionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(inputs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(speech, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        speech([noise(1)], on_error="return")


# ---- options


def test_on_error_is_taken_at_construction(tiny_speech_sailer: Path, speech: SpeechEmotionPipeline) -> None:
    made = auto_pipeline(model=str(tiny_speech_sailer), trust_remote_code=True, on_error="return")
    for classifier in (made, load(tiny_speech_sailer, on_error="return")):
        assert "nowhere.wav" in classifier("nowhere.wav")["error"]
        with pytest.raises(FileNotFoundError):
            classifier("nowhere.wav", on_error="raise")
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        load(tiny_speech_sailer, on_error="ignore")
    with pytest.raises(FileNotFoundError):
        speech("nowhere.wav")


@pytest.mark.parametrize(
    ("option", "value"), [("batch_size", 0), ("batch_size", -1), ("batch_size", 2.5), ("num_workers", -1)]
)
def test_numbers_are_checked_at_construction_and_call(
    option: str, value: float, tiny_speech_sailer: Path, speech: SpeechEmotionPipeline
) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        load(tiny_speech_sailer, **{option: value})
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        speech(noise(1), **{option: value})


def test_strides_are_checked_at_the_systems_rate(tiny_speech_sailer: Path, speech: SpeechEmotionPipeline) -> None:
    windows = speech(noise(5), chunk_length_s=2, stride_length_s=0.6, return_timestamps=True)
    assert [window["timestamp"] for window in windows][:2] == [(0, 2), (0.8, 2.8)]
    early = load(tiny_speech_sailer, chunk_length_s=2, stride_length_s=0.6)
    assert [window["timestamp"] for window in early(noise(3), return_timestamps=True)][:2] == [(0, 2), (0.8, 2.8)]
    with pytest.raises(ValueError, match="leaves nothing of a window of 1"):  # with the strides given before
        early(noise(3), chunk_length_s=1)
    with pytest.raises(ValueError, match="leaves nothing"):
        speech(noise(5), chunk_length_s=2, stride_length_s=(1, 1.00001))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_length_s": float("nan")}, "chunk_length_s is nan"),
        ({"chunk_length_s": float("inf")}, "chunk_length_s is inf"),
        ({"chunk_length_s": "2"}, "chunk_length_s is '2'; it must be at least 0"),
        ({"stride_length_s": (1, 2, 3)}, "give one number of seconds, or two"),
        ({"stride_length_s": "1"}, "stride_length_s is '1'"),
        ({"stride_length_s": (1, -1)}, "stride_length_s is -1"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
    ],
)
def test_strange_numbers(options: dict, message: str, speech: SpeechEmotionPipeline) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        speech(noise(1), on_error="return", **options)


def test_results_are_ready_for_json(tiny_sailer: Path) -> None:
    both, item = load(tiny_sailer), {"audio": noise(5), "text": "so happy"}
    for options in ({}, {"return_timestamps": True, "chunk_length_s": 2, "stride_length_s": 0}):
        full = both(item, return_all=True, **options)
        lean = both(item, return_all=True, return_embedding=False, **options)
        assert json.loads(json.dumps(lean)) is not None
        for one, other in zip(
            *([result] if isinstance(result, dict) else result for result in (full, lean)), strict=True
        ):
            embedding = one.pop("embedding")
            assert isinstance(embedding, np.ndarray) and one == other and json.dumps(one)
    assert "embedding" in load(tiny_sailer, return_embedding=True)(item, return_all=True)
    assert "embedding" not in load(tiny_sailer, return_embedding=False)(item, return_all=True)


def test_an_extractor_that_cuts_is_not_given_more(tiny_speech_sailer: Path) -> None:
    """A converted checkpoint hears 15 s at most, whatever it is given."""
    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    processor = SailerProcessor(WhisperFeatureExtractor(chunk_length=15), audio_padding="max_length")
    converted = SpeechEmotionPipeline(model=model, processor=processor, device="cpu")
    with pytest.raises(ValueError, match=r"windows of 60\.0 s and this encoder takes 15 s: choose a chunk_length_s"):
        converted(noise(60), chunk_length_s=0)
    assert converted(noise(14), chunk_length_s=0) == converted(noise(14))
    windows = converted(noise(60), return_timestamps=True)
    assert [window["timestamp"][1] for window in windows][-1] == 60


def test_a_rate_of_nothing_is_not_the_systems_own(speech: SpeechEmotionPipeline) -> None:
    with pytest.raises(ValueError, match="clip 0 of 1 has a sampling rate of 0"):
        speech.processor(audio=noise(1), sampling_rate=0)
