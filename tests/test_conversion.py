"""Released checkpoints give the numbers that the authors' code gave, and nothing is converted on a guess."""

import json
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


def test_a_clip_of_twenty_seconds_is_cut_as_theirs_is(reference: Path, tmp_path: Path) -> None:
    model, processor = load(convert(reference / "whisper_frozen", tmp_path / "converted"))
    clip = np.random.default_rng(0).normal(0, 0.1, 20 * 16000).astype(np.float32)
    with torch.no_grad():
        long, cut = (model(**processor(wave, sampling_rate=16000)).logits for wave in (clip, clip[: 15 * 16000]))
    assert torch.equal(long, cut)


def test_lora_of_an_untouched_backbone_is_merged(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    # Whisper's own weights are exact in half precision, as they were published.
    name = "backbone_model.encoder.layers.3.fc1."

    def untouched(tensors: dict) -> None:
        tensors[name + "weight"] = tensors[name + "weight"].half().float()

    folder = checkpoint("whisper_lora", untouched)
    tensors = load_file(folder / "model.safetensors")
    model, _ = load(convert(folder, tmp_path / "converted"))
    expected = tensors[name + "weight"] + tensors[name + "lora_B"] @ tensors[name + "lora_A"] / 16
    torch.testing.assert_close(model.sailer.audio_encoder.layers[3].fc1.weight.data, expected)


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
