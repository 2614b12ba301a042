"""One graph: torch.export and torch.compile take every system whose encoder masks, with any batch and length."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, WavLMModel

from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor
from sailer.encoders_sailer import build_encoder, load_encoder, text_mask
from sailer.inference.export import ExportError, SystemGraph, trace
from sailer.layers_sailer import FrameNorm
from sailer.training.tiny_backbones import make_tiny_wavlm

from .sounds import noise

HEADS = ["primary", "secondary", "attributes", "sex", "age"]
Graph = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL |= {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SMALL |= {"feat_extract_norm": "layer", "layerdrop": 0.0}


def build(audio: Path, text: Path | None, **options) -> tuple[SailerForAudioClassification, SailerProcessor]:
    torch.manual_seed(0)
    model = SailerForAudioClassification.from_audio_text_pretrained(audio, text, heads=HEADS, **options).eval()
    tokenizer = None if text is None else AutoTokenizer.from_pretrained(text)
    return model, SailerProcessor(AutoFeatureExtractor.from_pretrained(audio), tokenizer)


def inputs(processor: SailerProcessor, *seconds: float) -> dict[str, torch.Tensor]:
    clips = [noise(length, seed) for seed, length in enumerate(seconds)]
    texts = None if processor.tokenizer is None else ["leave me alone", *[""] * (len(clips) - 1)]
    return dict(processor(audio=clips, text=texts, sampling_rate=16000))


def graph_of(model: SailerForAudioClassification, example: dict[str, torch.Tensor]) -> Graph:
    program = trace(model, example).module()
    return lambda inputs: program(dict(inputs))


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert set(one) == set(other)
    return max((one[name] - other[name]).abs().max().item() for name in one)


POOLED = {"frame_pooling": 3, "frame_norm": True}
SYSTEMS = [
    ("tiny_whisper", "last", {}, True),
    *(
        (audio, layers, pooling, text)
        for audio in ("tiny_whisper", "tiny_wavlm")
        for layers, text in (("last", False), ("weighted", True), ("weighted_norm", False), ("concat_norm", False))
        for pooling in ({}, POOLED)
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("audio", "audio_layers", "pooling", "has_text"), SYSTEMS)
def test_a_system_is_one_graph_of_any_batch_and_length(
    audio: str, audio_layers: str, pooling: dict, has_text: bool, tiny_text: Path, request: pytest.FixtureRequest
) -> None:
    text = tiny_text if has_text else None
    model, processor = build(request.getfixturevalue(audio), text, audio_layers=audio_layers, **pooling)
    graph = graph_of(model, inputs(processor, 1.0, 0.7))
    for seconds in ((2.3,), (0.5, 1.9, 1.1)):
        example = inputs(processor, *seconds)
        with torch.no_grad():
            assert largest_difference(graph(example), SystemGraph(model)(example)) < 1e-6


@pytest.mark.slow
def test_a_graph_takes_all_that_the_encoder_hears(tiny_whisper: Path) -> None:
    model, processor = build(tiny_whisper, None)
    graph = graph_of(model, inputs(processor, 1.0, 0.7))
    example = inputs(processor, 30.0, 1.0)
    with torch.no_grad():
        assert largest_difference(graph(example), SystemGraph(model)(example)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hubert", "unispeech", "unispeech-sat", "wav2vec2"])
def test_every_raw_waveform_encoder_that_masks_is_one_graph(family: str) -> None:
    config = SailerConfig(audio_config=AutoConfig.for_model(family, **SMALL), heads=HEADS, hidden_size=16)
    torch.manual_seed(0)
    model = SailerForAudioClassification(config).eval()
    clips = torch.randn(3, 16000)
    mask = (torch.arange(16000) < torch.tensor([[16000], [9000], [4000]])).long()
    graph = graph_of(model, {"input_values": clips[:2], "attention_mask": mask[:2]})
    with torch.no_grad():
        for rows in (slice(0, 1), slice(0, 3)):
            example = {"input_values": clips[rows], "attention_mask": mask[rows]}
            assert largest_difference(graph(example), SystemGraph(model)(example)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("audio", ["tiny_whisper", "tiny_wavlm"])
def test_a_system_compiles_as_one_graph(audio: str, tiny_text: Path, request: pytest.FixtureRequest) -> None:
    model, processor = build(request.getfixturevalue(audio), tiny_text, audio_layers="weighted_norm", frame_norm=True)
    torch.compiler.reset()
    # The graph is what is looked at here: the machine's C++ compiler is none of the test's concern.
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for seconds in ((1.0, 0.7), (2.3, 0.6, 0.9)):
            example = inputs(processor, *seconds)
            assert largest_difference(dict(compiled(**example)), dict(model(**example))) < 1e-5


def real_size(name: str, **options) -> SailerForAudioClassification:
    folder = Path(__file__).resolve().parents[1] / "backbone_configs"
    audio, text = (AutoConfig.from_pretrained(folder / f"{file}.json") for file in (name, "roberta-large"))
    with torch.device("meta"):
        config = SailerConfig(audio_config=audio, text_config=text, heads=HEADS, **options)
        return SailerForAudioClassification(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper-large-v3", "wavlm-large"])
def test_the_large_encoders_are_one_graph(name: str) -> None:
    model = real_size(name, audio_layers="last" if "whisper" in name else "weighted")
    tokens = torch.ones(2, 7, dtype=torch.long, device="meta")
    example = {"input_ids": tokens, "text_attention_mask": tokens}
    if "whisper" in name:
        example |= {"input_features": torch.zeros(2, 128, 400, device="meta")}
        example |= {"attention_mask": torch.ones(2, 400, dtype=torch.long, device="meta")}
    else:
        example |= {"input_values": torch.zeros(2, 32000, device="meta")}
        example |= {"attention_mask": torch.ones(2, 32000, dtype=torch.long, device="meta")}
    assert len(list(trace(model, example).graph.nodes)) > 1000


@pytest.mark.parametrize("layers", ["last", "all"])
def test_wavlm_equals_transformers_own(layers: str, tmp_path: Path) -> None:
    folder = make_tiny_wavlm(tmp_path / "wavlm")
    ours, theirs = load_encoder(folder, None), WavLMModel.from_pretrained(folder).eval()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    with torch.no_grad():
        for encoder in (ours, theirs):  # what starts at one and at zero would hide errors
            for name, parameter in encoder.named_parameters():
                if "gru_rel_pos" in name:
                    parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    clips = torch.randn(2, 16000)
    mask = (torch.arange(16000) < torch.tensor([[16000], [9000]])).long()
    with torch.no_grad():
        one, other = (encoder(clips, mask, output_hidden_states=True) for encoder in (ours.eval(), theirs))
    own = ours._get_feature_vector_attention_mask(one.last_hidden_state.shape[1], mask).bool()
    states = [(one.last_hidden_state, other.last_hidden_state)]
    if layers == "all":
        states = list(zip(one.hidden_states, other.hidden_states, strict=True))
    for mine, stock in states:
        torch.testing.assert_close(mine[own], stock[own], atol=1e-5, rtol=1e-5)


def test_wavlm_trains_as_transformers_own(tmp_path: Path) -> None:
    folder = make_tiny_wavlm(tmp_path / "wavlm")
    ours, theirs = load_encoder(folder, None).eval(), WavLMModel.from_pretrained(folder).eval()
    clips = torch.randn(2, 8000)
    mask = (torch.arange(8000) < torch.tensor([[8000], [5000]])).long()
    for encoder in (ours, theirs):
        states = encoder(clips, mask).last_hidden_state
        frames = encoder._get_feature_vector_attention_mask(states.shape[1], mask).bool()
        states[frames].square().sum().backward()
    stock = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if stock[name].grad is not None:
            torch.testing.assert_close(parameter.grad, stock[name].grad, atol=1e-4, rtol=1e-3, msg=name)


def test_dropout_of_wavlms_attention_is_on_in_training_alone() -> None:
    options = {"attention_dropout": 0.5, "hidden_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0}
    encoder = build_encoder(AutoConfig.for_model("wavlm", **SMALL, **options, apply_spec_augment=False))
    clips = torch.randn(1, 8000)
    with torch.no_grad():
        assert not torch.equal(encoder.train()(clips).last_hidden_state, encoder(clips).last_hidden_state)
        assert torch.equal(encoder.eval()(clips).last_hidden_state, encoder(clips).last_hidden_state)


def test_frame_norm_is_batch_normalisation_of_the_clips_own_frames() -> None:
    torch.manual_seed(0)
    ours, theirs = FrameNorm(4), nn.BatchNorm1d(4, affine=False)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    for _ in range(3):
        states = torch.randn(2, 5, 4) + 3
        states[1, 3:] = torch.nan  # whatever stands in the padding
        normalised = ours(states, mask)
        torch.testing.assert_close(normalised[mask.bool()], theirs(states[mask.bool()]))
        assert normalised[1, 3:].isnan().all()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    states = torch.randn(2, 5, 4)
    torch.testing.assert_close(ours.eval()(states, mask)[0], theirs.eval()(states[0]))


def test_an_encoder_that_goes_by_length_is_refused_by_name(tmp_path: Path) -> None:
    model, processor = build(make_tiny_wavlm(tmp_path / "wavlm", norm="group"), None)
    with pytest.raises(ExportError, match="A 'wavlm' encoder of this configuration is run on clips of one length"):
        trace(model, inputs(processor, 1.0, 0.7))


def test_a_text_towers_mask_on_a_gpu_is_one_that_nobody_looks_into(tiny_sailer: Path) -> None:
    tower = SailerForAudioClassification.from_pretrained(tiny_sailer).eval().sailer.text_encoder
    tokens = torch.tensor([[5, 6, 7, 8], [9, 5, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert text_mask(tower, mask) is mask
    assert text_mask(tower, mask.to("meta")).shape == (2, 1, 1, 4)
    with torch.no_grad():
        expected = tower(input_ids=tokens, attention_mask=mask).last_hidden_state
        states = tower(input_ids=tokens, attention_mask=mask.bool()[:, None, None]).last_hidden_state
    torch.testing.assert_close(states[0], expected[0])
    torch.testing.assert_close(states[1, :2], expected[1, :2])
