"""The bundled recipes: what extends what, that each row of the paper's tables differs as the paper says, and how large
the systems are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sailer import SailerConfig, SailerForAudioClassification
from sailer.settings import SettingsError, bundled_recipes, load_recipe, resolve

from .docs_pages import ROOT

BACKBONES = {
    "openai/whisper-large-v3": "whisper-large-v3",
    "microsoft/wavlm-large": "wavlm-large",
    "FacebookAI/roberta-large": "roberta-large",
}
EXTRA = {"corpus_options": {"splits": ["train", "validation"], "development_extra": True}}
WAVLM = {"audio_backbone": "microsoft/wavlm-large", "audio_layers": "weighted", "freeze_audio": False}
WAVLM |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
SECONDARY = {"heads": ["primary", "secondary"], "secondary_weight": 1.0}
ATTRIBUTES = {"heads": ["primary", "attributes"], "attribute_weight": 1.0, "attribute_loss": "mse"}
# By recipe: the one that it differs from, in what, and the paper's figures of it (macro-F1, accuracy, Min. mAP).
ROWS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "table2_whisper_text": ("table2_whisper_text", {}, ("0.402", "55.42")),
    "table2_whisper": ("table2_whisper_text", {"text_backbone": None}, ("0.383", "53.67")),
    "table2_wavlm_text": ("table2_whisper_text", WAVLM, ("0.389", "55.97")),
    "table2_wavlm": ("table2_wavlm_text", {"text_backbone": None}, ("0.376", "50.72")),
    "table3_none": ("table2_whisper_text", EXTRA, ("0.401", "53.82", "0.301")),
    "table3_dropout": ("table3_none", {"annotation_dropout": 0.2}, ("0.403", "53.87", "0.321")),
    "table3_mixing": ("table3_none", {"mixing_probability": 0.3}, ("0.404", "53.42", "0.336")),
    "table3_both": ("table3_mixing", {"annotation_dropout": 0.2}, ("0.406", "53.46", "0.328")),
    "system2_whisper_secondary": ("table3_both", SECONDARY, ("0.409", "54.26", "0.322")),
    "table4_attributes": ("table3_both", ATTRIBUTES, ("0.407", "53.42", "0.305")),
    "system3_whisper_attributes": (
        "system2_whisper_secondary",
        ATTRIBUTES | {"heads": ["primary", "secondary", "attributes"]},
        ("0.411", "54.53", "0.316"),
    ),
    "system1_wavlm": ("table2_wavlm", EXTRA | {"annotation_dropout": 0.2, "mixing_probability": 0.3}, ()),
    "system1_wavlm_ours": ("system1_wavlm", {"backbone_learning_rate": 1e-5}, ()),
}


def options(row: str) -> dict[str, Any]:
    recipe = load_recipe(f"paper_{row}")
    assert recipe.pop("output_dir") == f"outputs/paper_{row}"
    return recipe


def test_every_recipe_of_the_paper_is_a_row() -> None:
    assert {f"paper_{row}" for row in ROWS} == {name for name in bundled_recipes() if name.startswith("paper_")}
    assert sum(len(figures) > 0 for *_, figures in ROWS.values()) == 11


@pytest.mark.parametrize("row", ROWS)
def test_a_row_differs_from_its_neighbour_as_the_paper_says(row: str) -> None:
    neighbour, changes, figures = ROWS[row]
    assert options(row) == options(neighbour) | changes
    first = bundled_recipes()[f"paper_{row}"].read_text().splitlines()[0]
    assert all(figure in first for figure in figures)
    assert row.startswith("system") or f"Table {row[5]}" in first


SILENT = (
    *("freeze_text", "annotation_dropout", "per_device_train_batch_size", "train_sampling_strategy", "weight_decay"),
    *("metric_for_best_model", "seed", "mixing_probability", "secondary_weight", "attribute_weight", "attribute_loss"),
)


@pytest.mark.parametrize("option", SILENT)
def test_where_the_paper_is_silent_a_recipe_says_so(option: str) -> None:
    """The line itself, or the comment above it."""
    told = []
    for name, path in bundled_recipes().items():
        lines = path.read_text().splitlines() if name.startswith("paper_") else []
        for number, line in enumerate(lines):
            if line.startswith(f"{option}:"):
                above = [text for text in lines[max(0, number - 2) : number] if text.startswith("#")]
                told.append("not said" in " ".join([*above, line]))
    assert any(told)


# Weights and biases of what the towers are made of, counted by hand.
def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def transformer_layer(width: int, inner: int) -> int:
    """Attention's four products, the two of the feed-forward part, and two layer normalisations."""
    return 4 * linear(width, width) + linear(width, inner) + linear(inner, width) + 2 * 2 * width


# Two convolutions of width 3 on 128 mels, 1500 positions, keys without a bias, a last normalisation.
WHISPER = 3 * 128 * 1280 + 1280 + 3 * 1280 * 1280 + 1280 + 1500 * 1280
WHISPER += 32 * (transformer_layer(1280, 5120) - 1280) + 2 * 1280
# Tokens, positions, one type, their normalisation.
ROBERTA = (50265 + 514 + 1) * 1024 + 2 * 1024 + 24 * transformer_layer(1024, 4096)
# Seven convolutions without bias, each normalised; the projection, normalised before; the embedding of what is masked.
WAVLM_LARGE = 512 * 10 + 512 * 512 * (4 * 3 + 2 * 2) + 7 * 2 * 512 + 2 * 512 + linear(512, 1024) + 1024
# Positions by a convolution in 16 groups with its weight's norm apart; the layers, each with a gate of 8 units per
# head of 64 and a constant per head; 320 distances for 16 heads; a last normalisation.
WAVLM_LARGE += 1024 * 1024 // 16 * 128 + 128 + 1024
WAVLM_LARGE += 24 * (transformer_layer(1024, 4096) + linear(64, 8) + 16) + 320 * 16 + 2 * 1024


def head(width: int, outputs: int) -> int:
    return linear(width, 256) + linear(256, outputs)


@pytest.mark.parametrize("row", ROWS)
def test_the_real_system_of_a_row_has_the_parameters_that_it_should(row: str) -> None:
    settings = resolve(load_recipe(f"paper_{row}")).model
    towers = [
        None if name is None else AutoConfig.from_pretrained(ROOT / "backbone_configs" / f"{BACKBONES[name]}.json")
        for name in (settings.audio_backbone, settings.text_backbone)
    ]
    config = SailerConfig(audio_config=towers[0], text_config=towers[1], **settings.config_options())
    with torch.device("meta"):
        model = SailerForAudioClassification(config)

    is_whisper, has_text = "whisper" in row or row[:6] in ("table3", "table4"), towers[1] is not None
    tower, width, layers = (WHISPER, 1280, 0) if is_whisper else (WAVLM_LARGE, 1024, 25)
    fused = 256 + 1024 * has_text
    ours = linear(width, 256) + 2 * linear(256, 256) + layers + 25 * has_text
    ours += head(fused, 9)
    ours += head(fused, 17) * ("secondary" in settings.heads) + 3 * head(fused, 1) * ("attributes" in settings.heads)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert sum(sizes) == tower + ROBERTA * has_text + ours
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == ours + (0 if is_whisper else tower)


def write(folder: Path, **recipes: str) -> Path:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(recipes))}.yaml"


def test_a_recipe_extends_one_beside_it_and_that_a_bundled_one(tmp_path: Path) -> None:
    path = write(tmp_path, child="extend: base.yaml\nseed: 3\n", base="extend: demo\nseed: 2\nlearning_rate: 1e-3\n")
    expected = load_recipe("demo") | {"seed": 3, "learning_rate": 1e-3}
    assert load_recipe(path) == expected
    assert resolve(load_recipe(path)).training.seed == 3


def test_a_file_beside_the_recipe_comes_before_a_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, child="extend: demo.yaml\n", demo="corpus: mine\n")
    monkeypatch.chdir(tmp_path.parent)
    assert load_recipe(path) == {"corpus": "mine"}


def test_one_key_of_a_mapping_is_changed_and_a_whole_mapping_comes_before_its_keys(tmp_path: Path) -> None:
    base = "corpus_options: {a: 1, b: 2}\n"
    path = write(tmp_path, child="extend: base.yaml\ncorpus_options.b: 3\n", base=base)
    assert load_recipe(path) == {"corpus_options": {"a": 1, "b": 3}}
    path = write(
        tmp_path,
        child="extend: middle.yaml\ncorpus_options: {c: 4}\n",
        middle="extend: base.yaml\ncorpus_options.b: 3\n",
        base="seed: 1\n",
    )
    assert load_recipe(path) == {"seed": 1, "corpus_options": {"c": 4}}
    assert load_recipe(tmp_path / "middle.yaml") == {"seed": 1, "corpus_options.b": 3}


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"a": "extend: a.yaml\n"}, r"a\.yaml extends itself: a\.yaml -> a\.yaml"),
        ({"a": "extend: b.yaml\n", "b": "extend: a.yaml\n"}, r"extends itself: a\.yaml -> b\.yaml -> a\.yaml"),
        ({"a": "extend: nowhere\n"}, r"a\.yaml extends 'nowhere'.*does not exist; name a YAML file or one of demo"),
        ({"a": "extend: b.yaml\n", "b": "extend: nowhere\n"}, r"b\.yaml extends 'nowhere'"),
        ({"a": "extend: [demo, b]\n"}, r"a\.yaml: extend is \['demo', 'b'\]; name one recipe"),
        ({"a": "extend: b.yaml\n", "b": "- 1\n"}, r"b\.yaml is not a list of"),
    ],
)
def test_what_cannot_be_extended_is_named(recipes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        load_recipe(write(tmp_path, **recipes))
