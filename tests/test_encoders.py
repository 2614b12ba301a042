"""Every speech encoder that transformers has: padding changes nothing, or it is refused by name."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor
from sailer.configuration_sailer import AUDIO_LAYERS
from sailer.encoders_sailer import (
    check_speech_encoder,
    encode_audio,
    load_encoder,
    masks_padding,
    transformer_layers,
)

SMALL = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    **{"intermediate_size": 48, "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "output_hidden_size": 32},
    **{"num_conv_pos_embedding_groups": 4, "subsampling_conv_channels": 8, "d_model": 32, "encoder_layers": 2},
    **{"decoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48},
}
LAYER_NORM = {"feat_extract_norm": "layer"}
STABLE = LAYER_NORM | {"do_stable_layer_norm": True}
ADAPTER = LAYER_NORM | {"add_adapter": True}
SEW = {"conv_dim": [16] * 13}


class Case(NamedTuple):
    """An encoder at tiny size. `extractor` is a class of transformers; without one the features are random."""

    model_type: str
    options: dict = {}  # noqa: RUF012 - never changed
    extractor: str | None = "Wav2Vec2FeatureExtractor"
    masked: bool = False
    slow: bool = False

    def __str__(self) -> str:
        return "-".join([self.model_type, *(f"{value}" for name, value in self.options.items() if name != "conv_dim")])


BERT = "SeamlessM4TFeatureExtractor"
CASES = [
    Case("whisper", {}, "WhisperFeatureExtractor", masked=True),
    *(Case(name, STABLE, masked=True) for name in ("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")),
    Case("wav2vec2-bert", {}, BERT, masked=True),
    Case("hubert", LAYER_NORM | {"conv_pos_batch_norm": True}),
    Case("wavlm"),
    Case("wav2vec2", ADAPTER | {"output_hidden_size": 24}),
    Case("wav2vec2-bert", {"add_adapter": True}, BERT),
    Case("data2vec-audio"),
    Case("wav2vec2-conformer", LAYER_NORM),
    Case("sew", SEW),
    Case("sew-d", SEW),
    Case("parakeet_encoder", {}, "ParakeetFeatureExtractor"),
    Case("lasr_encoder", {}, "LasrFeatureExtractor"),
    Case("nemotron_asr_streaming_encoder", {}, "NemotronAsrStreamingFeatureExtractor"),
    Case("granite_speech5_encoder", {}, None),  # its feature extractor needs torchaudio
    *(Case(name, LAYER_NORM, masked=True, slow=True) for name in ("hubert", "unispeech", "unispeech-sat")),
    *(Case(name, LAYER_NORM, masked=True, slow=True) for name in ("wav2vec2", "wavlm")),
    *(Case(name, slow=True) for name in ("hubert", "unispeech", "unispeech-sat", "wav2vec2")),
    *(Case(name, ADAPTER, slow=True) for name in ("wavlm", "data2vec-audio", "wav2vec2-conformer")),
    Case("hubert", STABLE | {"feat_proj_layer_norm": False}, masked=True, slow=True),
    Case("wav2vec2", STABLE | {"adapter_attn_dim": 8}, masked=True, slow=True),
    *(Case("wav2vec2-bert", {"position_embeddings_type": kind}, BERT, True, True) for kind in ("relative", "rotary")),
    Case("wav2vec2-bert", {"position_embeddings_type": None}, BERT, masked=True, slow=True),
    Case("wav2vec2-bert", {"add_adapter": True, "use_intermediate_ffn_before_adapter": True}, BERT, slow=True),
    Case("wav2vec2-conformer", LAYER_NORM | {"position_embeddings_type": "rotary"}, slow=True),
    Case("sew", SEW | LAYER_NORM, slow=True),
    Case("sew-d", SEW | LAYER_NORM, slow=True),
]
EVERY_CASE = [pytest.param(case, marks=[pytest.mark.slow] * case.slow, id=str(case)) for case in CASES]
ONE_EACH = [pytest.param(case, id=str(case)) for case in CASES if not case.slow]

REASONS = {
    "windows of one fixed length": "audio-spectrogram-transformer audioflamingo3_encoder qwen2_audio_encoder "
    "moss_transcribe_diarize_audio qwen3_asr_encoder voxtral_encoder",
    "a whole recogniser": "granite_speech5_ctc lasr_ctc nemotron3_5_asr nemotron_asr_streaming parakeet_ctc "
    "parakeet_rnnt parakeet_tdt",
    "an encoder and a decoder": "canary cohere_asr moonshine moonshine_streaming speech_to_text speecht5",
    "part of a larger model": "gemma4_audio nemotron3_5_transcribe_asr_audio nemotron3_diarization_audio "
    "voxtral_realtime_encoder",
    "takes no attention_mask": "dac encodec fun_asr_nano_encoder glmasr_encoder mimi mimi_encoder muse_spark_audio "
    "nemotron3_5_transcribe_audio neucodec pe_audio_encoder pe_audio_video_encoder pocket_tts_audio_tokenizer "
    "pocket_tts_audio_tokenizer_encoder univnet vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder "
    "vibevoice_acoustic_tokenizer_encoder xcodec xcodec2",
    "it is a codec": "higgs_audio_v2_tokenizer",
    "reads": "gemma3n_audio mimi_decoder nemotron3_5_transcribe_word_timestamp pocket_tts_audio_tokenizer_decoder",
    "does not say how wide": "nemotron3_diarization",
}
REFUSED = {name: reason for reason, names in REASONS.items() for name in names.split()}
SECONDS = (0.31, 0.8, 0.2, 0.500625)


def configuration(case: Case) -> PretrainedConfig:
    if case.model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {case.model_type}")
    plain = AutoConfig.for_model(case.model_type)
    small = {name: value for name, value in SMALL.items() if hasattr(plain, name)}
    return AutoConfig.for_model(case.model_type, **small | case.options)


def build(case: Case, **options) -> SailerForAudioClassification:
    """A system whose encoder's every tensor is random: fresh biases and running means are zero, which hides leaks."""
    torch.manual_seed(0)
    options = {"hidden_size": 32, "heads": ["primary"], "conv_dropout": 0.0} | options
    model = SailerForAudioClassification(SailerConfig(audio_config=configuration(case), **options)).eval()
    encoder = model.sailer.audio_encoder
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
        for name, buffer in encoder.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model


def reader(case: Case, seconds: tuple[float, ...] = SECONDS) -> Callable[[list[int]], dict[str, torch.Tensor]]:
    """A function from positions of clips to the model's inputs for a batch of them."""
    random = np.random.default_rng(0)
    clips = [random.normal(0, 0.1, round(16000 * length)).astype(np.float32) for length in seconds]
    if case.extractor is not None:
        processor = SailerProcessor(getattr(transformers, case.extractor)())
        return lambda positions: processor(audio=[clips[i] for i in positions], sampling_rate=16000)
    width = 4 * configuration(case).num_mel_bins
    features = [torch.randn(round(50 * length), width) for length in seconds]

    def read(positions: list[int]) -> dict[str, torch.Tensor]:
        own = [features[i] for i in positions]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(rows)) for rows in own], batch_first=True)
        padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
        return {"input_features": padded, "attention_mask": mask.long()}

    return read


def weightable(case: Case) -> tuple[str, ...]:
    return AUDIO_LAYERS[:1] if case.model_type == "granite_speech5_encoder" else AUDIO_LAYERS


def speech_encoders() -> set[str]:
    """Model types in AutoModel's mapping that take audio, other than as a part of what they read as text."""
    found = set()
    models = Path(transformers.__file__).parent / "models"
    for name in MODEL_MAPPING_NAMES:
        code = models.joinpath(model_type_to_module_name(name)).glob("modeling_*.py")
        if not any(re.search("audio|input_values|input_features", path.read_text()) for path in code):
            continue  # importing all of them takes a minute
        try:
            classes = MODEL_MAPPING[CONFIG_MAPPING[name]]
        except (ValueError, KeyError):
            continue  # named in the mapping, but not in this release
        for cls in classes if isinstance(classes, tuple) else (classes,):
            try:
                hears = "audio" in (cls.input_modalities or ()) and cls.main_input_name != "input_ids"
                found |= {name} if hears or cls.main_input_name in ("input_values", "input_features") else set()
            except ImportError:  # a library of its own is not installed
                found.add(name)
    return found


def test_every_speech_encoder_of_transformers_is_in_a_list() -> None:
    constraints = Path(__file__).parents[1].joinpath("constraints.txt").read_text()
    pinned = re.search(r"^transformers==(\S+)$", constraints, re.MULTILINE)
    if pinned[1] != transformers.__version__:
        pytest.skip(f"the lists are those of transformers {pinned[1]}")
    assert speech_encoders() == {case.model_type for case in CASES} | set(REFUSED)


def largest_difference(case: Case, model: SailerForAudioClassification) -> float:
    """Of any output between each clip alone and the same clip in one batch of all."""
    read, differences = reader(case), []
    with torch.no_grad():
        batch = model(**read(list(range(len(SECONDS)))))
        for row in range(len(SECONDS)):
            alone = model(**read([row]))
            differences += [
                (alone[name][0] - batch[name][row]).abs().max().item() for name in ("logits", "embeddings")
            ]
    assert all(np.isfinite(differences))
    return max(differences)


@pytest.mark.parametrize("case", EVERY_CASE)
def test_padding_changes_nothing(case: Case) -> None:
    encoder = build(case).sailer.audio_encoder
    for audio_layers in weightable(case):
        config = SailerConfig(audio_config=encoder.config, audio_layers=audio_layers, hidden_size=32)
        model = SailerForAudioClassification(config, encoder).eval()
        assert largest_difference(case, model) < 1e-5, audio_layers


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.masked and case.model_type != "wavlm"], ids=str)
def test_padding_changes_nothing_however_attention_is_computed(case: Case) -> None:
    model = build(case)  # WavLM has one way only
    encoder = model.sailer.audio_encoder
    other = "sdpa" if encoder.config._attn_implementation == "eager" else "eager"
    encoder.set_attn_implementation(other)
    assert encoder.config._attn_implementation == other
    assert largest_difference(case, model) < 1e-5


@pytest.mark.parametrize("case", EVERY_CASE)
def test_a_clip_alone_gets_what_transformers_gives(case: Case) -> None:
    if case.model_type == "whisper":
        pytest.skip("transformers' takes 30 s only; see test_modeling")
    model = build(case)
    encoder, inputs = model.sailer.audio_encoder, dict(reader(case)([1]))
    audio, mask = inputs[encoder.main_input_name], inputs["attention_mask"]
    with torch.no_grad():
        stock = encoder(audio, attention_mask=mask, output_hidden_states=True)
        states, own = encode_audio(encoder, audio, mask)
        torch.testing.assert_close(states, stock.last_hidden_state)
        assert own.all()
        if len(weightable(case)) > 1:
            layers, _ = encode_audio(encoder, audio, mask, all_layers=True)
            assert layers.shape[1] == model.config.audio_config.num_hidden_layers + 1
            torch.testing.assert_close(layers[:, :-1], torch.stack(stock.hidden_states[:-1], dim=1))


@pytest.mark.parametrize("case", EVERY_CASE)
def test_which_encoders_are_masked(case: Case) -> None:
    model = build(case)
    assert masks_padding(model.config.audio_config) == case.masked
    calls = []
    model.sailer.audio_encoder.register_forward_hook(lambda module, inputs, outputs: calls.append(module))
    with torch.no_grad():
        model(**reader(case)([0, 1, 2, 0]))
    assert len(calls) == (1 if case.masked else 3)


@pytest.mark.parametrize("audio_layers", ["last", "weighted"])
@pytest.mark.parametrize("case", ONE_EACH)
def test_fine_tuning_reaches_every_layer(case: Case, audio_layers: str) -> None:
    if audio_layers not in weightable(case):
        pytest.skip("refused")
    if hasattr(configuration(case), "layerdrop"):  # a dropped layer would leave no state to weigh
        layerdrop = 0.99 if audio_layers == "weighted" else 0.0
        case = case._replace(options=case.options | {"layerdrop": layerdrop})
    model = build(case, freeze_audio=False, audio_layers=audio_layers).train()
    encoder = model.sailer.audio_encoder
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    inputs = reader(case)([0, 1, 2])  # the last one is shorter than SpecAugment's masks
    model(**inputs, labels=torch.eye(9)[:3]).loss.backward()
    layers = encoder.encoder.encoder.layer if case.model_type == "sew-d" else transformer_layers(encoder)
    assert len(layers) == 2
    for name, parameter in layers.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())


@pytest.mark.parametrize("case", ONE_EACH)
def test_the_last_layer_alone_trains_or_this_is_refused(case: Case) -> None:
    options = {"freeze_audio": False, "trainable_audio_layers": 1}
    if case.model_type == "sew-d":
        with pytest.raises(ValueError, match="'sew-d' encoder cannot be told apart: leave trainable_audio_layers out"):
            build(case, **options)
        return
    model = build(case, **options).train()
    model(**reader(case)([0, 1]), labels=torch.eye(9)[:2]).loss.backward()
    encoder = model.sailer.audio_encoder
    last = {id(parameter) for parameter in transformer_layers(encoder)[-1].parameters()}
    trained = {id(parameter) for parameter in encoder.parameters() if parameter.grad is not None}
    assert trained and trained <= last
    assert not [module for module in encoder.children() if module.training]


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_a_speech_encoder_is_refused_by_name(model_type: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    try:
        config = CONFIG_MAPPING[model_type]()
    except ImportError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match=f"A '{model_type}' model cannot be the speech encoder: .*Whisper") as error:
        check_speech_encoder(config)
    assert REFUSED[model_type] in str(error.value)


def test_models_of_text_and_of_many_kinds_are_refused() -> None:
    for model_type in ("roberta", "clap", "qwen2_audio", "seamless_m4t"):
        with pytest.raises(ValueError, match=f"A '{model_type}' model cannot be.*it reads input_ids"):
            check_speech_encoder(CONFIG_MAPPING[model_type]())
    with pytest.raises(ValueError, match="'clap_audio_model' backbones have no encoder"):
        check_speech_encoder(CONFIG_MAPPING["clap_audio_model"]())


def test_refused_before_any_weights_are_read(tmp_path: Path) -> None:
    configuration(Case("moonshine")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A 'moonshine' model cannot be the speech encoder: it is an encoder and a"):
        SailerForAudioClassification.from_audio_text_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A 'moonshine' model cannot be the speech encoder"):
        SailerForAudioClassification(SailerConfig(audio_config=configuration(Case("moonshine"))))


def test_layers_that_differ_in_length_are_refused_by_name() -> None:
    case = Case("granite_speech5_encoder")
    with pytest.raises(ValueError, match=r"layers of a 'granite_speech5_encoder' encoder differ in length.*'last'"):
        build(case, audio_layers="weighted")
    even = Case("wav2vec2", STABLE)
    encoder = build(even).sailer.audio_encoder
    encoder.config.num_hidden_layers = 3  # what an encoder that this release does not know might be like
    with pytest.raises(ValueError, match=r"layers of a 'wav2vec2' encoder cannot be weighted: 4 states.*'last'"):
        encode_audio(encoder, torch.zeros(1, 3200), all_layers=True)


def test_a_recognisers_encoder_is_taken_from_a_folder_of_its_own(tmp_path: Path) -> None:
    case = Case("parakeet_encoder", {}, "ParakeetFeatureExtractor")
    whole = transformers.ParakeetForCTC(transformers.ParakeetCTCConfig(encoder_config=configuration(case).to_dict()))
    whole.encoder.save_pretrained(tmp_path)
    model = SailerForAudioClassification.from_audio_text_pretrained(tmp_path, audio_layers="weighted").eval()
    taken = model.sailer.audio_encoder.state_dict()
    assert all(torch.equal(tensor, taken[name]) for name, tensor in whole.encoder.state_dict().items())


def test_a_system_with_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    case = Case("wav2vec2", ADAPTER | {"output_hidden_size": 24})
    for audio_layers, width in (("last", 24), ("weighted", 32)):
        model = build(case, audio_layers=audio_layers)
        assert model.sailer.audio_projection[0].in_channels == width
        model.save_pretrained(tmp_path / audio_layers)
        again = SailerForAudioClassification.from_pretrained(tmp_path / audio_layers).eval()
        inputs = reader(case)([0, 1])
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_clip_shorter_than_the_convolutions_is_named() -> None:
    case = Case("lasr_encoder", {}, "LasrFeatureExtractor")
    with pytest.raises(ValueError, match="A clip of 8 frames is shorter than the convolutions of a 'lasr_encoder'"):
        build(case)(**reader(case, seconds=(0.1,))([0]))


def test_a_mask_of_another_length_is_refused() -> None:
    model = build(Case("wav2vec2", STABLE))
    with pytest.raises(ValueError, match="attention_mask has 10 columns for audio of length 3200"):
        model(input_values=torch.zeros(1, 3200), attention_mask=torch.ones(1, 10))


def test_an_extractor_without_a_mask_is_refused() -> None:
    processor = SailerProcessor(transformers.ASTFeatureExtractor())
    with pytest.raises(ValueError, match=r"ASTFeatureExtractor gives .* and no attention_mask"):
        processor(audio=np.zeros(8000, np.float32), sampling_rate=16000)


def pickled(folder: Path, to: Path, **more: object) -> Path:
    """A copy of a backbone as some are published: pytorch_model.bin and no safetensors."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(folder / "model.safetensors") | more, to / "pytorch_model.bin")
    return to


@pytest.mark.parametrize("family", ["whisper", "wavlm", "text"])
def test_a_backbone_published_as_a_pickle(
    family: str,
    tiny_whisper: Path,
    tiny_wavlm: Path,
    tiny_text: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = {"whisper": tiny_whisper, "wavlm": tiny_wavlm, "text": tiny_text}[family]
    layers = None if family == "text" else "last"
    transformers.utils.logging.enable_propagation()
    with caplog.at_level("WARNING"):
        loaded = load_encoder(pickled(folder, tmp_path / "pickled"), None, layers)
    transformers.utils.logging.disable_propagation()
    assert "has no model.safetensors: its pytorch_model.bin is read as tensors alone" in caplog.text
    expected = load_encoder(folder, None, layers).state_dict()
    assert set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


class Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("obeys", [False, True])
def test_a_pickled_backbone_runs_no_code(
    obeys: bool, tiny_whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.23 reads one .bin as tensors alone whatever it is told; one that does as it is told stands in."""
    folder = pickled(tiny_whisper, tmp_path / "hostile", more=Hostile(tmp_path / "ran"))
    if obeys:
        load = PreTrainedModel.from_pretrained.__func__

        def load_as_told(cls: type, source: Path, *arguments: object, weights_only: bool = True, **options: object):
            torch.load(source / "pytorch_model.bin", weights_only=weights_only)
            return load(cls, source, *arguments, weights_only=weights_only, **options)

        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(load_as_told))
    with pytest.raises(ValueError, match=r"hostile.*holds more than tensors"):
        SailerForAudioClassification.from_audio_text_pretrained(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickled_backbone_that_is_cut_short(tiny_whisper: Path, tmp_path: Path) -> None:
    file = pickled(tiny_whisper, tmp_path / "short") / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"The backbone .*short.* cannot be loaded"):
        SailerForAudioClassification.from_audio_text_pretrained(file.parent)
