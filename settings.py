"""A flat recipe (YAML) and command-line options go in; out come the dataclasses that set each part of the main job."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

if TYPE_CHECKING:
    from sailer.data.augmentation import AugmentationSettings
    from sailer.data.schema import LabelSet
    from sailer.training.losses import ObjectiveSettings
    from sailer.training.trainer import SailerTrainingArguments

RECIPES = Path(__file__).parent / "recipes"
HEADS = ("primary", "secondary", "attributes", "sex", "age")
# Training arguments that no file may hold: a resolved recipe is saved, shown and pushed.
SECRETS = ("hub_token",)


class SettingsError(ValueError):
    """A recipe or option that cannot be used; the message names it, where it came from and the way out."""


@dataclass
class ModelSettings:
    """The system to build: backbones, pooling and heads.

    Args:
        audio_backbone: Hub id or folder of the speech encoder; "tiny-whisper" and "tiny-wavlm" are made locally, with
            random weights. Required unless `base_model` is given.
        text_backbone: Hub id or folder of the text encoder, "tiny-text", or null for a speech-only system.
        base_model: SAILER checkpoint to start from; its architecture then stands in for everything else here.
        audio_layers: "last" hidden state, "weighted" sum of all, or "weighted_norm" (each layer-normalised first).
        hidden_size: filters of the convolutions and width of the heads.
        conv_dropout: dropout between the convolutions.
        frame_pooling: speech frames that are averaged into one before the convolutions (the paper has 1).
        frame_norm: batch-normalise the speech frames before the convolutions (not the paper's).
        heads: outputs to train, of "primary", "secondary", "attributes", "sex", "age".
        freeze_audio, freeze_text: leave that tower as it was loaded.
        trainable_audio_layers: of a speech encoder that is not frozen, train only so many layers, counted from its
            output; null trains all of it.
        max_seconds: longest audio that is heard; the rest is cut in training.
        attn_implementation: attention kernel as transformers names them; null lets transformers choose.

    Raises:
        SettingsError: no backbone, or an unknown or repeated head.
    """

    audio_backbone: str | None = None
    text_backbone: str | None = None
    base_model: str | None = None
    audio_layers: Literal["last", "weighted", "weighted_norm"] = "last"
    hidden_size: int = 256
    conv_dropout: float = 0.1
    frame_pooling: int = 1
    frame_norm: bool = False
    heads: list[str] = field(default_factory=lambda: ["primary", "secondary", "attributes"])
    freeze_audio: bool = True
    freeze_text: bool = True
    trainable_audio_layers: int | None = None
    max_seconds: float = 15.0
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if not (self.audio_backbone or self.base_model):
            raise SettingsError(
                "No model to train: name a speech encoder (audio_backbone) or a checkpoint (base_model)."
            )
        unknown = [head for head in self.heads if head not in HEADS]
        if unknown or not self.heads or len(set(self.heads)) != len(self.heads):
            raise SettingsError(f"heads is {self.heads}; name each wanted head once, of {list(HEADS)}.")

    def config_options(self) -> dict[str, Any]:
        """Options for `from_audio_text_pretrained`, without the backbones."""
        skipped = {"audio_backbone", "text_backbone", "base_model"}
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in skipped}
        if self.attn_implementation is None:
            del options["attn_implementation"]
        return options


@dataclass
class DataSettings:
    """The corpus, its label set and splits, and how frozen features are kept.

    Args:
        corpus: name known to `sailer.data.load_corpus`.
        data_dir: the corpus's folder; null for a corpus that makes itself.
        corpus_options: further options of that corpus's loader (or one by one: `--corpus_options.NAME VALUE`).
        labels, majority_labels, scored_labels: the label set; null for the nine of MSP-Podcast, for those of its
            majority classes that occur among the labels, and for all labels but Other.
        train_split, validation_split: splits to train and to select on.
        test_splits: splits to test on; null for all whose name begins with "test".
        cache_features: keep a frozen speech encoder's hidden states "off", in "memory" or on "disk".
        feature_cache_dir: where on disk; null for a folder below the output folder.
        feature_dtype: precision of the states that are kept.
        preview: write so many augmented clips and their targets before training.
        shuffled_label_baseline: train the system a second time on shuffled labels, to show what chance gives.
    """

    corpus: str = "synthetic"
    data_dir: str | None = None
    corpus_options: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    majority_labels: list[str] | None = None
    scored_labels: list[str] | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    test_splits: list[str] | None = None
    cache_features: Literal["off", "memory", "disk"] = "off"
    feature_cache_dir: str | None = None
    feature_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    preview: int = 0
    shuffled_label_baseline: bool = False

    def label_set(self) -> LabelSet:
        """The primary label set.

        Raises:
            sailer.data.schema.CorpusError: the three lists contradict each other.
        """
        from sailer.data.schema import MAJORITY_LABELS, PRIMARY_LABELS, LabelSet

        labels = self.labels or PRIMARY_LABELS
        majority = self.majority_labels
        if majority is None:
            majority = [label for label in MAJORITY_LABELS if label in labels]
        return LabelSet(tuple(labels), tuple(majority), self.scored_labels)


@dataclass
class Settings:
    """Everything that sets the main job; `given` holds the training arguments that were named, converted."""

    model: ModelSettings
    data: DataSettings
    augmentation: AugmentationSettings
    objective: ObjectiveSettings
    training: SailerTrainingArguments
    given: dict[str, Any]


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """Options of a recipe: a YAML file, or the name of a bundled one ("demo", "demo.yaml" or "recipes/demo.yaml").

    Raises:
        SettingsError: no such recipe (lists the bundled ones), not YAML, or not a mapping of options.
    """
    path = Path(name_or_path)
    if not path.is_file():
        bundled = bundled_recipes()
        named = path.name.removesuffix(".yaml") if path.parent in (Path(), Path("recipes")) else None
        if named not in bundled:
            kind = "is a folder" if path.is_dir() else "does not exist"
            raise SettingsError(f"Recipe {name_or_path} {kind}; name a YAML file or one of {', '.join(bundled)}.")
        path = bundled[named]
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"Recipe {path} is not YAML: {error}") from error
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise SettingsError(f"Recipe {path} is not a list of 'option: value' lines.")
    return recipe


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Options from a command line: `--option value`, `--option=value`, `--option v1 v2` (a list) or `--option` (true).

    Values are read as YAML; dashes in an option's name count as underscores; of a repeated option the last counts.

    Raises:
        SettingsError: a value before the first option, or one that is not YAML.
    """
    given: dict[str, list[str]] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if equals else []
        elif name is None:
            raise SettingsError(f"Unexpected argument {argument!r}: options are given as --option value.")
        else:
            given[name].append(argument)
    parsed = {name: [_parse_value(name, text) for text in texts] for name, texts in given.items()}
    return {name: True if not values else values[0] if len(values) == 1 else values for name, values in parsed.items()}


def resolve(
    recipe: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, origin: str = "recipe"
) -> Settings:
    """The settings that a recipe and the overrides on top of it amount to.

    Each option is a field of ModelSettings, DataSettings, AugmentationSettings, ObjectiveSettings or
    SailerTrainingArguments; one that several of them have is given to each. Values are converted to the field's type
    where nothing is lost ("5e-4" is a float). An override named `option.key` sets one key of a mapping.

    Args:
        recipe: options by name, as `load_recipe` returns them.
        overrides: further options, as `parse_overrides` returns them.
        origin: what error messages call the recipe.

    Raises:
        SettingsError: an unknown option (names the nearest known one), a value of the wrong type, or options that
            contradict each other; the message names where the option came from.
    """
    parts = _parts()
    known = {name: hint for part in parts.values() for name, hint in _options(part).items()}
    values: dict[str, Any] = {}
    for source, options in ((origin, recipe), ("command line", overrides or {})):
        for name, value in options.items():
            option, dot, key = name.partition(".")
            if option not in known:
                raise SettingsError(_unknown_option(option, known, source))
            if dot:
                if not isinstance(values.get(option, {}), dict):
                    raise SettingsError(f"Option {name!r} ({source}): {option} is not a mapping.")
                value = values.get(option, {}) | {key: value}
            try:
                values[option] = _coerce(value, known[option])
            except (TypeError, ValueError) as error:
                raise SettingsError(
                    f"Option {option!r} ({source}) is {value!r}, expected {_describe(known[option])}."
                ) from error
    built = {
        name: part(**{option: values[option] for option in _options(part) if option in values})
        for name, part in parts.items()
    }
    training = _options(parts["training"])
    settings = Settings(**built, given={name: value for name, value in values.items() if name in training})
    _check(settings)
    return settings


def to_yaml(settings: Settings) -> str:
    """The recipe as resolved: all options of ours and the training arguments that were named. It reads back equal."""
    text, written = "# The recipe as resolved; run it again with: sailer train THIS_FILE\n", set()
    for name in ("model", "data", "augmentation", "objective"):
        options = dataclasses.asdict(getattr(settings, name))
        text += _section(name, {option: value for option, value in options.items() if option not in written})
        written |= set(options)
    training = {name: value for name, value in settings.given.items() if name not in {*written, *SECRETS}}
    return text + _section("training", training)


def option_help() -> str:
    """Every option of ours with its type and default, by part, for `sailer train --help`."""
    text = ""
    for name, part in _parts().items():
        if name == "training":
            return (
                text + "training: every field of SailerTrainingArguments (transformers.TrainingArguments and ours)\n"
            )
        text += f"{name}:\n"
        for item in dataclasses.fields(part):
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            text += f"  --{item.name}  {_describe(_options(part)[item.name])}, default {_in_yaml(default)}\n"
    return text


class _RecipeLoader(yaml.SafeLoader):
    """Safe YAML in which 5e-4 is a number, `no` and `off` are words, and no option stands twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        repeated = sorted({key for key in keys if isinstance(key, str) and keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"{repeated} given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parts() -> dict[str, type]:
    # Imported here because they bring torch and transformers, which reading or listing recipes does not need.
    from sailer.data.augmentation import AugmentationSettings
    from sailer.training.losses import ObjectiveSettings
    from sailer.training.trainer import SailerTrainingArguments

    return {
        "model": ModelSettings,
        "data": DataSettings,
        "augmentation": AugmentationSettings,
        "objective": ObjectiveSettings,
        "training": SailerTrainingArguments,
    }


def _options(part: type) -> dict[str, Any]:
    hints = typing.get_type_hints(part)
    return {item.name: hints[item.name] for item in dataclasses.fields(part) if item.init}


def _check(settings: Settings) -> None:
    model, data = settings.model, settings.data
    if data.cache_features != "off" and not model.freeze_audio:
        raise SettingsError(
            f"cache_features is {data.cache_features!r} but freeze_audio is false: only a frozen encoder's states "
            "can be kept. Set cache_features to off, or freeze_audio to true."
        )
    if model.trainable_audio_layers is not None and model.freeze_audio:
        raise SettingsError(
            f"trainable_audio_layers is {model.trainable_audio_layers} but freeze_audio is true: set it to false, or "
            "leave trainable_audio_layers out."
        )
    frozen = model.freeze_audio and (model.freeze_text or not model.text_backbone)
    if settings.training.backbone_learning_rate is not None and frozen and not model.base_model:
        raise SettingsError(
            "backbone_learning_rate is set but every backbone is frozen: set freeze_audio (or freeze_text) to false, "
            "or leave it out."
        )
    if settings.augmentation.text_dropout and not (model.text_backbone or model.base_model):
        raise SettingsError(
            "text_dropout is set but the system has no text encoder: set text_backbone, or text_dropout to 0."
        )


def _unknown_option(name: str, known: Mapping[str, Any], source: str) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "`sailer train --help` lists the options."
    return f"Unknown option {name!r} ({source}): {hint}"


def _parse_value(name: str, text: str) -> Any:
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise SettingsError(f"The value of --{name} is not YAML: {text!r}; put it in quotes.") from error
    # A number that is written otherwise than Python would (010, 1_000) may be a name: the option's type decides.
    return value if isinstance(value, (bool, list, dict)) or value is None or str(value) == text else text


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` asks for; TypeError or ValueError where something would be lost or guessed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if type(value) in arguments:
            return value
        for argument in arguments:
            try:
                return _coerce(value, argument)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if origin is Literal:
        return arguments[arguments.index(value)]
    if origin in (list, tuple, Sequence):
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        item = arguments[0] if arguments else Any
        converted = [_coerce(one, item) for one in values]
        return tuple(converted) if origin is tuple else converted
    expected = origin or hint
    if expected in (int, float, str):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError
        converted = expected(value)
        if isinstance(value, float) and expected is int and converted != value:
            raise ValueError
        return converted
    if expected in (bool, dict, types.NoneType) and not isinstance(value, expected):
        raise TypeError
    return value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


def _in_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _section(name: str, options: Mapping[str, Any]) -> str:
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    return f"\n# {name}\n" + (yaml.safe_dump(plain, sort_keys=False, width=119) if plain else "")
