"""The recipes beyond the paper: what each changes of the one it extends, and each end to end on tiny backbones."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from transformers import AutoConfig

from sailer import SailerConfig, SailerForAudioClassification
from sailer.cli import main
from sailer.settings import bundled_recipes, load_recipe, resolve

from .docs_pages import ROOT
from .sounds import noise

BEST = "paper_table3_both"
HUBERT = {"audio_backbone": "facebook/hubert-large-ll60k", "audio_layers": "weighted_norm"}
LORA = {"audio_lora_rank": 16, "audio_lora_targets": ["feed_forward"], "audio_lora_layers": 15, "lora_alpha": 1}
# By recipe: the one that it extends, and what it changes of it.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora_whisper": ("paper_system3_whisper_attributes", {"text_backbone": None, **LORA}),
    "lora_wavlm_text": (
        "paper_system1_wavlm",
        {
            **{"text_backbone": "FacebookAI/roberta-large", "freeze_audio": True, "audio_lora_rank": 16},
            **{"audio_lora_targets": ["attention", "feed_forward"], "text_lora_rank": 8, "lora_alpha": 16},
            "lora_dropout": 0.05,
        },
    ),
    "weighted_norm": (BEST, {"audio_layers": "weighted_norm"}),
    "logit_adjustment": (BEST, {"target_weighting": "none", "logit_adjustment_train": 1.0}),
    "sex_and_age": (
        BEST,
        {
            **{"corpus": "crema_d", "corpus_options": {}, "heads": ["primary", "sex", "age"], "sex_weight": 0.1},
            **{"age_weight": 0.1, "labels": ["Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad"]},
            "metric_for_best_model": "macro_f1",
        },
    ),
    "same_emotion_mixing": (BEST, {"mixing_mode": "same_emotion"}),
    "text_dropout": (BEST, {"text_dropout": 0.3}),
    "hubert": (BEST, HUBERT),
    "wav2vec2": ("more_hubert", {"audio_backbone": "facebook/wav2vec2-large-robust"}),
    "w2v_bert": ("more_hubert", {"audio_backbone": "facebook/w2v-bert-2.0"}),
    "going_on": (
        "paper_system3_whisper_attributes",
        {
            **{"audio_backbone": None, "text_backbone": None, "base_model": "whisper_released"},
            **{"learning_rate": 1e-4, "num_train_epochs": 5},
        },
    ),
    "distil": (
        BEST,
        {
            **{"text_backbone": None, "objective": "distil", "teacher": "outputs/ensemble"},
            **{"distil_temperature": 2.0, "distil_weight": 0.5},
        },
    ),
}
SMALL = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "hidden_size": 16, "use_cpu": "true"}


def test_every_recipe_beyond_the_paper_is_here() -> None:
    assert {f"more_{name}" for name in RECIPES} == {name for name in bundled_recipes() if name.startswith("more_")}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_changes_what_it_says(name: str) -> None:
    recipe, (base, changes) = load_recipe(f"more_{name}"), RECIPES[name]
    assert recipe.pop("output_dir") == f"outputs/more_{name}"
    expected = load_recipe(base) | changes
    expected.pop("output_dir")
    assert recipe == expected
    resolve(recipe)
    lines = bundled_recipes()[f"more_{name}"].read_text().splitlines()
    assert (
        lines[0].startswith("# Beyond the paper: ") and "no figure was made" in lines[0] and lines[1].startswith("# ")
    )


@pytest.mark.parametrize(("name", "number"), [("lora_whisper", 3_072_000), ("lora_wavlm_text", 7_077_888 + 1_966_080)])
def test_lora_of_the_real_systems_has_the_numbers_that_it_should(name: str, number: int) -> None:
    """Rank times inputs plus outputs of each matrix: of Whisper 15 layers' two, 2 x 16 x (1280 + 5120); of WavLM 24
    layers' four of 16 x (1024 + 1024) and two of 16 x (1024 + 4096), of RoBERTa 24 layers' two of 8 x (1024 + 4096).
    """
    settings = resolve(load_recipe(f"more_{name}")).model
    files = {
        name: ROOT / "backbone_configs" / f"{str(name).rpartition('/')[2]}.json"
        for name in (settings.audio_backbone, settings.text_backbone)
    }
    audio, text = (None if name is None else AutoConfig.from_pretrained(file) for name, file in files.items())
    config = SailerConfig(audio_config=audio, text_config=text, **settings.config_options())
    with torch.device("meta"):
        model = SailerForAudioClassification(config)
    trained = {key: value.numel() for key, value in model.named_parameters() if value.requires_grad}
    assert sum(size for key, size in trained.items() if "_encoder." in key) == number
    assert all(".lora_" in key for key in trained if "_encoder." in key)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 28 clips of noise, with everything that can be annotated."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["audio,split,votes,transcript,speaker,sex,age,arousal,valence,dominance"]
    emotions = ("Happy", "Sad", "Angry", "Fear")
    for number in range(28):
        soundfile.write(folder / f"{number}.wav", noise(0.3, number), 16000)
        split = "train" if number < 16 else ("validation", "test")[number % 2]
        row = [f"{number}.wav", split, f"{emotions[number // 2 % 4]};Neutral;{emotions[number // 2 % 4]}", "so it is"]
        row += [f"{split}{number % 2}", ("female", "male")[number % 2], str(20 + number), "3", "4", "5"]
        lines.append(",".join(row))
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder / "clips.csv"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_end_to_end(
    name: str, corpus: Path, tiny_sailer: Path, tiny_speech_sailer: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = SMALL | {"corpus": "manifest", "data_dir": corpus, "corpus_options": "{}"}
    given |= {"output_dir": tmp_path / "out", "tiny": "true", "mixing_probability": 1.0}
    if name == "lora_whisper":
        given["audio_lora_layers"] = 1  # of the two that the tiny one has
    if name == "going_on":
        given |= {"base_model": tiny_sailer, "tiny": "false", "heads": "[primary, secondary, attributes, sex, age]"}
    if name == "distil":
        assert main(["ensemble", str(tiny_sailer), str(tiny_speech_sailer), str(tmp_path / "teacher")]) == 0
        given["teacher"] = tmp_path / "teacher"
    assert main(["train", f"more_{name}", *(f"--{option}={value}" for option, value in given.items())]) == 0
    model = SailerForAudioClassification.from_pretrained(tmp_path / "out")
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 <= figures["test"]["macro_f1"] <= 1 and model.config.audio_lora is None
    heads = model.config.heads if name == "going_on" else resolve(load_recipe(f"more_{name}")).model.heads
    assert set(model.config.heads) == set(heads)
