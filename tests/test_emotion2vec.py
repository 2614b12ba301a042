"""emotion2vec converted: FunASR's numbers for any shape of it, alone or in a batch, and nothing on a guess."""

import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

from sailer import SpeechEmotionPipeline
from sailer.audio_sailer import load_audio
from sailer.encoders_emotion2vec import (
    Emotion2VecConfig,
    Emotion2VecFeatureExtractor,
    Emotion2VecForAudioClassification,
    Emotion2VecModel,
)
from sailer.hub.conversion import ConversionError, convert
from sailer.hub.publishing import check_system
from sailer.layers_sailer import drop_path

from .emotion2vec_checkpoints import AUDIO, CONVOLUTIONS, TOKENS, options_with, plainly, tensors_of, write
from .sounds import noise

CHECKPOINTS = ["classifier", "features", "scale_per_layer"]
UNUSUAL = [
    ({}, {}),
    ({"embed_dim": 24, "num_heads": 3}, {"num_alibi_heads": 3, "conv_pos_groups": 3}),
    ({"depth": 3}, {"prenet_depth": 2, "model_depth": 3, "learned_alibi_scale_per_layer": True}),
    ({"depth": 1}, {"prenet_depth": 0, "num_extra_tokens": 0, "learned_alibi_scale_per_head": False}),
    ({"norm_affine": False, "mlp_ratio": 2.6, "norm_eps": 1e-2}, {"num_alibi_heads": 2}),
    ({"normalize": False}, {"conv_pos_width": 8, "conv_pos_depth": 2, "model_depth": 7}),
]
OTHER_CONVOLUTIONS = [(6, 8, 4), (10, 4, 3), (4, 5, 2)]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as released, with random weights."""
    options = options_with()
    return write(tmp_path_factory.mktemp("released"), options, tensors_of(options, classes=5), TOKENS)


@pytest.fixture(scope="module")
def converted(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(released, tmp_path_factory.mktemp("models") / "plus")


def own_frames(model: Emotion2VecModel, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1)).tolist()
    return [row[:count].numpy() for row, count in zip(states, frames, strict=True)]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_numbers_are_funasrs(name: str, shared: Path, tmp_path: Path) -> None:
    source = shared / "reference" / "emotion2vec" / name
    folder = convert(source, tmp_path / "model")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    expected = json.loads((source / "expected.json").read_text())
    clips = [load_audio(shared / "reference" / "vox_profile" / clip) for clip in expected]
    longer = noise(9, 1)
    rows = {}
    for batch in ([clips[0]], [clips[1]], [*clips, longer], [longer, *reversed(clips)]):
        inputs = extractor(batch, sampling_rate=16000, padding=True, return_tensors="pt")
        for clip, states in zip(batch, own_frames(model, inputs), strict=True):
            rows.setdefault(len(clip), []).append(states)
    for clip, values in zip(clips, expected.values(), strict=True):
        assert len(rows[len(clip)]) == 3
        for states in rows[len(clip)]:
            assert len(states) == values["frames"]
            np.testing.assert_allclose(states.mean(0), values["embedding"], atol=1e-5)
            np.testing.assert_allclose(states[0], values["first_frame"], atol=1e-5)
            np.testing.assert_allclose(states[-1], values["last_frame"], atol=1e-5)
    if "scores" not in next(iter(expected.values())) or not next(iter(expected.values()))["scores"]:
        assert name == "features" and not (folder / "processor_config.json").exists()
        return
    classifier = pipeline("audio-classification", model=str(folder), trust_remote_code=True)
    assert type(classifier).__name__ == "SpeechEmotionPipeline"
    names = ["angry", "disgusted", "fearful", "happy", "neutral", "other", "sad", "surprised", "<unk>"]
    assert classifier.model.config.labels == names
    for results in ([classifier(clip) for clip in clips], classifier([*clips, longer], batch_size=3)[:2]):
        for result, values in zip(results, expected.values(), strict=True):
            scores = {row["label"]: row["score"] for row in result}
            np.testing.assert_allclose([scores[label] for label in names], values["scores"], atol=1e-5)


@pytest.mark.parametrize(("model_options", "audio_options"), UNUSUAL, ids=str)
def test_any_shape_of_it(
    model_options: dict[str, Any], audio_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the same model written down plainly: each option moves the numbers, or a wrong one would pass unseen."""
    convolutions = OTHER_CONVOLUTIONS if audio_options.get("num_extra_tokens") == 0 else CONVOLUTIONS
    options = options_with(model_options, **audio_options, feature_encoder_spec=str(convolutions))
    tensors = tensors_of(options, convolutions=convolutions, seed=1)
    folder = convert(write(tmp_path / "source", options, tensors), tmp_path / "model")
    model = Emotion2VecModel.from_pretrained(folder).eval()
    extractor = Emotion2VecFeatureExtractor.from_pretrained(folder)
    step = int(np.prod([stride for _, _, stride in convolutions]))
    clips = [noise(frames * step / 16000, seed)[: frames * step] for seed, frames in enumerate((23, 40, 9))]
    alone = [
        own_frames(model, extractor([clip], sampling_rate=16000, padding=True, return_tensors="pt"))[0]
        for clip in clips
    ]
    together = own_frames(model, extractor(clips, sampling_rate=16000, padding=True, return_tensors="pt"))
    monkeypatch.setattr(Emotion2VecModel, "_is_packed", lambda *_: False)  # as on a GPU, in training and in graphs
    padded = own_frames(model, extractor(clips, sampling_rate=16000, padding=True, return_tensors="pt"))
    for clip, one, other, masked in zip(clips, alone, together, padded, strict=True):
        expected = plainly(options, tensors, clip, convolutions).numpy()
        assert one.shape == expected.shape and np.abs(expected).max() > 0.5
        np.testing.assert_allclose(one, expected, atol=1e-5)
        np.testing.assert_allclose(other, expected, atol=1e-5)
        np.testing.assert_allclose(masked, expected, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_what_stands_beyond_a_clip_is_never_heard(
    packed: bool, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Emotion2VecModel, "_is_packed", lambda *_: packed)
    model = Emotion2VecModel.from_pretrained(converted).eval()
    inputs = Emotion2VecFeatureExtractor()(
        [noise(0.7), noise(1.9, 1)], sampling_rate=16000, padding=True, return_tensors="pt"
    )
    before = own_frames(model, inputs)
    inputs["input_values"][0, len(noise(0.7)) :] = 1000.0
    after = own_frames(model, inputs)
    np.testing.assert_array_equal(before[0], after[0])


def test_each_clip_is_normalised_over_its_own_samples() -> None:
    extractor, clips = Emotion2VecFeatureExtractor(), [0.001 * noise(0.5), 3 + noise(0.9, 1)]
    for padding in (True, "max_length"):
        inputs = extractor(clips, sampling_rate=16000, padding=padding, max_length=20000, return_tensors="np")
        for row, mask, clip in zip(inputs["input_values"], inputs["attention_mask"], clips, strict=True):
            expected = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-5)
            np.testing.assert_allclose(row[: len(clip)], expected, atol=1e-4)
            assert not row[len(clip) :].any() and mask.sum() == len(clip)
    without = extractor(clips, sampling_rate=16000, padding=True, return_attention_mask=False, return_tensors="np")
    assert "attention_mask" not in without
    np.testing.assert_array_equal(
        without["input_values"], extractor(clips, sampling_rate=16000, padding=True)["input_values"]
    )
    untouched = Emotion2VecFeatureExtractor(do_normalize=False)(clips, sampling_rate=16000, padding=True)
    np.testing.assert_array_equal(untouched["input_values"][0][:8000], clips[0])


def test_the_folder_of_a_classifier(converted: Path) -> None:
    config = Emotion2VecConfig.from_pretrained(converted)
    assert config.labels == ["angry", "disgusted", "unuse_0", "neutral", "<unk>"]
    assert config.unused_labels == ["unuse_0"] and "unuse_0" not in config.scored_labels
    assert (config.num_hidden_layers, config.prenet_layers, config.conv_pos_kernel) == (3, 1, 5)
    check_system(converted)  # it can be pushed
    card = (converted / "README.md").read_text()
    assert "生气/angry" in card and "2 tensors of decoder" in card and "Unused, always 0: unuse_0" in card
    assert (converted / "model.safetensors").stat().st_mode == (converted / "config.json").stat().st_mode
    assert "torch" in (converted / "requirements.txt").read_text()


def test_unused_classes_have_no_share(converted: Path) -> None:
    classifier = pipeline("audio-classification", model=str(converted), trust_remote_code=True)
    scores = {row["label"]: row["score"] for row in classifier(noise(1.0))}
    assert scores["unuse_0"] == 0 and sum(scores.values()) == pytest.approx(1)
    inputs = classifier.processor(noise(1.0), sampling_rate=16000)
    assert classifier.model(**inputs, labels=torch.tensor([2])).loss > 1e30
    for labels in (torch.tensor([1]), torch.tensor([[0.5, 0, 0, 0.5, 0]])):
        loss = classifier.model(**inputs, labels=labels).loss
        loss.backward()
        assert loss.isfinite() and classifier.model.classifier.weight.grad.isfinite().all()


def test_windows_decisions_and_timelines_as_with_ours(converted: Path) -> None:
    classifier = SpeechEmotionPipeline(
        model=Emotion2VecForAudioClassification.from_pretrained(converted),
        processor=pipeline("audio-classification", model=str(converted), trust_remote_code=True).processor,
    )
    long = noise(3.0)
    whole, windows = classifier(long), classifier(long, chunk_length_s=1.0, stride_length_s=0, return_timestamps=True)
    assert [row["timestamp"] for row in windows] == [(0, 1), (1, 2), (2, 3)]
    for window in windows:
        start, end = (round(16000 * time) for time in window["timestamp"])
        alone = {row["label"]: row["score"] for row in classifier(long[start:end])}
        assert {row["label"]: row["score"] for row in window["primary"]} == pytest.approx(alone, abs=1e-6)
    mean = {row["label"]: row["score"] for row in classifier(long, chunk_length_s=1.0, stride_length_s=0)}
    assert mean["angry"] == pytest.approx(np.mean([dict_of(window)["angry"] for window in windows]), abs=1e-6)
    assert {row["label"]: row["score"] for row in whole} != pytest.approx(mean, abs=1e-4)
    full = classifier(long, return_all=True, chunk_length_s=0)
    assert full["label"] == full["primary"][0]["label"] and full["embedding"].shape == (16,)
    with pytest.raises(ValueError, match="not known"):
        classifier(long, prior="natural")


def dict_of(result: dict[str, Any]) -> dict[str, float]:
    return {row["label"]: row["score"] for row in result["primary"]}


@pytest.mark.parametrize(
    ("section", "option", "value", "message"),
    [
        ("model", "layer_norm_first", True, "model_conf.layer_norm_first is True"),
        ("audio", "extractor_mode", "default", "audio.extractor_mode is 'default'"),
        ("audio", "conv_pos_pre_ln", True, "audio.conv_pos_pre_ln is True"),
        ("audio", "use_alibi_encoder", False, "audio.use_alibi_encoder is False"),
        ("audio", "learned_alibi", True, "audio.learned_alibi is True"),
        ("model", "rotary", 3, "model_conf.rotary (here 3) is not understood"),
        ("audio", "rotary", 3, "audio.rotary (here 3) is not understood"),
        ("model", "depth", "2", "model_conf.depth is '2'; it is a whole number"),
        ("model", "depth", True, "model_conf.depth is True; it is a whole number"),
        ("model", "normalize", 1, "model_conf.normalize is 1; it is true or false"),
        ("model", "norm_eps", None, "model_conf.norm_eps is None; it is a number"),
        ("model", "num_heads", 5, "hidden_size 16 is no multiple of num_attention_heads 5"),
        ("model", "embed_dim", 0, "hidden_size is 0"),
        ("audio", "num_alibi_heads", 8, "alibi_heads is 8"),
        ("audio", "conv_pos_depth", 0, "conv_pos_depth is a whole number from 1"),
        ("audio", "conv_pos_groups", 3, "no multiple of conv_pos_groups 3"),
        ("audio", "feature_encoder_spec", "open('made_by_the_spec', 'w')", "feature_encoder_spec is"),
        ("audio", "feature_encoder_spec", "[(12, 10, 5)] * 10 ** 9", "feature_encoder_spec is"),
        ("audio", "feature_encoder_spec", "[(12, 10, 5)] * 1000000000", "feature_encoder_spec is"),
        ("audio", "feature_encoder_spec", "[(12, 10)]", "feature_encoder_spec is"),
        ("audio", "feature_encoder_spec", "[", "feature_encoder_spec is"),
        ("audio", "feature_encoder_spec", "", "feature_encoder_spec is"),
        ("audio", "feature_encoder_spec", None, "feature_encoder_spec is"),
        ("top", "model", "Paraformer", "model is 'Paraformer'"),
        ("top", "model_conf", None, "has no model_conf"),
        ("modalities", "image", {"type": "IMAGE"}, "modalities.image is not understood"),
        ("modalities", "audio", None, "has no model_conf.modalities.audio"),
        ("top", "vocab_size", 4, "names 5 classes and the vocab_size of config.yaml is 4"),
        ("top", "vocab_size", "five", "vocab_size is 'five'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    section: str, option: str, value: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = options_with()
    model = options["model_conf"]
    place = {"top": options, "model": model, "modalities": model["modalities"], "audio": model["modalities"]["audio"]}
    tensors = tensors_of(options, classes=5)
    place[section][option] = value
    source = write(tmp_path / "source", options, tensors, TOKENS)
    with pytest.raises(ConversionError, match=re.escape(message)):
        convert(source, tmp_path / "model")
    assert not (tmp_path / "model").exists() and not (tmp_path / "made_by_the_spec").exists()


@pytest.mark.parametrize("section", ["model", "audio"])
def test_an_option_that_is_missing_is_named(section: str, tmp_path: Path) -> None:
    options = options_with()
    audio = options["model_conf"]["modalities"]["audio"]
    name = {"model": "layer_norm_first", "audio": "learned_alibi_scale_per_layer"}[section]
    tensors = tensors_of(options)
    del {"model": options["model_conf"], "audio": audio}[section][name]
    with pytest.raises(ConversionError, match=f"has no model_conf.*{name}"):
        convert(write(tmp_path / "source", options, tensors), tmp_path / "model")


def test_scales_whose_layers_are_not_told(tmp_path: Path) -> None:
    options = options_with(learned_alibi_scale_per_layer=True, model_depth=5)
    with pytest.raises(ConversionError, match=r"model_depth is 5 and model_conf\.depth 2"):
        convert(write(tmp_path / "source", options, tensors_of(options)), tmp_path / "model")


def test_a_tensor_that_is_missing_misshapen_or_not_finite_is_named(tmp_path: Path) -> None:
    options = options_with()
    name = f"{AUDIO}context_encoder.blocks.0.attn.qkv.weight"

    def changed(value: torch.Tensor | None) -> Path:
        tensors = tensors_of(options)
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
        return write(tmp_path / "source", options, tensors)

    good = tensors_of(options)[name]
    for value, message in (
        (None, f"lacks {name}"),
        (good[:-1], f"tensor {name} has shape (47, 16) where (48, 16) is expected"),
        (good.reshape(16, 48), f"tensor {name} has shape (16, 48)"),
        (good.masked_fill(good > 0.5, torch.nan), f"tensor {name} holds values that are not finite"),
    ):
        with pytest.raises(ConversionError, match=re.escape(message)):
            convert(changed(value), tmp_path / "model")
    convert(changed(good.half()), tmp_path / "model")


@pytest.mark.parametrize("prefix", ["d2v_model.", "module.", "other."])
def test_prefixes_and_what_is_left_out(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = options_with() | ({"scope_map": ["other.", None]} if prefix == "other." else {})
    tensors = {f"{prefix}{name}": tensor for name, tensor in tensors_of(options, classes=5).items()}
    tensors |= {"_ema": torch.zeros(3), f"{prefix}recon_proj.weight": torch.zeros(2)}
    with caplog.at_level(logging.INFO, logger="sailer"):
        folder = convert(write(tmp_path / "source", options, tensors), tmp_path / "model")  # an encoder: no tokens
    told = "left out 6 tensors that inference does not use: 1 of _ema, 2 of decoder, 2 of proj, 1 of recon_proj"
    assert told in caplog.text
    clip = noise(0.4)
    inputs = Emotion2VecFeatureExtractor()([clip], sampling_rate=16000, return_tensors="pt")
    states = own_frames(Emotion2VecModel.from_pretrained(folder).eval(), inputs)[0]
    np.testing.assert_allclose(states, plainly(options, tensors_of(options, classes=5), clip), atol=1e-5)


def test_a_classifier_without_its_layer_or_its_tokens(released: Path, tmp_path: Path) -> None:
    options = options_with()
    source = write(tmp_path / "source", options, tensors_of(options), TOKENS)
    with pytest.raises(ConversionError, match=r"lacks proj\.weight, proj\.bias"):
        convert(source, tmp_path / "model")
    source = write(tmp_path / "other", options | {"vocab_size": 5}, tensors_of(options, classes=5))
    with pytest.raises(ConversionError, match=r"no tokens\.txt, which names the 5 classes"):
        convert(source, tmp_path / "model")


def test_names_that_would_stand_twice(tmp_path: Path) -> None:
    options, tokens = options_with(), ["unuse/x", "怒/angry", "气/angry", "unuse", "unuse"]
    source = write(tmp_path / "source", options, tensors_of(options, classes=5), tokens)
    config = Emotion2VecConfig.from_pretrained(convert(source, tmp_path / "model"))
    assert config.labels == ["x", "怒/angry", "气/angry", "unuse (3)", "unuse (4)"]
    assert config.scored_labels == ["怒/angry", "气/angry"]


class Malicious:
    def __reduce__(self) -> tuple:
        return exec, ("import pathlib; pathlib.Path('made_by_the_pickle').touch()",)


def test_a_pickle_of_more_than_tensors_is_not_run(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    options = options_with()
    source = write(tmp_path / "source", options, tensors_of(options))
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        save({"model": Malicious()}, source / "model.pt")
        with pytest.raises(ConversionError, match=r"model\.pt is not read"):
            convert(source, tmp_path / "model")
        assert not (tmp_path / "made_by_the_pickle").exists() and not (tmp_path / "model").exists()
    pickle.loads(pickle.dumps(Malicious()))
    assert (tmp_path / "made_by_the_pickle").exists()  # it would have


def test_files_that_are_missing_or_damaged(released: Path, tmp_path: Path) -> None:
    options = options_with()
    source = write(tmp_path / "source", options, tensors_of(options))
    whole = (source / "model.pt").read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "is truncated or damaged"),
        (b"", "is truncated or damaged"),
        (None, r"no model\.pt"),
    ):
        (source / "model.pt").unlink(missing_ok=True)
        if content is not None:
            (source / "model.pt").write_bytes(content)
        with pytest.raises(ConversionError, match=message):
            convert(source, tmp_path / "model")
    torch.save({"model": {"epoch": 3}}, source / "model.pt")
    with pytest.raises(ConversionError, match="no tensors by name"):
        convert(source, tmp_path / "model")
    (source / "config.yaml").write_text("model: [")
    with pytest.raises(ConversionError, match="is not YAML"):
        convert(source, tmp_path / "model")
    with pytest.raises(ConversionError, match="leave out --audio_backbone"):
        convert(released, tmp_path / "model", audio_backbone="x")


@pytest.mark.slow
def test_it_is_exported_with_a_batch_and_a_length_that_vary(converted: Path) -> None:
    model = Emotion2VecForAudioClassification.from_pretrained(converted).eval()
    extractor = Emotion2VecFeatureExtractor.from_pretrained(converted)
    inputs = dict(extractor([noise(0.5), noise(0.8, 1)], sampling_rate=16000, padding=True, return_tensors="pt"))
    batch, samples = torch.export.Dim("batch"), torch.export.Dim("samples", min=800)
    program = torch.export.export(
        model, (), inputs, dynamic_shapes={name: {0: batch, 1: samples} for name in inputs}
    ).module()
    for clips in ([noise(0.3)], [noise(1.234, 1), noise(0.4, 2), noise(0.9, 3)]):
        inputs = dict(extractor(clips, sampling_rate=16000, padding=True, return_tensors="pt"))
        with torch.no_grad():
            ours, theirs = model(**inputs), program(**inputs)
        np.testing.assert_allclose(theirs["logits"], ours.logits, atol=1e-5)
        np.testing.assert_allclose(theirs["embeddings"], ours.embeddings, atol=1e-5)


def test_fine_tuning(converted: Path) -> None:
    """Every weight moves, with and without checkpointed gradients, and dropping blocks leaves a state for each."""
    labels = {"num_labels": 3, "ignore_mismatched_sizes": True}
    model = AutoModelForAudioClassification.from_pretrained(converted, trust_remote_code=True, **labels).train()
    assert model.config.labels == ["LABEL_0", "LABEL_1", "LABEL_2"] == model.config.scored_labels
    inputs = Emotion2VecFeatureExtractor()(
        [noise(0.5), noise(0.8, 1)], sampling_rate=16000, padding=True, return_tensors="pt"
    )
    gradients = []
    for part in (model.config, model.emotion2vec.encoder.config):
        part.layerdrop = part.prenet_layerdrop = 0.0
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(**inputs, labels=torch.tensor([0, 2])).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        assert all(gradient.abs().max() > 0 for name, gradient in gradients[-1].items() if "k_proj.bias" not in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)
    model.config.layerdrop = model.config.prenet_layerdrop = 1.0
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 4 and all(torch.equal(states[0], state) for state in states)


def test_its_options_are_checked() -> None:
    for options, message in (
        ({"prenet_layers": 13}, "prenet_layers is 13"),
        ({"conv_dim": [4, 4]}, "conv_dim, conv_kernel, conv_stride"),
        ({"conv_kernel": [10, 0, 3, 3, 3, 2, 2]}, "conv_kernel is"),
        ({"drop_path_rates": [0.1]}, "drop_path_rates"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Emotion2VecConfig(**options)


def test_dropped_paths_keep_the_mean() -> None:
    torch.manual_seed(0)
    kept = drop_path(torch.ones(4000, 2, 3), 0.25)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3]) and kept.mean() == pytest.approx(1, abs=0.03)
    assert all(len(row.unique()) == 1 for row in kept[:50])


def test_paths_are_dropped_in_training_alone() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "prenet_layers": 0, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "conv_dim": [4] * 7, "conv_pos_groups": 2, "hidden_dropout": 0.0}
    sizes |= {"attention_dropout": 0.0, "feed_forward_dropout": 0.0, "drop_path_rates": [0.999999]}
    layer = Emotion2VecModel(Emotion2VecConfig(**sizes)).encoder.layers[0].train()
    states, bias = torch.randn(2, 5, 8), torch.zeros(1, 2, 5, 5)
    normal = layer_norm(layer_norm(states, (8,)), (8,))
    torch.testing.assert_close(layer(states, bias, None), normal)
    assert (layer.eval()(states, bias, None) - normal).abs().max() > 0.01
