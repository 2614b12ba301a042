"""Tiny backbones: each makes a system that hears, a recipe's backbones give way to those of their families, and only
they do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor, BertConfig

import sailer.train
from sailer import SailerForAudioClassification, SailerProcessor
from sailer.cli import main
from sailer.settings import ModelSettings, Settings, SettingsError, bundled_recipes, load_recipe, resolve, to_yaml
from sailer.training.tiny_backbones import FAMILIES, TINY, tiny_stand_in

from .docs_pages import ROOT

SPEECH = [name for name in TINY if name != "tiny-text"]
STAND_INS = {
    **{"openai/whisper-large-v3": "tiny-whisper", "openai/whisper-base": "tiny-whisper"},
    **{"microsoft/wavlm-large": "tiny-wavlm", "emotion2vec_base": "tiny-emotion2vec"},
    "FacebookAI/roberta-large": "tiny-text",
}
SWAPPED = ("tiny", "audio_backbone", "text_backbone")


@pytest.mark.parametrize("name", SPEECH)
def test_each_is_of_its_family_small_and_hears(name: str, tmp_path: Path, different_clips: list[np.ndarray]) -> None:
    folder = TINY[name](tmp_path / name)
    assert FAMILIES[AutoConfig.from_pretrained(folder).model_type] == name
    model = SailerForAudioClassification.from_audio_text_pretrained(folder, heads=["primary"], hidden_size=16).eval()
    assert sum(parameter.numel() for parameter in model.sailer.audio_encoder.parameters()) < 500_000
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(folder))
    with torch.no_grad():
        logits = model(**processor(different_clips[:3], sampling_rate=16000)).logits
        alone = model(**processor(different_clips[:1], sampling_rate=16000)).logits
    assert logits.isfinite().all() and (logits[0] - logits[2]).abs().max() > 1e-4
    torch.testing.assert_close(alone, logits[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TINY)
def test_its_weights_are_its_seed_s_and_the_caller_s_random_numbers_go_on(name: str, tmp_path: Path) -> None:
    def made(folder: str, **options: int) -> dict[str, torch.Tensor]:
        (file,) = TINY[name](tmp_path / folder, **options).glob("*.safetensors")
        return load_file(file)

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, drawn = made("first"), torch.rand(1)
    again = made("again")
    assert torch.equal(torch.cat([drawn, torch.rand(1)]), expected)
    other = made("other", seed=1)
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert any(not torch.equal(weight, other[name]) for name, weight in first.items())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that `sailer train` would train with."""
    found: list[Settings] = []
    monkeypatch.setattr(sailer.train, "train", found.append)
    return found


@pytest.mark.parametrize("name", [name for name in bundled_recipes() if "base_model" not in load_recipe(name)])
def test_tiny_changes_the_backbones_of_a_recipe_and_nothing_else(name: str, trained: list[Settings]) -> None:
    assert main(["train", name]) == main(["train", name, "--tiny"]) == 0
    real, tiny = (to_yaml(settings).splitlines() for settings in trained)
    kept = [[line for line in lines if line.partition(":")[0] not in SWAPPED] for lines in (real, tiny)]
    assert kept[0] == kept[1] and len(kept[0]) == len(real) - len(SWAPPED)
    model, wanted = trained[1].model, load_recipe(name)
    for tower in ("audio_backbone", "text_backbone"):
        given, used = wanted.get(tower), getattr(model, tower)
        assert used == STAND_INS.get(given, used) and (used in TINY if given else used is None)
    assert "tiny" not in model.config_options()


def test_the_resolved_recipe_of_a_trial_is_one_again(tmp_path: Path) -> None:
    settings = resolve({"audio_backbone": "microsoft/wavlm-large", "tiny": True})
    (tmp_path / "resolved.yaml").write_text(to_yaml(settings))
    assert resolve(load_recipe(tmp_path / "resolved.yaml")).model == settings.model


def test_a_backbone_in_a_folder_has_the_stand_in_of_its_family(tiny_wavlm: Path, tiny_text: Path) -> None:
    assert tiny_stand_in(str(tiny_wavlm)) == "tiny-wavlm"
    assert tiny_stand_in(str(tiny_text)) == "tiny-text"
    assert tiny_stand_in("tiny-hubert") == "tiny-hubert"


def test_what_has_no_stand_in_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    line = ["train", "demo", "--tiny", "--output_dir", str(tmp_path / "out")]
    for options, message in (
        (["--text_backbone", str(tmp_path / "bert")], "text_backbone: There is no tiny backbone of"),
        (["--audio_backbone", str(tmp_path / "nowhere")], "audio_backbone: The family of backbone"),
        (["--base_model", "outputs/mine"], "base_model 'outputs/mine' is a whole system: leave one of them out"),
    ):
        assert main([*line, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingsError, match=r"'bert' model; the families with a tiny backbone are .*'whisper'"):
        ModelSettings("tiny-whisper", str(tmp_path / "bert"), tiny=True)


def test_what_the_recipes_name_needs_no_network() -> None:
    named = {
        load_recipe(recipe).get(f"{tower}_backbone") for recipe in bundled_recipes() for tower in ("audio", "text")
    }
    for name in named - {None}:
        assert name in TINY or (ROOT / "backbone_configs" / f"{name.split('/')[-1]}.json").is_file(), name
