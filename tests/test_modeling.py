"""The model: shapes, loading, freezing, padding invariance, round trips, what the scores mean."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoTokenizer

from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor
from sailer.audio_sailer import load_audio
from sailer.encoders_sailer import load_encoder, transformer_layers
from sailer.layers_sailer import LayerConcatenation, LayerWeights
from sailer.training.tiny_backbones import make_tiny_wavlm, make_tiny_whisper

from .sounds import noise

ALL_HEADS = ["primary", "secondary", "attributes", "sex", "age"]
SECONDS = (0.5, 3.1, 1.0, 15.0, 0.1, 7.77)


def build(audio: Path, text: Path | None = None, **options) -> tuple[SailerForAudioClassification, SailerProcessor]:
    torch.manual_seed(0)
    options = {"heads": ALL_HEADS} | options
    model = SailerForAudioClassification.from_audio_text_pretrained(audio, text, **options).eval()
    tokenizer = None if text is None else AutoTokenizer.from_pretrained(text)
    return model, SailerProcessor(AutoFeatureExtractor.from_pretrained(audio), tokenizer)


def largest_difference(model, processor, clips: list[np.ndarray], transcripts: list[str] | None = None) -> float:
    """Largest difference of any output between each clip alone and the same clip in one batch of all."""
    with torch.no_grad():
        batch = model(**processor(audio=clips, text=transcripts, sampling_rate=16000))
        differences = []
        for i, clip in enumerate(clips):
            text = None if transcripts is None else transcripts[i]
            alone = model(**processor(audio=clip, text=text, sampling_rate=16000))
            for name, value in alone.items():
                scale = 100 if name == "age" else 1  # in years, of a century
                differences.append((value[0] - batch[name][i]).abs().max().item() / scale)
    assert all(np.isfinite(differences))
    return max(differences)


@pytest.mark.parametrize("audio_layers", ["last", "weighted", "weighted_norm", "concat_norm"])
@pytest.mark.parametrize("audio", ["tiny_whisper", "tiny_wavlm"])
def test_outputs_have_the_documented_shapes(audio, audio_layers, tiny_text, request) -> None:
    folder = request.getfixturevalue(audio)
    model, processor = build(folder, tiny_text, audio_layers=audio_layers)
    clips, transcripts = [noise(0.5), noise(1.2)], ["so happy", "leave me alone"]
    outputs = model(**processor(audio=clips, text=transcripts, sampling_rate=16000))
    width, encoder = model.sailer.embedding_size, model.config.audio_config
    layers = encoder.num_hidden_layers + 1 if audio_layers == "concat_norm" else 1
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    assert shapes == {
        "logits": (2, 9),
        "secondary_logits": (2, 17),
        "attributes": (2, 3),
        "sex_logits": (2, 2),
        "age": (2,),
        "embeddings": (2, width),
        "speech_means": (2, encoder.hidden_size * layers),
    }
    assert width == 256 + 32
    assert ((outputs.attributes >= 0) & (outputs.attributes <= 1)).all()
    assert ((outputs.age >= 0) & (outputs.age <= 100)).all()


def test_each_head_can_be_off(tiny_whisper) -> None:
    names = dict(zip(ALL_HEADS, ["logits", "secondary_logits", "attributes", "sex_logits", "age"], strict=True))
    for head, name in names.items():
        model, processor = build(tiny_whisper, heads=[head])
        outputs = model(**processor(audio=noise(0.3), sampling_rate=16000))
        assert set(outputs.keys()) == {name, "embeddings", "speech_means"}


def test_head_parameters_are_exactly_the_papers(tiny_whisper, tiny_text) -> None:
    model, _ = build(tiny_whisper, tiny_text, heads=["primary", "attributes"])
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    fused = 256 + 32
    expected = {
        "sailer.audio_projection.0.weight": (256, 64, 1),
        "sailer.audio_projection.0.bias": (256,),
        "sailer.audio_projection.3.weight": (256, 256, 1),
        "sailer.audio_projection.3.bias": (256,),
        "sailer.audio_projection.6.weight": (256, 256, 1),
        "sailer.audio_projection.6.bias": (256,),
        "sailer.text_layer_weights.weight": (3,),
    }
    for head, outputs in {"primary": 9, "arousal": 1, "valence": 1, "dominance": 1}.items():
        expected |= {f"heads.{head}.0.weight": (256, fused), f"heads.{head}.0.bias": (256,)}
        expected |= {f"heads.{head}.2.weight": (outputs, 256), f"heads.{head}.2.bias": (outputs,)}
    assert trained == expected


def test_layer_weights_by_hand() -> None:
    mix = LayerWeights(2)
    mix.weight.data = torch.tensor([0.0, np.log(3.0)])
    states = torch.tensor([[[[1.0, 2.0]], [[5.0, 6.0]]]])
    torch.testing.assert_close(mix(states), torch.tensor([[[4.0, 5.0]]]))
    normalized = LayerWeights(2, normalize=True)(states)
    torch.testing.assert_close(normalized, torch.tensor([[[-1.0, 1.0]]]), atol=1e-4, rtol=0)


def test_layers_side_by_side_by_hand() -> None:
    states = torch.tensor([[[[1.0, 3.0], [2.0, 0.0]], [[5.0, 4.0], [7.0, 9.0]]]])  # 1 clip, 2 layers, 2 frames
    expected = torch.tensor([[[-1.0, 1.0, 1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]])
    torch.testing.assert_close(LayerConcatenation()(states), expected, atol=1e-4, rtol=0)
    kept = LayerConcatenation()(states, is_normalized=True)
    assert kept.tolist() == [[[1.0, 3.0, 5.0, 4.0], [2.0, 0.0, 7.0, 9.0]]]


@pytest.mark.parametrize("prefix", [True, False])
def test_only_whispers_encoder_is_loaded(prefix: bool, tmp_path: Path) -> None:
    folder = make_tiny_whisper(tmp_path / "whisper", prefix=prefix)
    model, _ = build(folder)
    stored = load_file(folder / "model.safetensors")
    start = "model.encoder." if prefix else "encoder."
    encoder = {name.removeprefix(start): tensor for name, tensor in stored.items() if name.startswith(start)}
    loaded = model.sailer.audio_encoder.state_dict()
    assert set(loaded) == set(encoder) and len(encoder) < len(stored)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.items())
    model.save_pretrained(tmp_path / "saved")
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if "decoder" in name]


def test_whisper_base_arrives_whole_and_in_float32(whisper_base: Path) -> None:
    model, _ = build(whisper_base)
    stored = load_file(whisper_base / "model.safetensors")
    loaded = model.sailer.audio_encoder.state_dict()
    assert {f"model.encoder.{name}" for name in loaded} == set(stored)
    assert all(torch.equal(loaded[n.removeprefix("model.encoder.")], tensor.float()) for n, tensor in stored.items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_missing_encoder_tensor_is_an_error(tiny_whisper: Path, tmp_path: Path) -> None:
    folder = tmp_path / "holes"
    shutil.copytree(tiny_whisper, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.encoder.layers.1.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the encoder's tensors \(layers\.1\.fc1\.weight\)"):
        SailerForAudioClassification.from_audio_text_pretrained(folder)


def test_backbones_that_cannot_be_loaded(tiny_whisper: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The backbone 'no/such-model' cannot be loaded"):
        SailerForAudioClassification.from_audio_text_pretrained("no/such-model")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_whisper / "config.json", bare)
    with pytest.raises(ValueError, match=r"bare.*model\.safetensors"):
        SailerForAudioClassification.from_audio_text_pretrained(bare)
    torch.save({}, bare / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks .* of the encoder's tensors"):
        SailerForAudioClassification.from_audio_text_pretrained(bare)


def test_a_pickled_system_is_refused(tiny_sailer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_sailer, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        SailerForAudioClassification.from_pretrained(folder)


def test_whisper_encoder_equals_the_stock_one_at_full_length(tiny_whisper: Path) -> None:
    model, _ = build(tiny_whisper)
    encoder = model.sailer.audio_encoder
    features = torch.randn(2, 80, 2 * encoder.max_source_positions)
    stock = AutoModel.from_pretrained(tiny_whisper).encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(features).last_hidden_state, stock(features).last_hidden_state)


def test_whisper_refuses_more_than_its_positions(tiny_whisper: Path) -> None:
    model, processor = build(tiny_whisper)
    with torch.no_grad():
        model(**processor(audio=noise(30.0), sampling_rate=16000))
    with pytest.raises(ValueError, match=r"1500 \(30 s\).*chunk_length_s"):
        model(**processor(audio=noise(31.0), sampling_rate=16000))


@pytest.mark.parametrize("audio_layers", ["last", "weighted_norm", "concat_norm"])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_padding_changes_nothing_wavlm(norm: str, audio_layers: str, tmp_path: Path) -> None:
    model, processor = build(make_tiny_wavlm(tmp_path / "wavlm", norm=norm), audio_layers=audio_layers)
    clips = [noise(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    assert largest_difference(model, processor, clips) < 1e-5


def test_padding_changes_nothing_text(tiny_whisper: Path, tiny_text: Path) -> None:
    model, processor = build(tiny_whisper, tiny_text, audio_layers="weighted")
    transcripts = ["no", "the quick brown fox jumps over the lazy dog " * 3, "", "i am so happy", "   ", "leave me"]
    clips = [noise(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    assert largest_difference(model, processor, clips, transcripts) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("audio_layers", ["last", "weighted"])
def test_padding_changes_nothing_whisper_base_on_real_speech(audio_layers, whisper_base, shared) -> None:
    model, processor = build(whisper_base, audio_layers=audio_layers)
    recordings = [load_audio(path) for path in sorted((shared / "corpora/ravdess/Actor_03").glob("*.ogg"))]
    clips = [recordings[0][:8000], recordings[1], np.concatenate(recordings)[:240000], recordings[2], recordings[5]]
    clips.append(recordings[7][: 16000 + 77])
    assert largest_difference(model, processor, clips) < 1e-5


def test_no_transcript_is_a_zero_text_embedding(tiny_whisper: Path, tiny_text: Path) -> None:
    model, processor = build(tiny_whisper, tiny_text)
    with torch.no_grad():
        outputs = model(**processor(audio=[noise(0.4)] * 2, text=["", "so happy"], sampling_rate=16000))
    text = outputs.embeddings[:, 256:]
    assert (text[0] == 0).all() and (text[1] != 0).any()


@pytest.mark.parametrize("audio", ["tiny_whisper", "tiny_wavlm"])
def test_frozen_towers_stay_as_they_were(audio, tiny_text, request) -> None:
    model, processor = build(request.getfixturevalue(audio), tiny_text, audio_layers="weighted")
    before = copy.deepcopy(model.state_dict())
    model.train()
    towers = (model.sailer.audio_encoder, model.sailer.text_encoder)
    assert model.training and model.sailer.audio_projection.training
    assert not any(module.training for tower in towers for module in tower.modules())

    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    inputs = processor(audio=[noise(0.5)] * 5, text=["so happy"] * 5, sampling_rate=16000)
    states, _ = model.sailer.audio_hidden_states(inputs[model.main_input_name], inputs["attention_mask"])
    assert not states.requires_grad
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs, labels=torch.full((5, 9), 1 / 9)).loss
    feed_forward = {config.intermediate_size if hasattr(config, "intermediate_size") else config.encoder_ffn_dim
                    for config in (model.config.audio_config, model.config.text_config)}  # fmt: skip
    assert saved and not [shape for shape in saved if len(shape) > 2 and shape[-1] in feed_forward]
    loss.backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        frozen = name.startswith(("sailer.audio_encoder", "sailer.text_encoder"))
        if frozen:
            assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for tower in towers for p in tower.parameters())
    assert not torch.equal(model.state_dict()["heads.primary.2.weight"], before["heads.primary.2.weight"])


@pytest.mark.parametrize("audio", ["tiny_whisper", "tiny_wavlm"])
def test_only_the_last_layers_train_where_so_configured(audio, tmp_path, request) -> None:
    options = {"heads": ["primary"], "freeze_audio": False, "trainable_audio_layers": 1}
    built, processor = build(request.getfixturevalue(audio), **options)
    built.save_pretrained(tmp_path)
    model = SailerForAudioClassification.from_pretrained(tmp_path).train()
    tower = model.sailer.audio_encoder
    last = list(transformer_layers(tower)[-1].modules())
    assert [module for module in tower.modules() if module.training] == last
    before = copy.deepcopy(model.state_dict())
    inputs = processor(audio=[noise(0.5), noise(0.8)], sampling_rate=16000)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**inputs, labels=torch.eye(9)[:2]).loss.backward()
    optimizer.step()
    inside = {parameter.data_ptr() for module in last for parameter in module.parameters()}
    for name, tensor in model.state_dict().items():
        if "audio_encoder" in name and tensor.data_ptr() not in inside:
            assert torch.equal(tensor, before[name]), name
        elif name.endswith("weight"):  # a key's bias has no effect: it moves all scores of a query alike
            assert not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("layers", "message"), [(0, "from 1 to 2"), (3, "from 1 to 2"), (1.5, "from 1 to 2")])
def test_layers_that_the_encoder_does_not_have_cannot_train(layers, message, tiny_whisper) -> None:
    with pytest.raises(ValueError, match=f"trainable_audio_layers is a whole number {message}.*got {layers}"):
        build(tiny_whisper, freeze_audio=False, trainable_audio_layers=layers)
    with pytest.raises(ValueError, match="freeze_audio is true"):
        build(tiny_whisper, trainable_audio_layers=1)


def test_an_encoder_whose_layers_are_elsewhere_cannot_be_trained_in_part(tiny_text: Path) -> None:
    encoder = load_encoder(tiny_text, None)
    encoder.encoder = torch.nn.Identity()
    with pytest.raises(ValueError, match="leave trainable_audio_layers out"):
        transformer_layers(encoder)


def test_trainable_wavlm_takes_gradients_and_very_short_clips(tiny_wavlm: Path) -> None:
    model, processor = build(tiny_wavlm, freeze_audio=False, audio_layers="weighted")
    model.train()
    loss = model(**processor(audio=noise(0.1), sampling_rate=16000), labels=torch.eye(9)[:1]).loss
    loss.backward()
    assert model.sailer.audio_encoder.encoder.layers[0].attention.k_proj.weight.grad.abs().sum() > 0
    assert model.sailer.audio_encoder.config.apply_spec_augment


def test_saved_weights_have_the_usual_permissions(tiny_whisper: Path, tmp_path: Path) -> None:
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper)
    model.save_pretrained(tmp_path)
    (tmp_path / "usual").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("system", ["tiny_sailer", "tiny_speech_sailer"])
def test_round_trip_is_bit_equal(system: str, tmp_path: Path, request) -> None:
    folder = request.getfixturevalue(system)
    processor = SailerProcessor.from_pretrained(folder)
    text = ["so happy"] if processor.tokenizer is not None else None
    inputs = processor(audio=[noise(0.7)], text=text, sampling_rate=16000)
    first = SailerForAudioClassification.from_pretrained(folder).eval()
    first.save_pretrained(tmp_path)
    second = SailerForAudioClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        one, other = first(**inputs), second(**inputs)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    frozen = [p for name, p in second.named_parameters() if "_encoder." in name]
    assert frozen and not any(p.requires_grad for p in frozen)
    assert first.config.to_dict() | {"_name_or_path": ""} == second.config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("audio_layers", ["last", "weighted_norm", "concat_norm"])
def test_cached_hidden_states_give_the_same_logits(audio_layers, tiny_whisper, tiny_text) -> None:
    model, processor = build(tiny_whisper, tiny_text, audio_layers=audio_layers)
    inputs = processor(audio=[noise(0.7), noise(2.0)], text=["so happy", ""], sampling_rate=16000)
    with torch.no_grad():
        states, mask = model.sailer.audio_hidden_states(inputs["input_features"], inputs["attention_mask"])
        text = model.sailer.text_hidden_states(inputs["input_ids"], inputs["text_attention_mask"])
        cached = model(audio_hidden_states=states, attention_mask=mask, text_hidden_states=text).logits
        torch.testing.assert_close(cached, model(**inputs).logits, atol=1e-5, rtol=0)


def test_loss_is_plain_kl_and_skips_unknown_rows(tiny_whisper: Path) -> None:
    model, processor = build(tiny_whisper)
    inputs = processor(audio=[noise(0.3), noise(0.4)], sampling_rate=16000)
    labels = torch.zeros(2, 9)
    labels[0, :2] = torch.tensor([0.25, 0.75])
    labels[1] = torch.nan
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
    log_p = outputs.logits[0].log_softmax(-1)
    by_hand = 0.25 * (np.log(0.25) - log_p[0]) + 0.75 * (np.log(0.75) - log_p[1])
    torch.testing.assert_close(outputs.loss, by_hand.to(outputs.loss.dtype))


def test_natural_prior_divides_the_weights_out(tiny_whisper: Path) -> None:
    distribution = torch.tensor([0.5, 0.0, 0.3, 0.2])
    weights = torch.tensor([0.5, 0.0, 4.0, 2.0])
    model, _ = build(
        tiny_whisper,
        heads=["primary"],
        labels=["a", "b", "c", "d"],
        label_weights=weights.tolist(),
        target_weighting="product",
    )
    balanced = distribution * weights / (distribution * weights).sum()
    logits = balanced.clamp(min=1e-9).log()[None]
    torch.testing.assert_close(model.probabilities(logits)[0], balanced, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.probabilities(logits, "natural")[0], distribution, atol=1e-6, rtol=0)
    model.config.calibration_temperature = 2.0
    softened = distribution.sqrt() / distribution.sqrt().sum()
    torch.testing.assert_close(model.probabilities(logits, "natural")[0], softened, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="'balanced' or 'natural'"):
        model.probabilities(logits, "uniform")


def test_manifold_mixup_mixes_embeddings(tiny_whisper: Path) -> None:
    model, processor = build(tiny_whisper)
    inputs = processor(audio=[noise(0.3), noise(0.6, 1)], sampling_rate=16000)
    with torch.no_grad():
        plain = model(**inputs).embeddings
        share = torch.tensor([0.25, 1.0])
        mixed = model(**inputs, mixup_permutation=torch.tensor([1, 0]), mixup_lambda=share).embeddings
    torch.testing.assert_close(mixed[0], 0.25 * plain[0] + 0.75 * plain[1])
    torch.testing.assert_close(mixed[1], plain[1])


def test_wrong_inputs_name_the_right_ones(tiny_sailer: Path, tiny_speech_sailer: Path) -> None:
    both = SailerForAudioClassification.from_pretrained(tiny_sailer)
    features = torch.zeros(1, 80, 100)
    with pytest.raises(ValueError, match="needs input_features"):
        both(input_values=torch.zeros(1, 16000))
    with pytest.raises(ValueError, match="pass input_ids"):
        both(input_features=features)
    speech = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    with pytest.raises(ValueError, match="speech-only"):
        speech(input_features=features, input_ids=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio_layers": "first"}, "audio_layers.*weighted_norm"),
        ({"heads": ["primary", "mood"]}, "heads.*mood.*secondary"),
        ({"heads": []}, "heads is empty"),
        ({"labels": ["a", "a"]}, "twice"),
        ({"scored_labels": ["Joy"]}, "scored_labels.*Joy"),
        ({"label_weights": [1.0]}, "label_weights has 1 values for 9 labels"),
        ({"calibration_temperature": 0.0}, "must be positive"),
        ({"frame_pooling": 0}, "frame_pooling is a whole number from 1"),
        ({"audio_config": {"d_model": 3}}, "audio_config has no model_type"),
    ],
)
def test_configuration_refuses_what_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SailerConfig(**options)


def test_label_constants_agree_with_the_corpus_side() -> None:
    # Hub files travel alone, so they hold their own copies.
    import sailer.configuration_sailer as hub
    from sailer.data import schema

    for name in ("PRIMARY_LABELS", "MAJORITY_LABELS", "SECONDARY_LABELS", "ATTRIBUTES"):
        assert getattr(hub, name) == getattr(schema, name)


@pytest.mark.parametrize("audio_layers", ["last", "weighted_norm", "concat_norm"])
def test_frame_norm_sees_the_clips_own_frames_alone(audio_layers: str, tiny_whisper: Path, tmp_path: Path) -> None:
    model, processor = build(tiny_whisper, audio_layers=audio_layers, frame_norm=True)
    clips = [noise(0.3), noise(0.9, seed=1)]
    inputs = processor(audio=clips, sampling_rate=16000)
    model.train()
    model(**inputs)
    with torch.no_grad():
        own = []
        for clip in clips:
            alone = processor(audio=clip, sampling_rate=16000)
            states, mask = model.sailer.audio_hidden_states(alone["input_features"], alone["attention_mask"])
            states = states if audio_layers == "last" else model.sailer.audio_layer_weights(states)
            own.append(states[mask])
    # PyTorch's running statistics start at 0 and 1 and move a tenth of the way to each batch's.
    norm, frames = model.sailer.audio_frame_norm, torch.cat(own)
    torch.testing.assert_close(norm.running_mean, 0.1 * frames.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * frames.var(0), atol=1e-5, rtol=1e-4)

    model.eval()
    assert largest_difference(model, processor, [noise(seconds) for seconds in (0.4, 1.7, 3.0)]) < 1e-5
    states, mask = model.sailer.audio_hidden_states(inputs["input_features"], inputs["attention_mask"])
    logits = model(**inputs).logits
    torch.testing.assert_close(model(audio_hidden_states=states, attention_mask=mask).logits, logits)
    one = model(audio_hidden_states=states[:1], attention_mask=torch.ones(1, states.shape[-2])).logits
    torch.testing.assert_close(model(audio_hidden_states=states[:1]).logits, one)
    model.save_pretrained(tmp_path)
    again = SailerForAudioClassification.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, logits)


def test_frame_pooling_by_hand(tiny_whisper: Path) -> None:
    model, processor = build(tiny_whisper, frame_pooling=3)
    states = torch.randn(2, 7, 64)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    seen = []
    model.sailer.audio_projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    outputs = model(audio_hidden_states=states, attention_mask=mask)
    expected = [[states[0, :3].mean(0), states[0, 3:6].mean(0), states[0, 6]], [states[1, :3].mean(0), states[1, 3]]]
    torch.testing.assert_close(seen[0][0].T, torch.stack(expected[0]))
    torch.testing.assert_close(seen[0][1].T[:2], torch.stack(expected[1]))
    # The last part of a clip counts by its frames: 3, 3 and 1 of the first, 3 and 1 of the second.
    projected = model.sailer.audio_projection(seen[0]).transpose(1, 2)
    torch.testing.assert_close(
        outputs.embeddings[0], (3 * projected[0, 0] + 3 * projected[0, 1] + projected[0, 2]) / 7
    )
    torch.testing.assert_close(outputs.embeddings[1], (3 * projected[1, 0] + projected[1, 1]) / 4)
    assert largest_difference(model, processor, [noise(seconds) for seconds in (0.4, 1.7, 3.0)]) < 1e-5
