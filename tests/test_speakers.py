"""Adaptation to a speaker: the arithmetic, batches, files of speakers, what is refused, and training's part."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sailer import SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline
from sailer.layers_sailer import SpeakerReference, fingerprint, reference_of, set_reference
from sailer.windows_sailer import with_speakers

from .scores import scores
from .sounds import noise

FOUR = ["anna", "bert", "carl", "dora"]


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [noise(0.5 + 0.1 * seed, seed) for seed in range(8)]


@pytest.fixture
def classifier(tiny_speech_sailer: Path) -> SpeechEmotionPipeline:
    """The paper's own model: the last layer, no normalisation of frames; it does not know the mean voice."""
    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    return SpeechEmotionPipeline(model, SailerProcessor.from_pretrained(tiny_speech_sailer), device="cpu")


@pytest.fixture
def adapted(classifier: SpeechEmotionPipeline, clips: list[np.ndarray]) -> SpeechEmotionPipeline:
    """It learned the mean voice of four speakers, and knows two others."""
    classifier.learn_mean_voice(clips, FOUR * 2)
    classifier.adapt(clips[:1], name="eve")
    classifier.adapt(clips[2:6], name="fred")
    return classifier


def test_the_mean_voice_counts_each_speaker_once_and_offsets_are_from_their_own_mean() -> None:
    means = torch.tensor([[0.0, 1.0], [2.0, 1.0], [10.0, 0.0], [4.0, 4.0], [4.0, 6.0], [4.0, 5.0]])
    speakers = ["a", "a", "b", "c", "c", "d"]
    said = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    reference = SpeakerReference(2, 2)
    reference.fit(means, said, speakers)
    # Speakers' means: (1, 1), (10, 0), (4, 5), (4, 5).
    assert reference.mean.tolist() == pytest.approx([4.75, 2.75])
    # First emotion: distances (-1, 0), (0, 0), (0, -1); second: (1, 0), (0, 1), (0, 0).
    assert reference.offsets.flatten().tolist() == pytest.approx([-1 / 3, -1 / 3, 1 / 3, 1 / 3])
    with pytest.raises(ValueError, match="learned from 3 speakers"):
        reference.fit(means[:4], said[:4], speakers[:4])


def test_a_voice_by_hand() -> None:
    """Three recordings deviate by (3, 0), (5, 4) and (1, -1); the shift is of their sum, (9, 3), a fifth."""
    reference = SpeakerReference(2, 2)
    reference.mean.copy_(torch.tensor([1.0, 0.0]))
    reference.offsets.copy_(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    means = torch.tensor([[4.0, 0.0], [6.0, 4.0], [2.0, -1.0]])

    def shift(*said: float) -> list[float]:
        return reference.shift(reference.statistics(means, torch.tensor([said] * 3))).tolist()

    # One emotion: its offset, three times, is no part of the voice. Both alike: nothing is left out.
    assert shift(1.0, 0.0) == pytest.approx([(9 - 6) / 5, 3 / 5])
    assert shift(0.5, 0.5) == pytest.approx([9 / 5, 3 / 5])
    assert reference.shift(reference.statistics(means, None)).tolist() == pytest.approx([9 / 5, 3 / 5])
    # 3 : 1 has 0.8113 bits of the one that two emotions can have: 0.1887 of (2.25 * 2, 0.75 * 4).
    assert shift(0.75, 0.25) == pytest.approx([(9 - 0.1887 * 4.5) / 5, (3 - 0.1887 * 3) / 5], abs=1e-4)

    said = torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.7, 0.3]])
    voice, two = reference.statistics(means, said), reference.statistics(means[[0, 2]], said[[0, 2]])
    rest = voice.without(reference.statistics(means[[1]], said[[1]]))
    assert (voice.count, rest.count) == (3, 2)
    assert reference.shift(rest).tolist() == pytest.approx(reference.shift(two).tolist(), abs=1e-6)
    nobody = two.without(two)
    assert nobody.count == 0 and reference.shift(nobody).tolist() == [0, 0], "of nobody nothing is known"


def test_the_shift_is_taken_off_every_frame_of_the_last_layer(adapted, clips) -> None:
    model = adapted.model
    reference = reference_of(model)
    shift = reference.shift(adapted.speakers["fred"])
    inputs = adapted.processor(audio=clips[:2], sampling_rate=16000)
    states, mask = model.sailer.audio_hidden_states(inputs["input_features"], inputs["attention_mask"])
    with torch.inference_mode():
        by_hand = model(audio_hidden_states=states - shift, attention_mask=mask).logits
        ours = model(**inputs, speaker_shift=shift.expand(2, -1)).logits
        plain = model(**inputs)
    assert torch.allclose(ours, by_hand, atol=1e-6)
    assert (ours - plain.logits).abs().max() > 1e-3
    means = torch.stack([state[own].mean(0) for state, own in zip(states, mask.bool(), strict=True)])
    assert torch.allclose(plain.speech_means, means, atol=1e-6)
    eve = adapted.speakers["eve"]
    assert torch.allclose(eve.total, means[0] - reference.mean, atol=1e-5)
    assert torch.allclose(eve.emotions, plain.logits[0].softmax(-1), atol=1e-5)


@pytest.mark.parametrize("layers", ["last", "weighted_norm", "concat_norm"])
def test_many_speakers_in_a_batch_are_as_one_at_a_time(tiny_whisper, clips, layers) -> None:
    from transformers import AutoFeatureExtractor

    torch.manual_seed(0)
    options = {"frame_pooling": 5, "frame_norm": True} if layers != "last" else {}
    model = SailerForAudioClassification.from_audio_text_pretrained(
        tiny_whisper, heads=["primary", "attributes"], audio_layers=layers, **options
    )
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(tiny_whisper))
    classifier = SpeechEmotionPipeline(model, processor, device="cpu")
    classifier.learn_mean_voice(clips, FOUR * 2, batch_size=3)
    names = [f"speaker {number}" for number in range(6)]
    for number, name in enumerate(names):
        classifier.adapt(clips[: number + 1], name=name)
    given = [*names, None, ""]
    together = classifier(clips, batch_size=8, speaker=given, return_all=True)
    for clip, name, result in zip(clips, given, together, strict=True):
        alone = classifier(clip, speaker=name, return_all=True)
        assert scores(result["primary"]) == pytest.approx(scores(alone["primary"]), abs=1e-6)
        assert np.allclose(result["embedding"], alone["embedding"], atol=1e-5)
    unadapted = classifier(clips, return_all=True)
    moved = [
        np.abs(one["embedding"] - other["embedding"]).max() for one, other in zip(together, unadapted, strict=True)
    ]
    assert min(moved[:6]) > 1e-5 and max(moved[6:]) < 1e-6


def test_a_speaker_is_one_for_all_a_list_or_a_key_of_each_input(adapted, clips) -> None:
    listed = adapted(clips[:2], speaker=["eve", "fred"])
    keyed = adapted(
        [{"audio": clip, "who": name} for clip, name in zip(clips, ("eve", "fred"), strict=False)], speaker_key="who"
    )
    assert keyed == listed
    for one, other in zip(adapted(clips[:2], speaker="fred"), (clips[0], clips[1]), strict=True):
        assert scores(one) == pytest.approx(scores(adapted(other, speaker="fred")), abs=1e-6)
    assert listed[0] == adapted(clips[0], speaker="eve") != adapted(clips[0])
    # A row of a corpus has a speaker of its own, who is nobody's until that is asked for.
    assert adapted({"audio": clips[0], "speaker": "somebody"}) == adapted(clips[0])


def test_wrong_speakers_are_named(adapted, clips) -> None:
    with pytest.raises(ValueError, match=r"'greta' is not known.*eve, fred"):
        adapted(clips[0], speaker="greta")
    with pytest.raises(ValueError, match="Item 1: speaker_key is 'who'"):
        adapted([{"audio": clips[0], "who": "eve"}, clips[1]], speaker_key="who")
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"names {count} speakers"):
            adapted(clips[:2], speaker=["eve"] * count)
    assert adapted([clips[0]], speaker=["greta"], on_error="return")[0]["error"].startswith("The speaker 'greta'")
    with pytest.raises(ValueError, match="name is ''"):
        adapted.adapt(clips[:1], name="")
    assert list(with_speakers("ab", "x")) == [("a", "x"), ("b", "x")]


def test_recordings_that_cannot_be_used_are_left_out_and_none_is_an_error(adapted, clips, tmp_path, caplog) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio")
    with pytest.raises(ValueError, match=r"No recording of speaker 'hans' can be used \(.*broken\.wav"):
        adapted.adapt([broken], name="hans")
    with pytest.raises(ValueError, match=r"No recording of speaker 'hans' can be used \(there is none"):
        adapted.adapt([], name="hans")
    assert "hans" not in adapted.speakers
    assert adapted.adapt([clips[0], broken], name="hans").count == 1
    assert torch.allclose(adapted.speakers["hans"].total, adapted.speakers["eve"].total, atol=1e-6)


def test_the_mean_voice_takes_four_speakers_and_a_name_for_each_recording(classifier, clips) -> None:
    with pytest.raises(ValueError, match=r"does not know the mean voice.*learn_mean_voice"):
        classifier.adapt(clips[:1], name="eve")
    with pytest.raises(ValueError, match="learned from 2 speakers"):
        classifier.learn_mean_voice(clips[:4], FOUR[:2] * 2)
    with pytest.raises(ValueError, match="8 recordings have 4 speakers"):
        classifier.learn_mean_voice(clips, FOUR)
    assert not classifier.model.config.speaker_reference


def test_speakers_are_saved_and_loaded_and_those_of_another_system_refused(adapted, clips, tmp_path) -> None:
    path = tmp_path / "speakers.safetensors"
    adapted.speakers.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["speakers.safetensors"]
    adapted.save_pretrained(tmp_path / "system")
    model = SailerForAudioClassification.from_pretrained(tmp_path / "system")
    again = SpeechEmotionPipeline(model, adapted.processor, device="cpu")
    again.speakers.load(path)
    assert list(again.speakers) == ["eve", "fred"] and again.speakers["fred"].count == 4
    assert again(clips[7], speaker="fred") == adapted(clips[7], speaker="fred")

    again.model.config.audio_layers = "weighted"
    with pytest.raises(ValueError, match="another system, layer choice"):
        again.speakers.load(path)
    again.model.config.audio_layers = "last"
    again.learn_mean_voice(clips[:4], FOUR)
    assert len(again.speakers) == 0, "what was known deviates from another mean voice"
    with pytest.raises(ValueError, match="another system, layer choice"):
        again.speakers.load(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        adapted.speakers.load(path)


def test_exports_and_ensembles_are_refused_by_name(adapted, clips) -> None:
    class OnnxModel:
        config = adapted.model.config

    adapted.model, model = OnnxModel(), adapted.model
    with pytest.raises(ValueError, match="A OnnxModel cannot be adapted"):
        adapted.speakers.__class__(adapted.model).save("nowhere")
    with pytest.raises(ValueError, match=r"A OnnxModel cannot be adapted.*backend='torch'"):
        adapted.learn_mean_voice(clips, FOUR * 2)
    adapted.model = model


@pytest.mark.slow
def test_a_training_run_keeps_the_mean_voice_of_its_speakers(tmp_path) -> None:
    from sailer.settings import resolve
    from sailer.train import fit, prepare

    for actor in range(1, 7):
        for emotion in (1, 3, 5):
            path = tmp_path / "ravdess" / f"03-01-0{emotion}-01-01-01-0{actor}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, noise(0.4, 10 * actor + emotion), 16000)
    recipe = {
        **{"corpus": "ravdess", "data_dir": str(tmp_path / "ravdess"), "output_dir": str(tmp_path / "out")},
        **{"audio_backbone": "tiny-whisper", "audio_layers": "weighted_norm", "frame_pooling": 4, "hidden_size": 8},
        **{"heads": ["primary"], "cache_features": "memory", "max_steps": 1, "use_cpu": True, "disable_tqdm": True},
    }
    actors = {"train_actors": "1-4", "validation_actors": "5", "test_actors": "6"}
    job = prepare(resolve({**recipe, "corpus_options": actors}))
    trainer = fit(job)
    model = job.system.model
    assert model.config.speaker_reference
    model.eval()
    states = [trainer.evaluation_collator([row]) for row in job.train_rows]
    with torch.no_grad():
        means = [
            model(**{k: v for k, v in batch.items() if "label" not in k and k != "consensus"}).speech_means
            for batch in states
        ]
    by_speaker = torch.cat(means).reshape(4, 3, -1).mean(1)
    assert torch.allclose(model.sailer.speaker_reference.mean, by_speaker.mean(0), atol=1e-5)
    assert model.sailer.speaker_reference.offsets.abs().max() > 0
    model.save_pretrained(tmp_path / "saved")
    loaded = SailerForAudioClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.sailer.speaker_reference.offsets, model.sailer.speaker_reference.offsets)
    relabelled = SailerForAudioClassification.from_pretrained(
        tmp_path / "saved", labels=["Good", "Bad"], ignore_mismatched_sizes=True
    )
    assert not relabelled.config.speaker_reference, "its offsets are other emotions'"

    # Where every clip is mixed with another in the plans that are kept, some are not kept alone: they are encoded.
    mixed = {"mixing_probability": 1.0, "augmentation_variants": 1, "majority_labels": ["Happy"]}
    job = prepare(resolve({**recipe, **mixed, "corpus_options": actors, "output_dir": str(tmp_path / "mixed")}))
    kept = [job.features.holds((clip,), "Kids are talking by the door") for clip in job.train_rows["id"]]
    assert not all(kept)
    trainer = fit(job)
    inputs = replace(trainer.evaluation_collator, features=None)([*job.train_rows])
    inputs = {name: value for name, value in inputs.items() if "label" not in name and name != "consensus"}
    with torch.no_grad():
        means = job.system.model(**inputs).speech_means.reshape(4, 3, -1).mean(1)
    assert torch.allclose(job.system.model.sailer.speaker_reference.mean, means.mean(0), atol=1e-4)

    few = {"train_actors": "1-3", "validation_actors": "5", "test_actors": "6"}
    job = prepare(resolve({**recipe, "corpus_options": few, "output_dir": str(tmp_path / "few")}))
    fit(job)
    assert not job.system.model.config.speaker_reference


def test_a_reference_moves_to_the_models_device_and_type(classifier) -> None:
    set_reference(classifier.model, torch.eye(4, 32), None, FOUR)
    assert classifier.model.sailer.speaker_reference.mean.shape == (32,)
    assert not classifier.model.sailer.speaker_reference.offsets.any()
    before = fingerprint(classifier.model)
    classifier.model.to(torch.bfloat16)
    assert fingerprint(classifier.model) == before, "the same system in half precision"
    assert reference_of(classifier.model).statistics(torch.ones(2, 32), None).total.dtype == torch.float32
