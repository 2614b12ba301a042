"""A flat recipe (YAML) and command-line options go in; out come the dataclasses that set each part of the main job.

YAML 1.2 is read and written by ruamel.yaml, values are converted by pydantic, help is read by docstring_parser.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

if TYPE_CHECKING:
    from sailer.data.augmentation import AugmentationSettings
    from sailer.data.schema import LabelSet
    from sailer.training.arguments import SailerTrainingArguments
    from sailer.training.losses import ObjectiveSettings

RECIPES = Path(__file__).parent / "recipes"
HEADS = ("primary", "secondary", "attributes", "sex", "age")
LORA_OPTIONS = (
    *(f"{tower}_lora_{name}" for tower in ("audio", "text") for name in ("rank", "targets", "layers")),
    *("lora_alpha", "lora_dropout", "use_dora", "use_rslora", "save_merged"),
)
# Training arguments that no file may hold: a resolved recipe is saved, shown and pushed.
SECRETS = ("hub_token",)


class SettingsError(ValueError):
    """A recipe or option that cannot be used; the message names it, where it came from and the way out."""


@dataclass
class ModelSettings:
    """The system to build: backbones, pooling and heads.

    Args:
        audio_backbone: Hub id or folder of the speech encoder; "tiny-whisper", "tiny-wavlm", "tiny-hubert",
            "tiny-wav2vec2", "tiny-wav2vec2-bert" and "tiny-emotion2vec" are made locally, with random weights.
            Required unless `base_model` is given.
        text_backbone: Hub id or folder of the text encoder, "tiny-text", or null for a speech-only system.
        audio_backbone_id, text_backbone_id: Hub id of what a backbone's folder copies, for the card: license, origin.
        base_model: SAILER checkpoint to start from; its architecture then stands in for everything else here.
        tiny: put the tiny backbone of the same family in the place of each backbone, all else being as it is: a trial
            of a recipe in minutes, whose figures say nothing.
        audio_layers: "last" state, "weighted" sum of all, "weighted_norm" (each normalised), "concat_norm" (no sum).
        hidden_size: filters of the convolutions and width of the heads.
        conv_dropout: dropout between the convolutions.
        frame_pooling: speech frames that are averaged into one before the convolutions (the paper has 1).
        frame_norm: batch-normalise the speech frames before the convolutions (not the paper's).
        discriminant_share: of a linear discriminant, fitted after training, in the logits; null: base_model's.
        heads: outputs to train, of "primary", "secondary", "attributes", "sex", "age".
        freeze_audio, freeze_text: leave that tower as it was loaded.
        trainable_audio_layers: of a speech encoder that is not frozen, so many layers, from its output; null for all.
        audio_lora_rank, text_lora_rank: train LoRA of this rank in that tower, which stays frozen; null for none.
        audio_lora_targets, text_lora_targets: what gets LoRA: "feed_forward" (the default), "attention", or how the
            names of linear layers end.
        audio_lora_layers, text_lora_layers: in so many layers only, counted from the output; null for all.
        lora_alpha: LoRA counts lora_alpha / rank times; null for the rank itself.
        lora_dropout: dropout before LoRA's first matrix.
        use_dora: train the length of each column apart from its direction (https://arxiv.org/abs/2402.09353).
        use_rslora: divide by the root of the rank instead, for high ranks (https://arxiv.org/abs/2312.03732).
        save_merged: save a system with LoRA whole, its adapters in a folder in it; false saves adapters alone.
        max_seconds: longest audio that is heard; the rest is cut in training.
        trim_silence: in dB: do not hear silence around the speech, so much below the loudest; null hears it.
        attn_implementation: attention kernel as transformers names them; null lets transformers choose.

    Raises:
        SettingsError: no backbone, an unknown or repeated head, or `tiny` where there is nothing to put in its place.
    """

    audio_backbone: str | None = None
    text_backbone: str | None = None
    audio_backbone_id: str | None = None
    text_backbone_id: str | None = None
    base_model: str | None = None
    tiny: bool = False
    audio_layers: Literal["last", "weighted", "weighted_norm", "concat_norm"] = "last"
    hidden_size: int = 256
    conv_dropout: float = 0.1
    frame_pooling: int = 1
    frame_norm: bool = False
    discriminant_share: float | None = None
    heads: list[str] = field(default_factory=lambda: ["primary", "secondary", "attributes"])
    freeze_audio: bool = True
    freeze_text: bool = True
    trainable_audio_layers: int | None = None
    audio_lora_rank: int | None = None
    text_lora_rank: int | None = None
    audio_lora_targets: list[str] | None = None
    text_lora_targets: list[str] | None = None
    audio_lora_layers: int | None = None
    text_lora_layers: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    save_merged: bool = True
    max_seconds: float = 15.0
    trim_silence: float | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if not (self.audio_backbone or self.base_model):
            raise SettingsError("No model to train: name a speech encoder (audio_backbone) or a base_model.")
        unknown = [head for head in self.heads if head not in HEADS]
        if unknown or not self.heads or len(set(self.heads)) != len(self.heads):
            raise SettingsError(f"heads is {self.heads}; name each wanted head once, of {list(HEADS)}.")
        if self.tiny:
            self._take_tiny_backbones()

    def config_options(self) -> dict[str, Any]:
        """Options for `from_audio_text_pretrained`, without the backbones."""
        skipped = {"audio_backbone", "text_backbone", "base_model", "tiny", *LORA_OPTIONS}
        skipped |= {"audio_backbone_id", "text_backbone_id", "trim_silence"}
        options = {name: value for name, value in dataclasses.asdict(self).items() if name not in skipped}
        options |= {f"{tower}_lora": lora for tower, lora in self.lora().items()}
        unset = [name for name in ("attn_implementation", "discriminant_share") if options[name] is None]
        return {name: value for name, value in options.items() if name not in unset}

    def _take_tiny_backbones(self) -> None:
        from sailer.training.tiny_backbones import tiny_stand_in

        if self.base_model:
            raise SettingsError(
                f"tiny is for backbones, and base_model {self.base_model!r} is a whole system: leave one of them out."
            )
        for option in ("audio_backbone", "text_backbone"):
            backbone = getattr(self, option)
            if backbone is not None:
                try:
                    setattr(self, option, tiny_stand_in(backbone))
                except ValueError as error:
                    raise SettingsError(f"tiny, {option}: {error}") from error

    def lora(self) -> dict[str, dict[str, Any]]:
        """LoRA of each tower ("audio", "text") that gets some, as `SailerConfig` takes it."""
        common = {"alpha": self.lora_alpha, "dropout": self.lora_dropout}
        common |= {"use_dora": self.use_dora, "use_rslora": self.use_rslora}
        found = {}
        for tower in ("audio", "text"):
            own = {name: getattr(self, f"{tower}_lora_{name}") for name in ("rank", "targets", "layers")}
            if own["targets"] is None:
                del own["targets"]
            if own["rank"] is not None:
                found[tower] = own | common
        return found


@dataclass
class DataSettings:
    """The corpus, its label set and splits, and how frozen features are kept.

    Args:
        corpus: name known to `sailer.data.load_corpus`.
        data_dir: the corpus's folder; null for a corpus that makes itself.
        corpus_options: further options of that corpus's loader (or one by one: `--corpus_options.NAME VALUE`).
        corpus_license: license of a corpus that the package does not know, as the Hub calls it ("cc-by-4.0"; "other"
            for terms of its own), for the model card.
        corpus_languages: languages of such a corpus, as two letters ("en").
        labels, majority_labels, scored_labels: the label set; null for the nine of MSP-Podcast, for those of its
            majority classes that occur among the labels, and for all labels but Other.
        streaming: hear the training clips of the corpus "hub" as they are streamed; their annotations are read before.
        streaming_buffer: clips that wait in each process to be drawn from.
        train_split, validation_split: splits to train and to select on.
        test_splits: splits to test on; null for all whose name begins with "test".
        cache_features: keep a frozen speech encoder's hidden states "off", in "memory" or on "disk".
        feature_cache_dir, feature_dtype: where on disk (null: below the output folder), and in what precision.
        preview: write so many augmented clips and their targets before training.
        shuffled_label_baseline: train the system a second time on shuffled labels, to show what chance gives.
        seeds: train one system with each of these seeds, "0,1,2", in folders of their own, and sum them up.
    """

    corpus: str = "synthetic"
    data_dir: str | None = None
    corpus_options: dict[str, Any] = field(default_factory=dict)
    corpus_license: str | None = None
    corpus_languages: list[str] | None = None
    labels: list[str] | None = None
    majority_labels: list[str] | None = None
    scored_labels: list[str] | None = None
    streaming: bool = False
    streaming_buffer: int = 1000
    train_split: str = "train"
    validation_split: str = "validation"
    test_splits: list[str] | None = None
    cache_features: Literal["off", "memory", "disk"] = "off"
    feature_cache_dir: str | None = None
    feature_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    preview: int = 0
    shuffled_label_baseline: bool = False
    seeds: list[int] | None = None

    def is_test_split(self, name: str) -> bool:
        """Whether the system is tested on the split of this name."""
        return name.startswith("test") if self.test_splits is None else name in self.test_splits

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


@dataclass(frozen=True)
class OptionDescription:
    """An option as help and documentation show it: its part ("model", ...), and its default as YAML has it."""

    part: str
    name: str
    type: str
    default: str
    help: str


def bundled_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_recipe(name_or_path: str | Path) -> dict[str, Any]:
    """Options of a recipe: a YAML file, or the name of a bundled one ("demo", "demo.yaml" or "recipes/demo.yaml").

    A recipe with `extend: RECIPE` holds what differs from that one: a file beside it, or a bundled one. One key of a
    mapping is changed by `option.key`.

    Raises:
        SettingsError: no such recipe (lists the bundled ones), not YAML, not a mapping of options, or one that extends
            itself or a missing one.
    """
    path, line = _recipe_file(Path(name_or_path)), []
    recipe = _read_recipe(path)
    while "extend" in recipe:
        line.append(path)
        base, wanted = recipe.pop("extend"), path
        if not isinstance(base, str):
            raise SettingsError(f"Recipe {path}: extend is {base!r}; name one recipe.")
        beside = path.parent / base
        try:
            path = _recipe_file(beside if beside.is_file() else Path(base))
        except SettingsError as error:
            raise SettingsError(f"Recipe {wanted} extends {base!r}: {error}") from error
        if any(path.samefile(earlier) for earlier in line):
            raise SettingsError(
                f"Recipe {line[0]} extends itself: {' -> '.join(file.name for file in [*line, path])}."
            )
        recipe = _changed(_read_recipe(path), recipe)
    return recipe


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Options from a command line: `--option value`, `--option=value`, `--option v1 v2` (a list) or `--option` (true).

    Values are read as YAML; dashes in an option's name count as underscores; of a repeated option the last counts.

    Raises:
        SettingsError: a value before the first option, or one that is not YAML.
    """
    given: dict[str, list[Any]] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, text = argument[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = [_parse_value(name, text)] if equals else []
        elif name is None:
            raise SettingsError(f"Unexpected argument {argument!r}: options are given as --option value.")
        else:
            given[name].append(_parse_value(name, argument))
    return {name: True if not values else values[0] if len(values) == 1 else values for name, values in given.items()}


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
        SettingsError: an unknown option (names the nearest known one), a value of the wrong type, a training argument
            that is not honoured (with the reason), or options that contradict each other; the message names where the
            option came from.
    """
    from sailer.training.arguments import refusal
    from sailer.training.checks import check_settings

    parts = _parts()
    known = {name: hint for part in parts.values() for name, hint in _options(part).items()}
    values: dict[str, Any] = {}
    for source, options in ((origin, recipe), ("command line", overrides or {})):
        for name, value in options.items():
            option, dot, key = name.partition(".")
            if option not in known:
                nearest = difflib.get_close_matches(option, known, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else "`sailer train --help` lists the options."
                raise SettingsError(f"Unknown option {option!r} ({source}): {hint}")
            if dot:
                if not isinstance(values.get(option, {}), dict):
                    raise SettingsError(f"Option {name!r} ({source}): {option} is not a mapping.")
                value = values.get(option, {}) | {key: value}
            told = f"Option {option!r} ({source}) is {'a secret' if option in SECRETS else repr(value)}"
            if reason := refusal(option, value):
                raise SettingsError(f"{told}: {reason}")
            try:
                values[option] = _converted(value, known[option])
            except ValueError as error:
                raise SettingsError(f"{told}, expected {_describe(known[option])}.") from error
    built = {
        name: part(**{option: values[option] for option in _options(part) if option in values})
        for name, part in parts.items()
    }
    training = _options(parts["training"])
    settings = Settings(**built, given={name: value for name, value in values.items() if name in training})
    check_settings(settings)
    return settings


def to_yaml(settings: Settings) -> str:
    """The recipe as resolved: all options of ours and the training arguments that were named. It reads back equal."""
    text, written = "# The recipe as resolved; run it again with: sailer train THIS_FILE\n", {*SECRETS}
    for part in ("model", "data", "augmentation", "objective", "training"):
        options = settings.given if part == "training" else dataclasses.asdict(getattr(settings, part))
        options = {name: value for name, value in options.items() if name not in written}
        text += f"\n# {part}\n" + (_in_yaml(options) if options else "")
        written |= set(options)
    return text


def option_descriptions() -> list[OptionDescription]:
    """Every option that the main job honours, by part, those first that the part's own docstring explains.

    Arguments that SailerTrainingArguments leaves as they are have transformers' text.
    """
    from docstring_parser import google

    from sailer.training.arguments import NOT_IN_THE_MAIN_JOB, default_of

    found = []
    for part, kind in _parts().items():
        entries = google.parse(kind.__doc__ or "").params
        texts = {name: entry.description for entry in entries for name in entry.arg_name.split(", ")}
        items = {item.name: item for item in dataclasses.fields(kind)}
        bases = filter(dataclasses.is_dataclass, kind.__mro__[1:])
        inherited = {item.name: item.metadata.get("help", "") for base in bases for item in dataclasses.fields(base)}
        shown = {name: hint for name, hint in _options(kind).items() if name not in {*NOT_IN_THE_MAIN_JOB, *SECRETS}}
        for name in sorted(shown, key=lambda name: name not in texts):
            text = " ".join((texts.get(name) or inherited[name].replace("%%", "%")).split())
            default = default_of(items[name])
            written = repr(default) if isinstance(default, str) else _in_yaml([default], flow=True)[1:-2]
            found.append(OptionDescription(part, name, _describe(shown[name]), written, text))
    return found


def option_help() -> str:
    """Every option with its type, default and text, by part, for `sailer train --help`."""
    text, described = "", option_descriptions()
    for part, kind in _parts().items():
        text += f"{part} ({kind.__name__}):\n"
        for option in (option for option in described if option.part == part):
            text += f"  --{option.name}  {option.type}, default {option.default}\n"
            text += textwrap.fill(option.help, 106, initial_indent=" " * 6, subsequent_indent=" " * 6) + "\n"
    return text


def _recipe_file(path: Path) -> Path:
    if path.is_file():
        return path
    bundled = bundled_recipes()
    named = path.name.removesuffix(".yaml") if path.parent in (Path(), Path("recipes")) else None
    if named not in bundled:
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise SettingsError(f"Recipe {path} {kind}; name a YAML file or one of {', '.join(bundled)}.")
    return bundled[named]


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = _yaml().load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        reason = f"{error.problem}\n{error.problem_mark}" if isinstance(error, MarkedYAMLError) else error
        raise SettingsError(f"Recipe {path} is not YAML: {reason}") from error
    if not isinstance(recipe, dict) or not all(isinstance(name, str) for name in recipe):
        raise SettingsError(f"Recipe {path} is not a list of 'option: value' lines.")
    return recipe


def _changed(recipe: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with some of its options, or keys of its mappings, changed."""
    for name, value in changes.items():
        option, dot, key = name.partition(".")
        if dot and isinstance(recipe.get(option), dict):
            recipe[option] = recipe[option] | {key: value}
        else:  # what sets a whole mapping undoes what was set of its keys
            recipe = {other: kept for other, kept in recipe.items() if dot or not other.startswith(f"{name}.")}
            recipe[name] = value
    return recipe


def _parts() -> dict[str, type]:
    # Imported here because they bring torch and transformers, which reading or listing recipes does not need.
    from sailer.data.augmentation import AugmentationSettings
    from sailer.training.arguments import SailerTrainingArguments
    from sailer.training.losses import ObjectiveSettings

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


def _parse_value(name: str, text: str) -> Any:
    try:
        value = _yaml().load(text)
    except YAMLError as error:
        raise SettingsError(f"The value of --{name} is not YAML: {text!r}; put it in quotes.") from error
    # A number that is written otherwise than Python would (010, 1_000) may be a name: the option's type decides.
    plain = isinstance(value, int | float) and str(value) == text
    return value if plain or value is None or isinstance(value, bool | list | dict) else text


def _converted(value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` asks for; ValueError where something would be lost or guessed."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    adapter = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))
    try:
        converted = adapter.validate_python(value)
    except ValidationError:
        try:
            converted = adapter.validate_python([value])  # one value stands for a list of it
        except ValidationError:  # and a text of numbers for a list of those
            converted = adapter.validate_python(value.split(",") if isinstance(value, str) else value)
    if isinstance(value, bool) != isinstance(converted, bool):
        raise ValueError("true is not 1")
    return converted


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(hint))
    return re.sub(r"\w+\.", "", str(hint)) if typing.get_args(hint) else getattr(hint, "__name__", str(hint))


def _yaml() -> YAML:
    """YAML 1.2: 5e-4 is a number, `no` and `off` are words, and no option stands twice."""
    return YAML(typ="safe", pure=True)


def _in_yaml(value: Any, flow: bool = False) -> str:
    yaml, text = _yaml(), StringIO()
    yaml.default_flow_style, yaml.width = flow, 1000 if flow else 119
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # whose own default is None
    yaml.dump(value, text)
    return text.getvalue()
