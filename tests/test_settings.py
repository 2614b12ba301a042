import dataclasses
import re
from pathlib import Path

import pytest

from sailer.data.schema import CorpusError
from sailer.settings import (
    DataSettings,
    ModelSettings,
    SettingsError,
    _parts,
    bundled_recipes,
    load_recipe,
    option_help,
    parse_overrides,
    resolve,
    to_yaml,
)

MINIMAL = {"audio_backbone": "tiny-whisper"}


def test_options_are_read_from_a_command_line() -> None:
    line = "--data_dir /corpus --learning-rate 5e-4 --heads primary sex --seed=-1 --cache_features off --bf16"
    assert parse_overrides(line.split()) == {
        "data_dir": "/corpus",
        "learning_rate": "5e-4",
        "heads": ["primary", "sex"],
        "seed": -1,
        "cache_features": "off",
        "bf16": True,
    }


def test_yaml_values_are_read_and_names_that_look_like_numbers_stay() -> None:
    options = parse_overrides(
        ["--corpus_options", "{clips: 20, rate: 1e-3}", "--text_backbone", "null", "--run_name", "010"]
    )
    assert options == {"corpus_options": {"clips": 20, "rate": 0.001}, "text_backbone": None, "run_name": "010"}


def test_of_a_repeated_option_the_last_counts() -> None:
    assert parse_overrides(["--seed", "1", "--seed", "2"]) == {"seed": 2}


def test_a_value_without_option_is_refused() -> None:
    with pytest.raises(SettingsError, match="Unexpected argument 'demo'"):
        parse_overrides(["demo", "--seed", "1"])


def test_a_value_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(SettingsError, match="--corpus_options is not YAML"):
        parse_overrides(["--corpus_options", "{clips: ["])


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "recipes/demo.yaml"])
def test_a_bundled_recipe_is_found_by_name_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name)["corpus"] == "synthetic"


def test_a_file_comes_before_a_bundled_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("corpus: mine\neval_strategy: no\nlearning_rate: 5e-4\n")
    assert load_recipe("demo.yaml") == {"corpus": "mine", "eval_strategy": "no", "learning_rate": 5e-4}


@pytest.mark.parametrize("name", ["demoo", "other/demo.yaml", "/nowhere/demo.yaml"])
def test_an_unknown_recipe_lists_the_bundled_ones(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} does not exist.*demo, .*ravdess_whisper_base"):
        load_recipe(name)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpus: [a", r"is not YAML.*\n.*line 1"),
        ("- corpus", "not a list of 'option: value' lines"),
        ("", "not a list of 'option: value' lines"),
        ("seed: 1\nseed: 2\n", "'seed'.* given twice"),
        ("1: 2", "not a list of 'option: value' lines"),
    ],
)
def test_a_malformed_recipe_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=f"(?s)bad.yaml.*{message}"):
        load_recipe(path)


def test_a_recipe_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"corpus: \xff\xfe")
    with pytest.raises(SettingsError, match=r"bad\.yaml is not YAML"):
        load_recipe(path)


def test_options_reach_the_part_that_has_them() -> None:
    settings = resolve(
        MINIMAL | {"learning_rate": "5e-4", "corpus": "ravdess", "focal_gamma": 1, "text_backbone": "tiny-text"},
        {"num_train_epochs": 3, "text_dropout": 0.5, "max_seconds": 8, "heads": "primary"},
    )
    assert settings.training.learning_rate == 5e-4
    assert settings.training.num_train_epochs == 3
    assert settings.data.corpus == "ravdess"
    assert settings.objective.focal_gamma == 1.0
    assert settings.augmentation.text_dropout == 0.5
    assert settings.model.heads == ["primary"]
    assert settings.model.max_seconds == settings.augmentation.max_seconds == 8.0
    assert isinstance(settings.model.max_seconds, float)


def test_overrides_win_and_can_set_one_key_of_a_mapping() -> None:
    recipe = MINIMAL | {"seed": 1, "corpus_options": {"train_clips": 700, "annotators": 5}}
    settings = resolve(recipe, {"seed": 2, "corpus_options.train_clips": 20})
    assert settings.training.seed == 2
    assert settings.data.corpus_options == {"train_clips": 20, "annotators": 5}
    assert recipe["corpus_options"]["train_clips"] == 700
    with pytest.raises(SettingsError, match=r"'corpus.clips' .*corpus is not a mapping"):
        resolve(MINIMAL | {"corpus": "synthetic"}, {"corpus.clips": 3})


def test_options_that_parts_share_have_one_default() -> None:
    defaults: dict[str, set[str]] = {}
    for part in _parts().values():
        for item in dataclasses.fields(part):
            defaults.setdefault(item.name, set()).add(repr(item.default))
    assert {name: values for name, values in defaults.items() if len(values) > 1} == {}


@pytest.mark.parametrize(("name", "nearest"), [("learnin_rate", "learning_rate"), ("audio_backbon", "audio_backbone")])
def test_an_unknown_option_names_the_nearest_and_its_source(name: str, nearest: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(f"'{name}' (recipe mine): did you mean '{nearest}'?")):
        resolve(MINIMAL | {name: 1}, origin="recipe mine")
    with pytest.raises(SettingsError, match=re.escape(f"'{name}' (command line): did you mean '{nearest}'?")):
        resolve(MINIMAL, {name: 1})


def test_an_option_like_no_other_is_pointed_to_the_list() -> None:
    with pytest.raises(SettingsError, match=r"'xyzzy'.*sailer train --help"):
        resolve(MINIMAL | {"xyzzy": 1})


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("learning_rate", "fast", "float"),
        ("learning_rate", True, "float"),
        ("seed", 1.5, "int"),
        ("seed", None, "int"),
        ("freeze_audio", "perhaps", "bool"),
        ("freeze_audio", 1, "bool"),
        ("corpus", ["a"], "str"),
        ("corpus_options", "clips", "dict[str, Any]"),
        ("test_splits", {"a": 1}, "list[str] | None"),
        ("cache_features", "tape", "one of 'off', 'memory', 'disk'"),
        ("objective", "hinge", "one of 'kl', 'soft_ce', 'ce', 'focal'"),
    ],
)
def test_a_value_of_the_wrong_type_names_option_value_and_type(option: str, value: object, expected: str) -> None:
    message = re.escape(f"Option '{option}' (command line) is {value!r}, expected {expected}.")
    with pytest.raises(SettingsError, match=message):
        resolve(MINIMAL, {option: value})


def test_numbers_are_converted_where_nothing_is_lost() -> None:
    settings = resolve(
        MINIMAL, {"seed": 3.0, "hidden_size": "64", "corpus": 2024, "text_backbone": None, "labels": "Angry"}
    )
    assert (settings.training.seed, settings.model.hidden_size, settings.data.corpus) == (3, 64, "2024")
    assert settings.model.text_backbone is None
    assert settings.data.labels == ["Angry"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name a speech encoder"),
        (MINIMAL | {"heads": ["primary", "mood"]}, "'mood'.*name each wanted head once"),
        (MINIMAL | {"heads": ["sex", "sex"]}, "name each wanted head once"),
        (MINIMAL | {"heads": []}, "name each wanted head once"),
        (MINIMAL | {"cache_features": "memory", "freeze_audio": False}, "only a frozen encoder's states"),
        (MINIMAL | {"trainable_audio_layers": 2}, "freeze_audio is true: set it to false"),
        (MINIMAL | {"backbone_learning_rate": 1e-5}, "every backbone is frozen"),
        (MINIMAL | {"backbone_learning_rate": 1e-5, "freeze_text": False}, "every backbone is frozen"),
        (MINIMAL | {"text_dropout": 0.1}, "no text encoder"),
    ],
)
def test_contradictions_are_refused(options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve(options)


def test_the_model_gets_its_options_without_the_backbones() -> None:
    options = ModelSettings(audio_backbone="tiny-whisper", heads=["age"]).config_options()
    assert options["heads"] == ["age"]
    assert not {"audio_backbone", "text_backbone", "base_model", "attn_implementation"} & set(options)
    assert (
        ModelSettings("tiny-whisper", attn_implementation="eager").config_options()["attn_implementation"] == "eager"
    )


def test_label_sets() -> None:
    assert DataSettings().label_set().scored == DataSettings().label_set().labels[:-1]
    four = DataSettings(labels=["Angry", "Happy", "Neutral", "Calm"], scored_labels=["Angry", "Calm"]).label_set()
    assert four.majority == ("Neutral", "Happy", "Angry")
    assert four.minority == ("Calm",)
    with pytest.raises(CorpusError, match="Sad"):
        DataSettings(labels=["Angry"], scored_labels=["Sad"]).label_set()


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_bundled_recipes_resolve_and_the_resolved_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    settings = resolve(load_recipe(name), {"output_dir": str(tmp_path / "out"), "lr_scheduler_kwargs": {"a": 1}})
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(settings))
    again = resolve(load_recipe(path))
    for part in ("model", "data", "augmentation", "objective", "given"):
        assert getattr(again, part) == getattr(settings, part)
    assert to_yaml(again) == to_yaml(settings)
    assert path.read_text().count("max_seconds:") == 1


def test_a_secret_is_used_and_not_written() -> None:
    settings = resolve(MINIMAL, {"hub_token": "hf_secret"})
    assert settings.training.hub_token == "hf_secret"
    assert "secret" not in to_yaml(settings)


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_bundled_recipes_say_what_they_are_and_set_known_corpus_options(name: str) -> None:
    from sailer.data.corpora import corpus_options

    recipe = load_recipe(name)
    assert bundled_recipes()[name].read_text().startswith("# ")
    assert set(recipe["corpus_options"]) <= set(corpus_options(recipe["corpus"]))
    assert recipe["output_dir"] == f"outputs/{name}"


def test_help_names_every_option_of_ours_with_its_default() -> None:
    text = option_help()
    assert "--cache_features  one of 'off', 'memory', 'disk', default 'off'" in text
    assert "--heads  list[str], default [primary, secondary, attributes]" in text
    for part in ("mixing_probability", "focal_gamma", "audio_backbone", "SailerTrainingArguments"):
        assert part in text
