"""EmotionStream: the pipeline's windows, whatever blocks the audio comes in; smoothing; what cannot be."""

import gc
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sailer import EmotionStream, SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline

from .sounds import RATE, noise


@pytest.fixture(scope="module")
def speech(tiny_speech_sailer: Path) -> SpeechEmotionPipeline:
    return classifier(tiny_speech_sailer)


@pytest.fixture(scope="module")
def recording() -> np.ndarray:
    return np.concatenate([noise(0.9, seed) for seed in range(4)])  # 3.6 s


def classifier(folder: Path, **options) -> SpeechEmotionPipeline:
    model, processor = SailerForAudioClassification.from_pretrained(folder), SailerProcessor.from_pretrained(folder)
    return SpeechEmotionPipeline(model, processor, device="cpu", **options)


def windows(pipeline: SpeechEmotionPipeline, audio: object, chunk_s: float, hop_s: float, **options) -> list[dict]:
    """What the pipeline gives for the whole recording."""
    strides = (0, chunk_s - hop_s)
    return pipeline(audio, chunk_length_s=chunk_s, stride_length_s=strides, return_timestamps=True, **options)


def assert_same(actual: object, expected: object, tolerance: float = 1e-5) -> None:
    """Equal names in one order, and numbers within the tolerance."""
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name, value in expected.items():
            assert_same(actual[name], value, tolerance)
    elif isinstance(expected, list) and expected and "score" in expected[0]:
        by_label = [{row["label"]: row["score"] for row in rows} for rows in (actual, expected)]
        assert by_label[0] == pytest.approx(by_label[1], abs=tolerance)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, tolerance)
    elif isinstance(expected, str):
        assert actual == expected
    else:
        np.testing.assert_allclose(actual, expected, atol=tolerance)


def in_blocks(audio: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """The audio cut into blocks of these sizes, over and over."""
    ends, blocks, turn = 0, [], 0
    while ends < len(audio):
        blocks.append(audio[ends : ends + sizes[turn % len(sizes)]])
        ends, turn = ends + sizes[turn % len(sizes)], turn + 1
    return blocks


@pytest.mark.parametrize(
    ("seconds", "chunk_s", "hop_s"),
    [(3.6, 1, 0.5), (3.5, 1, 0.5), (3.55, 1.5, 1.5), (3.6, 0.4, 0.3), (0.7, 1, 0.5), (1, 1, 0.5), (2.05, 2, 1)],
)
def test_results_are_the_pipelines(seconds, chunk_s, hop_s, speech: SpeechEmotionPipeline, recording) -> None:
    audio = recording[: round(seconds * RATE)]
    expected = windows(speech, audio, chunk_s, hop_s, return_all=True)
    stream = EmotionStream(speech, chunk_s, hop_s, return_all=True)
    whole = [result for block in in_blocks(audio, [777]) for result in stream.feed(block)]
    last = stream.close()
    assert len(last) == (0 if seconds in (3.5, 1) else 1)
    assert_same(whole + last, expected)
    assert len({round(result["primary"][0]["score"], 6) for result in expected}) == len(expected)  # none like another


def test_a_result_comes_as_soon_as_its_window_is_full(speech: SpeechEmotionPipeline, recording) -> None:
    stream = EmotionStream(speech, 1, 0.5, top_k=1)
    assert stream.feed(recording[: RATE - 1]) == []
    (result,) = stream.feed(recording[RATE - 1 : RATE])
    assert result["timestamp"] == (0, 1) and len(result["primary"]) == 1 and list(result) == ["timestamp", "primary"]
    times = [result["timestamp"] for result in stream.feed(recording[RATE:])]
    assert times == [(0.5, 1.5), (1, 2), (1.5, 2.5), (2, 3), (2.5, 3.5)]
    assert [result["timestamp"] for result in stream.close()] == [(2.6, 3.6)]  # at least a second of it
    assert stream.close() == []


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 6000), min_size=1, max_size=6).filter(any),
    rate=st.sampled_from([RATE, 8000, 44100, 48000]),
    smooth_s=st.sampled_from([0, 0.7]),
)
def test_blocks_change_nothing(sizes, rate, smooth_s, speech: SpeechEmotionPipeline, recording) -> None:
    audio = soxr.resample(recording[: 2 * RATE], RATE, rate) if rate != RATE else recording[: 2 * RATE]
    options = {"chunk_s": 0.7, "hop_s": 0.5, "smooth_s": smooth_s, "return_all": True}
    expected = list(EmotionStream(speech, **options).run([audio], rate))
    assert_same(list(EmotionStream(speech, **options).run(in_blocks(audio, sizes), rate)), expected)
    if not smooth_s:
        of_the_pipeline = windows(speech, {"array": audio, "sampling_rate": rate}, 0.7, 0.5, return_all=True)
        assert_same(expected, of_the_pipeline, 1e-5 if rate == RATE else 1e-3)


def test_single_samples(speech: SpeechEmotionPipeline, recording) -> None:
    audio = recording[: RATE // 2]
    stream = EmotionStream(speech, 0.3, 0.1)
    actual = [result for sample in audio for result in stream.feed(sample)] + stream.close()
    assert_same(actual, windows(speech, audio, 0.3, 0.1))


@pytest.mark.parametrize(
    "form",
    [
        lambda audio: audio[:, None],
        lambda audio: np.stack([audio + 0.05, audio - 0.05], axis=1),
        lambda audio: torch.from_numpy(audio),
        lambda audio: audio.tolist(),
        lambda audio: audio.astype(np.float64),
        lambda audio: np.round(audio * 32768).astype(np.int16),
        lambda audio: np.round(audio * 2**31).astype(np.int32),
        lambda audio: np.stack([np.round(audio * 32768).astype(np.int16)] * 2, axis=1),
    ],
    ids=["a channel", "stereo", "tensor", "list", "float64", "int16", "int32", "int16 stereo"],
)
@pytest.mark.parametrize("size", [1, 2, 4000])
def test_every_form_of_block(form: Callable, size: int, speech: SpeechEmotionPipeline, recording) -> None:
    audio = np.round(recording[: RATE // 4] * 16384) / np.float32(32768)
    expected = windows(speech, audio, 0.2, 0.1, return_all=True)
    blocks = [form(block) for block in in_blocks(audio, [size])]
    assert_same(list(EmotionStream(speech, 0.2, 0.1, return_all=True).run(blocks)), expected)


def test_a_microphones_blocks_at_48_khz(speech: SpeechEmotionPipeline, recording) -> None:
    audio = np.round(soxr.resample(recording, RATE, 48000).clip(-1, 0.999) * 32768).astype(np.int16)
    stream = EmotionStream(speech, 1, 0.5, return_all=True)
    actual = [result for block in in_blocks(audio, [24000]) for result in stream.feed(block[:, None], 48000)]
    expected = windows(speech, {"array": audio, "sampling_rate": 48000}, 1, 0.5, return_all=True)
    assert_same(actual + stream.close(), expected, 1e-3)


def test_options_are_the_pipelines(tiny_speech_sailer: Path, recording) -> None:
    early = classifier(tiny_speech_sailer, top_k=2)
    for options in ({}, {"top_k": 1}, {"return_all": True}, {"function_to_apply": "none"}):
        plain = list(EmotionStream(early, 1, 1, **options).run([recording]))
        assert_same(plain, windows(early, recording, 1, 1, **options))
        # A time constant near 0 forgets at once.
        assert_same(list(EmotionStream(early, 1, 1, 1e-6, **options).run([recording])), plain)


def test_a_transcriber_hears_each_window(tiny_sailer: Path, recording) -> None:
    both = classifier(tiny_sailer)

    def transcriber(sources: list[dict], batch_size: int) -> list[dict]:
        return [{"text": f"so happy {len(source['raw'])}"} for source in sources]

    stream = EmotionStream(both, 1.5, 1.5, transcriber=transcriber, return_all=True)
    actual = list(stream.run([recording]))
    assert [result["transcript"] for result in actual] == ["so happy 24000", "so happy 24000", "so happy 16000"]
    assert_same(actual, windows(both, recording, 1.5, 1.5, return_all=True, transcriber=transcriber))


# Smoothing


def test_smoothing_is_the_recursion_by_hand(speech: SpeechEmotionPipeline, recording) -> None:
    plain = list(EmotionStream(speech, 1, 0.5, return_all=True).run([recording]))
    smooth = list(EmotionStream(speech, 1, 0.5, smooth_s=0.8, return_all=True).run([recording]))
    state, before = None, None
    for own, result in zip(plain, smooth, strict=True):
        assert result["timestamp"] == own["timestamp"]
        scores = {row["label"]: row["score"] for row in own["primary"]}
        end = own["timestamp"][1]
        share = 1.0 if state is None else 1 - math.exp(-(end - before) / 0.8)
        state = {label: (1 - share) * (state or scores)[label] + share * score for label, score in scores.items()}
        before = end
        assert {row["label"]: row["score"] for row in result["primary"]} == pytest.approx(state, abs=1e-9)
        assert sum(state.values()) == pytest.approx(1)
        ranked = [row["score"] for row in result["primary"]]
        assert ranked == sorted(ranked, reverse=True)
        assert result["label"] == max(speech.model.config.scored_labels, key=state.__getitem__)
    assert before == pytest.approx(3.6) and share == pytest.approx(1 - math.exp(-0.1 / 0.8))  # the last is nearer


def test_what_has_a_head_is_smoothed(tiny_sailer: Path, recording) -> None:
    both = classifier(tiny_sailer)
    options = {"transcriber": lambda sources, batch_size: [{"text": "so happy"}] * len(sources), "return_all": True}
    plain = list(EmotionStream(both, 1, 1, **options).run([recording[: 2 * RATE]]))
    first, second = EmotionStream(both, 1, 1, smooth_s=1 / math.log(2), **options).run([recording[: 2 * RATE]])
    assert_same(first, plain[0], 0)
    for name in ("attributes", "attributes_1_7"):  # half the way
        middle = {key: (plain[0][name][key] + plain[1][name][key]) / 2 for key in plain[0][name]}
        assert second[name] == pytest.approx(middle)
    assert second["age"] == pytest.approx((plain[0]["age"] + plain[1]["age"]) / 2)
    np.testing.assert_allclose(second["embedding"], (plain[0]["embedding"] + plain[1]["embedding"]) / 2, rtol=1e-5)
    for name in ("secondary", "sex"):
        assert sum(row["score"] for row in second[name]) == pytest.approx(1)


# For ever, again, and side by side


@pytest.mark.slow
def test_memory_does_not_grow(speech: SpeechEmotionPipeline) -> None:
    stream, block = EmotionStream(speech, 0.5, 0.5, top_k=1), noise(2)
    for _ in range(3):
        stream.feed(block, 8000)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(12):  # 48 s at 8 kHz, 3 MB as the model hears them
        assert len(stream.feed(block, 8000)) > 0
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 300_000
    assert stream.seconds == pytest.approx(15 * 4)


def test_reset_begins_anew(speech: SpeechEmotionPipeline, recording) -> None:
    stream = EmotionStream(speech, 1, 0.5, smooth_s=1)
    expected = list(stream.run([recording]))
    for rate in (RATE, 48000):  # after close, and in mid-stream
        stream.reset()
        assert stream.seconds == 0
        stream.feed(noise(1.2, 9), rate)
    stream.reset()
    assert_same(list(stream.run([recording])), expected)


def test_streams_share_a_pipeline(speech: SpeechEmotionPipeline, recording) -> None:
    one, other = EmotionStream(speech, 1, 0.5), EmotionStream(speech, 1, 0.5)
    results: tuple[list, list] = ([], [])
    for block in in_blocks(recording, [3000]):
        results[0].extend(one.feed(block))
        results[1].extend(other.feed(block[::-1].copy()))
    assert_same(results[0], windows(speech, recording, 1, 0.5)[: len(results[0])])
    assert results[0] != results[1]


def test_a_block_of_code_ends_the_stream(speech: SpeechEmotionPipeline, recording) -> None:
    with EmotionStream(speech, 1, 1) as stream:
        assert len(stream.feed(recording)) == 3
        assert len(stream.close()) == 1
    with EmotionStream(speech, 1, 1) as stream:
        stream.feed(recording)
    with pytest.raises(ValueError, match="close"):
        stream.feed(recording)


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_s": 0.05, "hop_s": 0.05}, r"chunk_s is 0.05; it must be at least 0.1"),
        ({"chunk_s": 1, "hop_s": 0.001}, r"hop_s is 0.001; it must be at least 0.02"),
        ({"chunk_s": 1, "hop_s": 0}, r"hop_s is 0"),
        ({"chunk_s": 1, "hop_s": math.nan}, r"hop_s is nan"),
        ({"chunk_s": 1, "hop_s": 2}, r"hop_s is 2 and chunk_s 1: .* unheard"),
        ({"chunk_s": 1, "hop_s": 1, "smooth_s": -1}, r"smooth_s is -1"),
        ({"chunk_s": 31, "hop_s": 1}, r"Windows of 31 s \(chunk_s\).*this encoder takes"),
        ({"chunk_s": 1, "hop_s": 1, "top_k": 0}, r"top_k is 0"),
        ({"chunk_s": 1, "hop_s": 1, "prior": "naturl"}, r"prior is 'naturl'"),
    ],
)
def test_lengths_and_options_that_cannot_be(options: dict, message: str, speech: SpeechEmotionPipeline) -> None:
    with pytest.raises(ValueError, match=message):
        EmotionStream(speech, **options)


@pytest.mark.parametrize(
    ("option", "message"),
    [("tpo_k", "did you mean 'top_k'"), ("chunk_length_s", "told by chunk_s"), ("return_timestamps", "told by hop_s")],
)
def test_unknown_options(option: str, message: str, speech: SpeechEmotionPipeline) -> None:
    with pytest.raises(TypeError, match=message):
        EmotionStream(speech, 1, 1, **{option: 1})


def test_a_system_that_needs_transcripts(tiny_sailer: Path) -> None:
    both = classifier(tiny_sailer)
    both.model.config.text_dropout = 0.0
    with pytest.raises(ValueError, match=r"transcript together.*transcriber="):
        EmotionStream(both, 1, 1)


def test_the_rate_cannot_change(speech: SpeechEmotionPipeline, recording) -> None:
    stream = EmotionStream(speech, 1, 0.5)
    stream.feed(recording[:24000], 48000)
    with pytest.raises(ValueError, match=r"The block at 0.50 s has 44100 Hz and those before had 48000 Hz.*reset\(\)"):
        stream.feed(recording, 44100)
    stream.feed(recording[:24000])  # as before
    assert stream.seconds == 1
    (result,) = stream.close()
    assert result["timestamp"] == (0, 1)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (np.array([0.1, np.nan], np.float32), "not finite"),
        (np.array([0.1, np.inf], np.float32), "not finite"),
        (np.array([20000.0], np.float32), "full scale is 1"),
        (np.zeros((2, 24000), np.float32), r"shape \(2, 24000\); expected \(samples,\) or \(samples, channels\)"),
        (np.zeros((2, 3, 4), np.float32), r"shape \(2, 3, 4\)"),
        (np.zeros((4, 0), np.float32), r"shape \(4, 0\)"),
        ("abc", "holds no audio"),
        (b"\x00\x01", "holds no audio"),
        (None, "holds no audio"),
        (np.zeros(3, complex), "holds no audio"),
    ],
)
def test_a_block_that_is_no_audio_leaves_the_stream_as_it_was(block, message, speech, recording) -> None:
    stream = EmotionStream(speech, 1, 0.5)
    actual = stream.feed(recording[:20000])
    with pytest.raises(ValueError, match=rf"The block at 1.25 s.*{message}"):
        stream.feed(block)
    actual += stream.feed(recording[20000:]) + stream.close()
    assert_same(actual, windows(speech, recording, 1, 0.5))


@pytest.mark.parametrize("rate", [0, -16000, 100, 1e9, math.nan, "16000"])
def test_a_rate_that_cannot_be(rate: object, speech: SpeechEmotionPipeline) -> None:
    for block in (np.zeros(10, np.float32), np.zeros(0, np.float32)):
        stream = EmotionStream(speech, 1, 0.5)
        with pytest.raises(ValueError, match="sampling rate of"):
            stream.feed(block, rate)
        assert stream.feed(noise(1), RATE)


def test_nothing_and_next_to_nothing(speech: SpeechEmotionPipeline) -> None:
    stream = EmotionStream(speech, 1, 0.5)
    assert stream.feed(np.zeros(0, np.float32)) == [] and stream.close() == []
    stream.reset()
    stream.feed(np.zeros(800, np.float32))
    with pytest.raises(ValueError, match="ended after 50 ms of audio; at least 100 are needed"):
        stream.close()
    with pytest.raises(ValueError, match=r"The block at 0.05 s came after close\(\): call reset"):
        stream.feed(np.zeros(800, np.float32))


def test_a_window_that_fails_is_told_and_the_stream_goes_on(tiny_sailer: Path, recording) -> None:
    both, heard = classifier(tiny_sailer), []

    def transcriber(sources: list[dict], batch_size: int) -> list[dict]:
        heard.append(1)
        if len(heard) == 3:  # of silence, of the first window, of the second
            raise ConnectionError("the line is dead")
        return [{"text": "so happy"}]

    stream = EmotionStream(both, 1, 1, transcriber=transcriber)
    with pytest.raises((ValueError, ConnectionError), match="the line is dead") as failure:
        stream.feed(recording)
    assert "from 1.00 to 2.00 s" in "".join(failure.value.__notes__)
    times = [result["timestamp"] for result in stream.feed(recording[:0]) + stream.close()]
    assert times == [(0, 1), (2, 3), (2.6, 3.6)]
