import dataclasses
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sailer.data.schema import CorpusError
from sailer.settings import (
    SECRETS,
    DataSettings,
    ModelSettings,
    SettingsError,
    _parts,
    bundled_recipes,
    load_recipe,
    option_descriptions,
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--corpus_options.clips", "3", "--corpus_options.name=x"], {"corpus_options": {"clips": 3, "name": "x"}}),
        (["--corpus_options", "{a: b}", "--corpus_options.c", "1"], {"corpus_options": {"a": "b", "c": 1}}),
        (["--labels", "[Angry, Happy]"], {"labels": ["Angry", "Happy"]}),
        (["--labels", "Angry", "Happy"], {"labels": ["Angry", "Happy"]}),
        (["--labels=Angry"], {"labels": ["Angry"]}),
        (["--shuffled_label_baseline"], {"shuffled_label_baseline": True}),
        (["--shuffled-label-baseline", "true"], {"shuffled_label_baseline": True}),
        (["--preview=3", "--data_dir", "2024-01-01"], {"preview": 3, "data_dir": "2024-01-01"}),
    ],
)
def test_what_the_command_line_says_reaches_the_settings(words: list[str], expected: dict) -> None:
    data = resolve(MINIMAL, parse_overrides(words)).data
    assert {name: getattr(data, name) for name in expected} == expected


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


def test_recipes_are_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("cache_features: off\nfeature_dtype: no\nlearning_rate: 5e-4\nrun_name: 1:30\nbf16: True\n")
    expected = {
        "cache_features": "off",
        "feature_dtype": "no",
        "learning_rate": 5e-4,
        "run_name": "1:30",
        "bf16": True,
    }
    assert load_recipe(path) == expected


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
        ("seed: 1\nseed: 2\n", 'duplicate key "seed".*line 2'),
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
        ("freeze_audio", "no", "bool"),
        ("annotation_dropout", "much", "float | bool"),
        ("lr_scheduler_type", ["a"], "SchedulerType | str"),
        ("corpus", ["a"], "str"),
        ("corpus_options", "clips", "dict[str, Any]"),
        ("test_splits", {"a": 1}, "list[str] | None"),
        ("cache_features", "tape", "one of 'off', 'memory', 'disk'"),
        ("objective", "hinge", "one of 'kl', 'soft_ce', 'ce', 'focal', 'distil'"),
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
        (MINIMAL | {"gradient_checkpointing": True}, "is true but every backbone is frozen, where it saves nothing"),
        (MINIMAL | {"cache_features": "memory", "torch_compile": True}, "do not run in training. Leave one of"),
        (MINIMAL | {"trainable_audio_layers": 2}, "freeze_audio is true: set it to false"),
        (MINIMAL | {"backbone_learning_rate": 1e-5}, "every backbone is frozen"),
        (MINIMAL | {"backbone_learning_rate": 1e-5, "freeze_text": False}, "every backbone is frozen"),
        (MINIMAL | {"text_dropout": 0.1}, "no text encoder"),
        (MINIMAL | {"neftune_noise_alpha": 5}, "no text encoder trains"),
        (MINIMAL | {"neftune_noise_alpha": 5, "text_backbone": "tiny-text"}, "no text encoder trains"),
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


def test_a_resolved_recipe_has_the_options_in_their_order_and_by_part() -> None:
    text = to_yaml(resolve(MINIMAL, {"seed": 3, "bf16": False, "corpus_options.b": 1, "corpus_options.a": 2}))
    names = [item.name for part in list(_parts().values())[:-1] for item in dataclasses.fields(part)]
    assert re.findall(r"^(\w+):", text, re.MULTILINE) == [*dict.fromkeys(names), "seed", "bf16"]
    assert re.findall(r"^# (\w+)$", text, re.MULTILINE) == list(_parts())
    assert "corpus_options:\n  b: 1\n  a: 2\n" in text


def test_words_that_look_like_something_else_read_back_equal(tmp_path: Path) -> None:
    words = ["5e-4", "010", "off", "no", "true", "null", "1:30", "2024-01-01", "a: b", "#x", "", "~", "1_000"]
    settings = resolve(
        MINIMAL | {"data_dir": "off", "test_splits": words, "corpus_options": dict.fromkeys(words, 1e-5)}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(settings), encoding="utf-8")
    assert resolve(load_recipe(path)).data == settings.data


def test_a_secret_is_refused_with_the_reason_and_not_shown() -> None:
    with pytest.raises(
        SettingsError, match=r"'hub_token' \(command line\) is a secret: a command line or recipe is no place"
    ) as refused:
        resolve(MINIMAL, {"hub_token": "hf_mine"})
    assert "hf_mine" not in str(refused.value)


@pytest.mark.parametrize("name", sorted(bundled_recipes()))
def test_bundled_recipes_say_what_they_are_and_set_known_corpus_options(name: str) -> None:
    from sailer.data.corpora import corpus_options

    recipe = load_recipe(name)
    assert bundled_recipes()[name].read_text().startswith("# ")
    assert set(recipe["corpus_options"]) <= set(corpus_options(recipe["corpus"]))
    assert recipe["output_dir"] == f"outputs/{name}"


def test_every_option_is_described_in_the_docstring_of_its_part() -> None:
    described = {(option.part, option.name): option for option in option_descriptions()}
    assert all(option.help for option in described.values())
    for part, kind in _parts().items():
        names = {item.name for item in dataclasses.fields(kind)}
        shown = {name for section, name in described if section == part}
        assert shown <= names
        if part != "training":
            assert shown == names
    assert {part for part, _ in described} == set(_parts())


def test_an_entry_of_several_options_describes_each() -> None:
    texts = {option.name: option.help for option in option_descriptions()}
    assert texts["freeze_audio"] == texts["freeze_text"] == "leave that tower as it was loaded."
    assert texts["labels"] == texts["majority_labels"] == texts["scored_labels"]
    assert texts["labels"].startswith("the label set; null for the nine of MSP-Podcast")
    assert texts["train_split"] == texts["validation_split"] == "splits to train and to select on."


def test_training_arguments_of_ours_come_first_and_those_of_transformers_have_its_text() -> None:
    training = [option for option in option_descriptions() if option.part == "training"]
    names = [option.name for option in training]
    assert names.index("backbone_learning_rate") < names.index("adam_beta1")
    texts = {option.name: option.help for option in training}
    assert texts["backbone_learning_rate"].startswith("that of towers that are fine-tuned")
    field = dataclasses.fields(_parts()["training"].__base__)[names.index("output_dir")]
    assert field.name == "output_dir" and texts["output_dir"] != field.metadata["help"]
    assert "weight decay" in texts["weight_decay"].lower() and "%%" not in "".join(texts.values())
    assert not {"hub_revision", "label_smoothing_factor", "hub_token"} & set(names)


def test_a_described_default_is_yaml_that_reads_back_equal() -> None:
    read = YAML(typ="safe", pure=True)
    for part, kind in _parts().items():
        defaults = {
            item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            for item in dataclasses.fields(kind)
        }
        for option in (option for option in option_descriptions() if option.part == part):
            assert read.load(option.default) == defaults[option.name], option


def test_help_names_every_option_of_ours_with_its_default() -> None:
    text = option_help()
    assert "--cache_features  one of 'off', 'memory', 'disk', default 'off'" in text
    assert "--heads  list[str], default [primary, secondary, attributes]" in text
    for part in ("mixing_probability", "focal_gamma", "audio_backbone", "SailerTrainingArguments"):
        assert part in text
    assert "--max_seconds  float, default 15.0\n      longest audio that is heard;" in text
    assert "--max_seconds  float, default 15.0\n      longest training clip, mixes included.\n" in text
    assert "--lr_scheduler_type  SchedulerType | str, default 'linear'" in text
    assert re.findall(r"^\w+", text, re.MULTILINE) == ["model", "data", "augmentation", "objective", "training"]
    assert max(map(len, text.splitlines())) <= 119


# For every training argument that the main job refuses, a value that would do nothing or harm.
REFUSED = {
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "dataloader_drop_last": True,
    "debug": "underflow_overflow",
    "deepspeed": "zero.json",
    "do_eval": True,
    "do_predict": True,
    "do_train": True,
    "enable_jit_checkpoint": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "fp16_full_eval": True,
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2},
    "hub_always_push": True,
    "hub_revision": "main",
    "hub_strategy": "every_save",
    "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": "all",
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "duration",
    "liger_kernel_config": {"rope": True},
    "optim_target_modules": ["fc1"],
    "parallelism_config": {"tp_size": 2},
    "prediction_loss_only": True,
    "remove_unused_columns": True,
    "use_cache": True,
    "use_liger_kernel": True,
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_training_argument_that_is_not_honoured_is_refused_with_the_reason(name: str) -> None:
    from sailer.training.arguments import NOT_IN_THE_MAIN_JOB

    field = _parts()["training"].__dataclass_fields__.get(name)
    if field is None:
        pytest.skip("this transformers has no such argument")
    message = f"Option '{name}' (recipe mine) is {REFUSED[name]!r}: {NOT_IN_THE_MAIN_JOB[name]}"
    with pytest.raises(SettingsError, match=re.escape(message)):
        resolve(MINIMAL | {name: REFUSED[name]}, origin="recipe mine")
    with pytest.raises(SettingsError, match=re.escape(message.replace("recipe mine", "command line"))):
        resolve(MINIMAL, {name: REFUSED[name]})
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    resolve(MINIMAL, {name: default})  # it says what holds anyway


def test_every_refusal_is_tested() -> None:
    from sailer.training.arguments import NOT_IN_THE_MAIN_JOB

    assert {*REFUSED, *SECRETS} == set(NOT_IN_THE_MAIN_JOB)  # for a secret see above
