"""Released checkpoints give the numbers that the authors' code gave, and nothing is converted on a guess."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.audio_sailer import load_audio
from sailer.hub.conversion import ConversionError, convert, packaged_config

CHECKPOINTS = ["whisper_lora", "whisper_frozen", "whisper_dim", "wavlm_finetune"]
PARAMETERS = {"whisper-large-v3": 636_968_960, "wavlm-large": 315_453_120, "roberta-large": 355_359_744}
UNUSED = "backbone_model.decoder.layer_norm.weight"


@pytest.fixture(scope="module")
def reference(shared: Path) -> Path:
    return shared / "reference" / "vox_profile"


@pytest.fixture
def checkpoint(reference: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a reference checkpoint whose tensors and settings a test may change."""

    def copy(name: str, change: Callable[[dict], None] = lambda tensors: None, **settings: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in ("config.json", "backbone_config.json"):
            shutil.copyfile(reference / name / file, folder / file)
        original = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(original | settings))
        tensors = load_file(reference / name / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return copy


def load(folder: Path) -> tuple[SailerForAudioClassification, SailerProcessor]:
    return SailerForAudioClassification.from_pretrained(folder).eval(), SailerProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_outputs_are_the_authors(name: str, reference: Path, tmp_path: Path) -> None:
    model, processor = load(convert(reference / name, tmp_path / "converted"))
    expected = json.loads((reference / name / "expected.json").read_text())
    clips = [load_audio(reference / clip) for clip in expected]
    with torch.no_grad():
        batch = model(**processor(clips, sampling_rate=16000))
        alone = [model(**processor(clip, sampling_rate=16000)) for clip in clips]
    for row, values in enumerate(expected.values()):
        for outputs, index in ((batch, row), (alone[row], 0)):
            ours = {
                "emotion_logits": outputs.logits,
                "secondary_logits": outputs.secondary_logits,
                "embedding": outputs.embeddings,
                **{
                    attribute: outputs.attributes[:, [i]]
                    for i, attribute in enumerate(("arousal", "valence", "dominance"))
                },
            }
            for output, value in values.items():
                np.testing.assert_allclose(ours[output][index].numpy(), value, atol=1e-4, err_msg=f"{name} {output}")
    assert (batch.logits is None) == (name == "whisper_dim")


def test_what_the_folder_says(reference: Path, tmp_path: Path) -> None:
    model, processor = load(convert(reference / "whisper_frozen", tmp_path / "converted"))
    assert model.config.attend_to_padding and processor.audio_padding == "max_length"
    assert processor(np.zeros(16000, np.float32), sampling_rate=16000)["input_features"].shape[-1] == 1500
    assert model.config.labels[0] == "Angry" and model.config.secondary_labels[16] == "secondary_16"
    with pytest.raises(ValueError, match="weights"):
        model.probabilities(torch.zeros(1, 9), prior="natural")
    assert not [name for name in load_file(tmp_path / "converted" / "model.safetensors") if "decoder" in name]


def test_the_folder_has_a_card_and_can_be_pushed(reference: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    from sailer.hub.publishing import check_system

    folder = convert(reference / "whisper_dim", tmp_path / "converted")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "audio-classification"
    assert "whisper_dim, converted" in card.text and "- Outputs: attributes\n" in card.text
    assert "Emotions:" not in card.text and str(tmp_path) not in card.text
    check_system(folder)


def test_a_clip_of_twenty_seconds_is_cut_as_theirs_is(reference: Path, tmp_path: Path) -> None:
    model, processor = load(convert(reference / "whisper_frozen", tmp_path / "converted"))
    clip = np.random.default_rng(0).normal(0, 0.1, 20 * 16000).astype(np.float32)
    with torch.no_grad():
        long, cut = (model(**processor(wave, sampling_rate=16000)).logits for wave in (clip, clip[: 15 * 16000]))
    assert torch.equal(long, cut)


def adapted(tensors: dict) -> list[tuple[str, torch.Tensor]]:
    """Names of the matrices that have LoRA factors, each with its update B A / rank."""
    names = [name.removesuffix("lora_A") for name in tensors if name.endswith("lora_A")]
    return [(f"{name}weight", tensors[f"{name}lora_B"] @ tensors[f"{name}lora_A"] / 16) for name in names]


def unmerge(tensors: dict) -> None:
    for name, update in adapted(tensors):
        tensors[name] = tensors[name] - update


def cast(tensors: dict) -> None:
    for name, _ in adapted(tensors):
        tensors[name] = tensors[name].half()


def unmerge_and_cast(tensors: dict) -> None:
    unmerge(tensors)
    cast(tensors)


@pytest.mark.parametrize("change", [lambda tensors: None, cast, unmerge, unmerge_and_cast])
def test_lora_counts_once_however_it_was_saved(
    change: Callable[[dict], None], checkpoint: Callable[..., Path], reference: Path, tmp_path: Path
) -> None:
    merged = load_file(reference / "whisper_lora" / "model.safetensors")
    model, _ = load(convert(checkpoint("whisper_lora", change), tmp_path / "converted"))
    ours = model.state_dict()
    found = 0
    for name, update in adapted(merged):
        weight = ours[name.replace("backbone_model.encoder.", "sailer.audio_encoder.")]
        torch.testing.assert_close(weight, merged[name], atol=1e-3 * update.abs().max().item(), rtol=1e-3)
        found += 1
    assert found == 2


@pytest.mark.parametrize("is_merged", [False, True])
def test_lora_of_wavlm(is_merged: bool, checkpoint: Callable[..., Path], tmp_path: Path, caplog) -> None:
    generator = torch.Generator().manual_seed(0)
    expected = {}

    def adapt(tensors: dict) -> None:
        layers = {name.split(".")[3] for name in tensors if name.startswith("backbone_model.encoder.layers.")}
        for index in range(len(layers) // 2 + 1, len(layers)):
            for matrix in ("intermediate_dense", "output_dense"):
                name = f"backbone_model.encoder.layers.{index}.feed_forward.{matrix}."
                rows, columns = tensors[f"{name}weight"].shape
                tensors[f"{name}lora_A"] = torch.randn(16, columns, generator=generator)
                tensors[f"{name}lora_B"] = torch.randn(rows, 16, generator=generator)
                expected[name] = tensors[f"{name}weight"] + tensors[f"{name}lora_B"] @ tensors[f"{name}lora_A"] / 16
                if is_merged:
                    tensors[f"{name}weight"] = expected[name]

    folder = checkpoint("wavlm_finetune", adapt, finetune_method="lora", lora_rank=16)
    with caplog.at_level("INFO", logger="sailer"):
        model, _ = load(convert(folder, tmp_path / "converted"))
    assert expected
    for name, weight in expected.items():
        ours = model.state_dict()[name.replace("backbone_model.", "sailer.audio_encoder.") + "weight"]
        torch.testing.assert_close(ours, weight)
    share = r"1\.\d\d|0\.9\d" if is_merged else r"-?0\.0\d"
    assert re.search(rf"hold ({share}) ± 0\.0\d", caplog.text) and "not clear" not in caplog.text


def test_lora_that_cannot_be_told_is_said_and_can_be_told(
    checkpoint: Callable[..., Path], reference: Path, tmp_path: Path, caplog
) -> None:
    folder = checkpoint("whisper_lora")
    name, update = adapted(load_file(folder / "model.safetensors"))[0]
    weights = {}
    for mode in ("auto", "merged", "unmerged"):
        caplog.clear()
        model, _ = load(convert(folder, tmp_path / mode, lora=mode))
        assert ("--lora merged or --lora unmerged" in caplog.text) == (mode == "auto")
        weights[mode] = model.state_dict()[name.replace("backbone_model.encoder.", "sailer.audio_encoder.")]
    torch.testing.assert_close(weights["unmerged"], weights["merged"] + update)
    with pytest.raises(ConversionError, match=r"lora is 'maybe'.*unmerged"):
        convert(folder, tmp_path / "other", lora="maybe")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_dim": None}, "hidden_dim is None"),
        ({"hidden_dim": -8}, "hidden_dim is -8"),
        ({"hidden_dim": "many"}, "hidden_dim is 'many'"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"output_class_num": 9.5}, r"output_class_num is 9\.5"),
        ({"pretrain_model": 3}, "pretrain_model is 3"),
    ],
)
def test_settings_that_no_checkpoint_can_have(
    settings: dict, message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=rf"config\.json: {message}"):
        convert(checkpoint("whisper_lora", **settings), tmp_path / "converted")


@pytest.mark.parametrize(
    "change", [{"d_model": None}, {"d_model": -48}, {"d_model": "wide"}, {"num_mel_bins": 0}, {"encoder_ffn_dim": 0}]
)
def test_backbone_sizes_that_cannot_be(change: dict, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("whisper_frozen")
    config = json.loads((folder / "backbone_config.json").read_text())
    (folder / "backbone_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConversionError, match=next(iter(change))):
        convert(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_settings_that_are_no_mapping(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("whisper_frozen")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConversionError, match="no settings by name"):
        convert(folder, tmp_path / "converted")


def test_an_impossible_destination_fails_before_the_work(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("sailer.hub.conversion._read_tensors", lambda *_: pytest.fail("the work was begun"))
    for place in (tmp_path / "file" / "below", Path("/proc/sailer/converted")):
        with pytest.raises(ConversionError, match=r"cannot be written.*choose another place"):
            convert(checkpoint("whisper_frozen"), place)
        shutil.rmtree(tmp_path / "whisper_frozen")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("whisper_frozen", "valence_layer.2.bias"),
        ("whisper_frozen", "embed_positions"),
        ("whisper_frozen", "backbone_model.encoder.layers.1.fc1.weight"),
        ("whisper_lora", "backbone_model.encoder.layers.3.fc2.lora_B"),
        ("wavlm_finetune", "weights"),
    ],
)
def test_missing_tensor(name: str, tensor: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(name, lambda tensors: tensors.pop(tensor))
    with pytest.raises(ConversionError, match=f"lacks {tensor}"):
        convert(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("whisper_frozen", "gender_layer.0.weight"),
        ("whisper_frozen", "backbone_model.encoder.layers.3.fc1.lora_A"),
        ("wavlm_finetune", "embed_positions"),
    ],
)
def test_left_over_tensor(name: str, tensor: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(name, lambda tensors: tensors.update({tensor: torch.zeros(2)}))
    with pytest.raises(ConversionError, match=f"no known use: {tensor}"):
        convert(folder, tmp_path / "converted")


def test_unused_tensors_may_be_absent(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    convert(checkpoint("whisper_frozen", lambda tensors: tensors.pop(UNUSED)), tmp_path / "converted")


def test_another_backbone_is_told_from_the_shapes(
    checkpoint: Callable[..., Path], reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match="lacks backbone_model"):
        convert(checkpoint("whisper_frozen"), tmp_path / "converted", audio_backbone=str(reference / "wavlm_finetune"))
    folder = checkpoint("wavlm_finetune", lambda tensors: tensors.update(weights=torch.zeros(4)))
    with pytest.raises(ConversionError, match=r"weights has shape \(4,\)"):
        convert(folder, tmp_path / "converted")


def test_backbone_by_folder_or_file(reference: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("whisper_frozen")
    (folder / "backbone_config.json").rename(tmp_path / "config.json")
    for name, backbone in (("by_folder", tmp_path), ("by_file", tmp_path / "config.json")):
        model, _ = load(convert(folder, tmp_path / name, audio_backbone=str(backbone)))
        assert model.config.audio_config.d_model == 48
    with pytest.raises(ConversionError, match=r"layers\.10.*--audio_backbone"):
        convert(folder, tmp_path / "large")  # whisper_large without a word is whisper-large-v3


def test_a_backbone_that_does_not_ship(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("whisper_frozen", pretrain_model="whisper_small")
    (folder / "backbone_config.json").unlink()
    with pytest.raises(ConversionError, match="--audio_backbone"):
        convert(folder, tmp_path / "converted")


def test_pickle_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("whisper_frozen")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin.*can run code"):
        convert(folder, tmp_path / "converted")


def test_truncated_weights(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    weights = checkpoint("whisper_frozen") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read.*truncated"):
        convert(weights.parent, tmp_path / "converted")


def test_what_is_no_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="neither a folder nor a Hub id"):
        convert(tmp_path / "nowhere", tmp_path / "converted")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"no config\.json"):
        convert(tmp_path / "empty", tmp_path / "converted")
    folder = checkpoint("whisper_frozen")
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(ConversionError, match="pretrain_model"):
        convert(folder, tmp_path / "converted")
    with pytest.raises(ConversionError, match="not an empty folder"):
        convert(folder, folder)


@pytest.mark.parametrize("name", PARAMETERS)
def test_packaged_backbones(name: str) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(packaged_config(name))
    model = model.encoder if name.startswith("whisper") else model
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_unknown_packaged_backbone() -> None:
    with pytest.raises(ValueError, match="whisper-large-v3"):
        packaged_config("whisper-large-v4")
