"""Silence around the speech that is not heard: where it is cut, and that every way to the model cuts alike."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor, WhisperFeatureExtractor

import sailer
from sailer import SailerProcessor
from sailer.audio_sailer import trim_silence
from sailer.processing_sailer import SailerEnsembleProcessor

from .recorded_training import read_corpus, recording, write_corpus

RATE = 16000


def spoken(before: float, seconds: float, behind: float, floor: float = 1e-4, seed: int = 0) -> np.ndarray:
    """Noise of the loudness of speech in a quiet room."""
    random = np.random.default_rng(seed)
    parts = [round(part * RATE) for part in (before, seconds, behind)]
    loudness = np.repeat([floor, 0.1, floor], parts)
    return (loudness * random.standard_normal(sum(parts))).astype(np.float32)


@pytest.mark.parametrize("decibels", [20.0, 35.0, 60.0])
@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 1.5), st.floats(0.2, 2), st.floats(0, 1.5), st.sampled_from([0.0, 1e-4, 2e-3]), st.integers(0, 1000)
)
def test_it_is_librosas(decibels, before, seconds, behind, floor, seed):
    librosa = pytest.importorskip("librosa")
    waveform = spoken(before, seconds, behind, floor, seed)
    ours = trim_silence(waveform, RATE, decibels)
    theirs, _ = librosa.effects.trim(waveform, top_db=decibels, frame_length=2048, hop_length=512)
    np.testing.assert_array_equal(ours, theirs)


def test_what_is_left_is_the_speech_and_little_more():
    waveform = spoken(1.0, 1.5, 0.7)
    kept = trim_silence(waveform, RATE, 35)
    assert 1.5 <= len(kept) / RATE < 1.5 + 4 * 0.064
    assert np.shares_memory(kept, waveform)
    start = np.flatnonzero(waveform == kept[0])[0]
    assert start <= 1.0 * RATE and start + len(kept) >= 2.5 * RATE, "none of it is lost"


def test_loudness_does_not_matter_and_silence_stays():
    waveform = spoken(0.5, 1.0, 0.5)
    assert len(trim_silence(waveform, RATE, 35)) == len(trim_silence(0.003 * waveform, RATE, 35))
    silent = np.zeros(RATE, np.float32)
    assert trim_silence(silent, RATE, 35) is silent
    pause = np.concatenate([spoken(0, 0.5, 0), np.zeros(RATE, np.float32), spoken(0, 0.5, 0)])
    assert len(trim_silence(pause, RATE, 35)) == len(pause), "a pause is speech's own"


@pytest.mark.parametrize("place", [0, 700, RATE - 1])
def test_a_click_leaves_enough_to_be_heard(place):
    waveform = np.zeros(RATE, np.float32)
    waveform[place] = 1
    kept = trim_silence(waveform, RATE, 35)
    assert len(kept) >= 0.1 * RATE and kept.max() == 1
    assert len(trim_silence(waveform[: RATE // 20], RATE, 35)) <= RATE // 20


def test_the_processor_hears_what_is_left(tiny_whisper: Path, tiny_wavlm: Path, tmp_path: Path) -> None:
    clips = [spoken(0.6, 0.8, 0.3, seed=1), spoken(0.0, 1.1, 0.9, seed=2), spoken(0.2, 0.5, 0.0, seed=3)]
    cut = [trim_silence(clip, RATE, 35) for clip in clips]
    assert all(len(less) < len(clip) for less, clip in zip(cut, clips, strict=True))
    for backbone in (tiny_whisper, tiny_wavlm):
        extractor = AutoFeatureExtractor.from_pretrained(backbone)
        SailerProcessor(extractor, trim_silence=35).save_pretrained(tmp_path)
        trims, plain = SailerProcessor.from_pretrained(tmp_path), SailerProcessor(extractor)
        assert trims.trim_silence == 35
        found, expected = (one(audio=them, sampling_rate=RATE) for one, them in ((trims, clips), (plain, cut)))
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        alone = trims(audio=clips[2], sampling_rate=RATE)
        count = int(alone["attention_mask"].sum())
        assert count == int(found["attention_mask"][2].sum()) < found["attention_mask"].shape[1]
        if trims.makes_log_mel:  # the way to a GPU
            for name, value in plain.waveforms(cut, RATE).items():
                assert torch.equal(trims.waveforms(clips, RATE)[name], value), name


def test_members_that_cut_otherwise_hear_by_themselves() -> None:
    extractor = WhisperFeatureExtractor(feature_size=80)
    parts = [SailerProcessor(extractor, trim_silence=decibels) for decibels in (None, 35, 35)]
    both = SailerEnsembleProcessor(parts)
    assert [member["audio_input"] for member in both.members] == [0, 1, 1]
    clip = spoken(0.5, 1.0, 0.5)
    made = both(audio=[clip], sampling_rate=RATE)
    for number, part in enumerate(parts[:2]):
        assert torch.equal(made[f"input_features_{number}"], part(audio=[clip], sampling_rate=RATE)["input_features"])


@pytest.mark.parametrize("decibels", [0, -3, math.inf, math.nan, "35"])
def test_decibels_that_cannot_be(decibels):
    with pytest.raises(ValueError, match=r"trim_silence is .*; give decibels above 0"):
        SailerProcessor(WhisperFeatureExtractor(feature_size=80), trim_silence=decibels)


@pytest.mark.slow
def test_training_and_every_way_to_use_the_system_leave_the_silence_out(tmp_path: Path) -> None:
    """Through the command line: half a second of silence before each clip, of whose frames none is trained on."""
    from sailer.cli import main
    from sailer.inference.export import export

    manifest = write_corpus(tmp_path)
    frames, cut, whole = {}, {}, {}
    for row in (row for split in ("train", "validation", "test") for row in read_corpus(manifest, split)):
        speech, rate = soundfile.read(tmp_path / row["audio"], dtype="float32")
        whole[row["id"]] = np.concatenate([np.zeros(rate // 2, np.float32), speech])
        soundfile.write(tmp_path / row["audio"], whole[row["id"]], rate, subtype="FLOAT")
        cut[row["id"]] = trim_silence(whole[row["id"]], rate, 35)
        assert len(cut[row["id"]]) < len(whole[row["id"]]) - 0.4 * rate
        frames[row["id"]] = len(cut[row["id"]]) // 160
    options = {"corpus": "manifest", "corpus_options": "{}", "data_dir": manifest, "output_dir": tmp_path / "run"}
    options |= {"text_backbone": "null", "text_dropout": 0, "mixing_probability": 0, "cache_features": "off"}
    options |= {"num_train_epochs": 1, "shuffled_label_baseline": "false", "use_cpu": "true", "trim_silence": 35}
    with recording() as record:
        assert main(["train", "demo", *(f"--{name}={value}" for name, value in options.items())]) == 0
    heard = 0
    for batch in record.batches:
        for item, mask in zip(batch["items"], batch["attention_mask"], strict=True):
            assert int(mask.sum()) == frames[item["clips"][0]]
            heard += 1
    assert heard == 24
    name = read_corpus(manifest, "test")[0]["id"]
    folders = {"torch": tmp_path / "run", "onnx": export(tmp_path / "run", tmp_path / "exported")}
    for backend, folder in folders.items():
        classifier = sailer.load(folder, backend=backend)
        of_all, of_speech = (
            {row["label"]: row["score"] for row in classifier({"array": clips[name], "sampling_rate": rate})}
            for clips in (whole, cut)
        )
        assert of_all == pytest.approx(of_speech, abs=1e-6)
