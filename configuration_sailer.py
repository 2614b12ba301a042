"""SailerConfig: two backbones, the fusion head's shape, the label set, and what the scores mean (paper, section 2)."""

import copy
import inspect
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from .adapters_sailer import HUB_OPTIONS, checked_lora, moved_backbones  # noqa: F401 - others take HUB_OPTIONS here
from .encoders_emotion2vec import Emotion2VecConfig  # noqa: F401 - so that "emotion2vec" is a model type that is known
from .linear_sailer import ONEDNN_LINEAR
from .windows_sailer import check_conformal

PRIMARY_LABELS = ("Angry", "Contempt", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise", "Other")
MAJORITY_LABELS = ("Neutral", "Happy", "Sad", "Angry")
SECONDARY_LABELS = (
    *("Angry", "Sad", "Happy", "Amused", "Neutral", "Frustrated", "Depressed", "Surprise", "Concerned", "Disgust"),
    *("Disappointed", "Excited", "Confused", "Annoyed", "Fear", "Contempt", "Other"),
)
ATTRIBUTES = ("arousal", "valence", "dominance")
SEX_LABELS = ("female", "male")
HEADS = ("primary", "secondary", "attributes", "sex", "age")
AUDIO_LAYERS = ("last", "weighted", "weighted_norm", "concat_norm")
TARGET_WEIGHTINGS = ("none", "product", "normalized")
# Options that name the labels, and what holds for one label set alone.
NAMING_LABELS = ("labels", "id2label", "label2id", "num_labels")
OF_THE_LABELS = (
    *("majority_labels", "scored_labels", "label_weights", "label_prior"),
    *("target_weighting", "calibration_temperature", "conformal", "speaker_reference", "discriminant_share"),
)

AUTO_MAP = {
    "AutoConfig": "configuration_sailer.SailerConfig",
    "AutoModel": "modeling_sailer.SailerModel",
    "AutoModelForAudioClassification": "modeling_sailer.SailerForAudioClassification",
    "AutoProcessor": "processing_sailer.SailerProcessor",
}
# What whoever loads a saved system needs, as the package itself asks for it (setup.cfg).
REQUIREMENTS: tuple[str, ...] = ("torch>=2.6", "transformers>=5.17,<6", "numpy>=2.0", "safetensors>=0.8")
REQUIREMENTS += ("soundfile>=0.13", "soxr>=0.5")
PUSH_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
# Of a backbone's configuration, where it has them: whole numbers from 1.
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "encoder_ffn_dim"),
    *("vocab_size", "num_mel_bins", "max_source_positions"),
)
CUSTOM_PIPELINES = {
    "audio-classification": {
        "impl": "pipeline_sailer.SpeechEmotionPipeline",
        "pt": ["AutoModelForAudioClassification"],
        "type": "multimodal",
    }
}
COMBINE = ("probabilities", "logits", "stacked")
SUBFOLDER = re.compile(r"\w[\w.-]*")
ENSEMBLE_AUTO_MAP = {
    "AutoConfig": "configuration_sailer.SailerEnsembleConfig",
    "AutoModelForAudioClassification": "ensemble_sailer.SailerEnsemble",
    "AutoProcessor": "processing_sailer.SailerEnsembleProcessor",
}


class SailerConfig(PretrainedConfig):
    r"""
    Configuration of a SAILER system.

    Args:
        audio_config (`PretrainedConfig` or `dict`): the speech encoder's configuration (Whisper, WavLM, ...).
        text_config (`PretrainedConfig` or `dict`, *optional*): the text encoder's; `None` for a speech-only system.
        audio_layers (`str`, defaults to `"last"`): `"last"` hidden state, `"weighted"` sum of all hidden states,
            `"weighted_norm"` (each layer-normalised first) or `"concat_norm"` (these side by side, not summed).
        hidden_size (`int`, defaults to 256): filters of the 1x1 convolutions and width of each MLP's hidden layer.
        conv_dropout (`float`, defaults to 0.1): dropout between the convolutions.
        frame_pooling (`int`, defaults to 1): speech frames averaged into one before the convolutions (paper: none).
        frame_norm (`bool`, defaults to `False`): batch-normalise speech frames before the convolutions (paper: no).
        heads (sequence of `str`): outputs to build, of `"primary"`, `"secondary"`, `"attributes"`, `"sex"`, `"age"`.
        freeze_audio, freeze_text (`bool`, default to `True`): whether the towers stay as they were loaded.
        labels (sequence of `str`, *optional*): primary emotions; the nine of MSP-Podcast by default (or `id2label`).
        trainable_audio_layers (`int`, *optional*): where the audio tower is not frozen, train only so many of its
            transformer layers, counted from the output; all else of it stays as it was loaded. `None` trains it all.
        audio_lora, text_lora (`dict`, *optional*): LoRA in a frozen tower: `rank`, any of `DEFAULTS`.
        backbones (`dict`, *optional*): of a system that is saved as adapters, `source` of each frozen tower's weights.
        attend_to_padding (`bool`, defaults to `False`): whether the audio encoder sees the padding, as the authors'
            released Whisper models do; pooling never does.
        majority_labels, scored_labels (sequences of `str`, *optional*): subsets of the labels; scored are by default
            all but "Other". Decisions are taken among the scored classes.
        secondary_labels (sequence of `str`): names of the secondary head's outputs.
        sex_labels (sequence of `str`): names of the speaker-sex head's two outputs.
        max_seconds (`float`, defaults to 15.0): longest audio the system was trained on.
        sampling_rate (`int`, defaults to 16000): of the waveforms, in Hz.
        target_weighting (`str`, defaults to `"none"`): how targets were weighted in training, for the record.
        label_weights (list of `float`, *optional*): the weights w for which softmax(logits) approaches
            d * w / sum(d * w), scaled so that the mean clip weight is 1; `None` where nothing was weighted.
        label_prior (list of `float`, *optional*): q, the mean of all training clips' vote distributions.
        calibration_temperature (`float`, defaults to 1.0): divides the logits of the natural prior; fitted on
            validation data.
        conformal (`dict`, *optional*): scores of calibration clips, from which prediction sets of any coverage are
            made (`windows_sailer.prediction_set`); fitted on validation data.
        text_dropout (`float`, defaults to 0.0): share of training clips whose transcript was withheld; above zero the
            system may be run on speech alone.
        onednn_linear (`str`, defaults to `"auto"`): whether the towers' float32 products on a CPU are done by oneDNN:
            `"on"`, `"off"`, or `"auto"`, where that was measured to be faster than torch's own choice. It is of the
            machine, not of the system: it is not saved, and the environment's SAILER_ONEDNN says what `"auto"` means.
        speaker_reference (`bool`, defaults to `False`): whether the weights hold the mean voice, for `adapt`.
        discriminant_share (`float`, defaults to 0.0): share of a fitted linear discriminant's scores in the logits.

    Raises:
        ValueError: an option outside its range, or a label list that contradicts another; the message names it.
    """

    model_type = "sailer"
    sub_configs = {"audio_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        audio_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        audio_layers: str = "last",
        hidden_size: int = 256,
        conv_dropout: float = 0.1,
        frame_pooling: int = 1,
        frame_norm: bool = False,
        heads: Sequence[str] = ("primary", "secondary", "attributes"),
        freeze_audio: bool = True,
        freeze_text: bool = True,
        trainable_audio_layers: int | None = None,
        audio_lora: Mapping[str, Any] | None = None,
        text_lora: Mapping[str, Any] | None = None,
        backbones: Mapping[str, Any] | None = None,
        attend_to_padding: bool = False,
        labels: Sequence[str] | None = None,
        majority_labels: Sequence[str] | None = None,
        scored_labels: Sequence[str] | None = None,
        secondary_labels: Sequence[str] = SECONDARY_LABELS,
        sex_labels: Sequence[str] = SEX_LABELS,
        max_seconds: float = 15.0,
        sampling_rate: int = 16000,
        target_weighting: str = "none",
        label_weights: Sequence[float] | None = None,
        label_prior: Sequence[float] | None = None,
        calibration_temperature: float = 1.0,
        conformal: Mapping[str, Any] | None = None,
        text_dropout: float = 0.0,
        onednn_linear: str = "auto",
        speaker_reference: bool = False,
        discriminant_share: float = 0.0,
        **kwargs: Any,
    ) -> None:
        lists = {"heads": heads, "labels": labels, "majority_labels": majority_labels, "scored_labels": scored_labels}
        lists |= {"secondary_labels": secondary_labels, "sex_labels": sex_labels}
        for option, value in lists.items():
            if isinstance(value, str) or not isinstance(value, Sequence | None):
                raise ValueError(f"{option} is {value!r}; give a list of names.")
        self.audio_config = _sub_config("audio_config", audio_config)
        self.text_config = _sub_config("text_config", text_config)
        self.audio_layers = audio_layers
        self.hidden_size = hidden_size
        self.conv_dropout = conv_dropout
        self.frame_pooling, self.frame_norm = frame_pooling, frame_norm
        self.heads = [head for head in HEADS if head in heads]
        self.freeze_audio, self.freeze_text = freeze_audio, freeze_text
        self.trainable_audio_layers = trainable_audio_layers
        self.audio_lora, self.text_lora, self.backbones = audio_lora, text_lora, backbones
        self.attend_to_padding = attend_to_padding
        self.secondary_labels = list(secondary_labels)
        self.sex_labels = list(sex_labels)
        self.max_seconds, self.sampling_rate = max_seconds, sampling_rate
        self.target_weighting = target_weighting
        self.label_weights = _shares("label_weights", label_weights)
        self.label_prior = _shares("label_prior", label_prior)
        self.calibration_temperature = calibration_temperature
        self.text_dropout = text_dropout
        self.onednn_linear, self.speaker_reference = onednn_linear, speaker_reference
        self.discriminant_share = discriminant_share

        if labels is not None:
            kwargs["id2label"] = dict(enumerate(labels))
        elif kwargs.get("id2label") is None:
            number = kwargs.get("num_labels", len(PRIMARY_LABELS))
            default = PRIMARY_LABELS if number == len(PRIMARY_LABELS) else [f"LABEL_{i}" for i in range(number)]
            kwargs["id2label"] = dict(enumerate(default))
        kwargs["id2label"] = {int(key): value for key, value in kwargs["id2label"].items()}
        kwargs["label2id"] = {label: key for key, label in kwargs["id2label"].items()}
        names = list(kwargs["id2label"].values())
        self.majority_labels = list(
            majority_labels if majority_labels is not None else [x for x in MAJORITY_LABELS if x in names]
        )
        self.scored_labels = list(scored_labels if scored_labels is not None else [x for x in names if x != "Other"])
        self.conformal = check_conformal(conformal, names)
        self._check_numbers()
        self._check(heads, names)

        # Always this folder's own code: a name that a loader prefixed with a repository must not be saved again.
        kwargs["auto_map"] = dict(AUTO_MAP)
        kwargs["custom_pipelines"] = {task: dict(spec) for task, spec in CUSTOM_PIPELINES.items()}
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'. Labels that are given (`labels`, `id2label` or `num_labels`) replace the saved ones, and
        with them all that held for those alone: scored and majority labels, weights, prior and temperature.

        Raises:
            ValueError: they contradict each other, or an option is out of its range.
        """
        naming = {name: kwargs.pop(name) for name in NAMING_LABELS if kwargs.get(name) is not None}
        config_dict = _relabelled(config_dict, naming) if naming else dict(config_dict)
        if kwargs.get("backbones"):
            kwargs["backbones"] = moved_backbones(config_dict.get("backbones"), kwargs["backbones"])
        for option in set(kwargs) & set(inspect.signature(cls.__init__).parameters) - {"kwargs", *cls.sub_configs}:
            config_dict[option] = kwargs.pop(option)  # through the constructor, which checks them
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As transformers', without what is of the machine."""
        return {name: value for name, value in super().to_dict().items() if name != "onednn_linear"}

    @property
    def labels(self) -> list[str]:
        """Primary labels in the order of the logits."""
        names: Mapping[Any, str] = self.id2label or {}
        return [names[i] for i in range(len(names))]

    def _check(self, heads: Sequence[str], names: list[str]) -> None:
        for option, value, allowed in (
            ("audio_layers", [self.audio_layers], AUDIO_LAYERS),
            ("onednn_linear", [self.onednn_linear], ONEDNN_LINEAR),
            ("target_weighting", [self.target_weighting], TARGET_WEIGHTINGS),
            ("heads", heads, HEADS),
        ):
            unknown = [item for item in value if item not in allowed]
            if unknown:
                raise ValueError(f"{option}: unknown {unknown}; choose from {list(allowed)}.")
        if len(self.sex_labels) != 2:
            raise ValueError(f"sex_labels names {len(self.sex_labels)} classes {self.sex_labels}; the head has two.")
        if not self.secondary_labels:
            raise ValueError("secondary_labels is empty; leave it out for the seventeen of MSP-Podcast.")
        if not self.heads:
            raise ValueError(f"heads is empty: a system needs at least one of {list(HEADS)}.")
        self.check_labels(names)
        self._check_trainable_layers()
        self.audio_lora = checked_lora("audio", self.audio_lora, self.freeze_audio)
        self.text_lora = checked_lora("text", self.text_lora, self.freeze_text, self.text_config is not None)

    def _check_numbers(self) -> None:
        for option in ("hidden_size", "frame_pooling", "sampling_rate"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{option} is a whole number from 1, got {value!r}.")
        for option in ("max_seconds", "calibration_temperature"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{option} must be positive and finite, got {value!r}.")
        for option in ("conv_dropout", "text_dropout", "discriminant_share"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{option} is a share from 0 to 1, got {value!r}.")
        for option in ("frame_norm", "freeze_audio", "freeze_text", "attend_to_padding"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"{option} is true or false, got {getattr(self, option)!r}.")

    def check_labels(self, names: list[str] | None = None) -> None:
        """See that all that depends on the labels fits them, also where `id2label` was set on the object.

        Args:
            names: the labels; those of the configuration by default.

        Raises:
            ValueError: a class is named twice, or an option speaks of other labels; the message names both.
        """
        names = self.labels if names is None else names
        if len(set(names)) != len(names):
            raise ValueError(f"labels name a class twice: {names}.")
        advice = "name them with labels= when the configuration is made or loaded"
        for option in ("majority_labels", "scored_labels"):
            unknown = [label for label in getattr(self, option) if label not in names]
            if unknown:
                raise ValueError(f"{option}: unknown {unknown}; the labels are {names}. If those are new, {advice}.")
        for option in ("label_weights", "label_prior"):
            value = getattr(self, option)
            if value is not None and len(value) != len(names):
                raise ValueError(
                    f"{option} has {len(value)} values for {len(names)} labels {names}. If those are new, {advice}."
                )

    def _check_trainable_layers(self) -> None:
        trainable = self.trainable_audio_layers
        if trainable is None:
            return
        if self.freeze_audio:
            raise ValueError(
                f"trainable_audio_layers is {trainable!r} but freeze_audio is true, so that no layer trains: set "
                "freeze_audio to false, or leave trainable_audio_layers out."
            )
        layers = getattr(self.audio_config, "num_hidden_layers", None)
        if not isinstance(trainable, int) or trainable < 1 or (layers is not None and trainable > layers):
            there = "" if layers is None else f" to {layers}, which this encoder has"
            raise ValueError(f"trainable_audio_layers is a whole number from 1{there}; got {trainable!r}.")


class SailerEnsembleConfig(SailerConfig):
    r"""
    Configuration of an ensemble: where its members are, and how their outputs become one.

    Args:
        members (list of `dict`): of each member `name`; `subfolder`, or `repo_id` and `revision`; `heads`; and which
            of the processor's inputs it reads: `audio_input`, and `text_input` (`None`: it reads no transcripts).
        combine (`str`, defaults to `"probabilities"`): the primary emotions are the mean of the members'
            `"probabilities"`, the softmax of the mean of their `"logits"`, or `"stacked"`: a logistic regression on
            their log probabilities. Of all other outputs the plain mean is taken, over the members that have them.
        kwargs: as `SailerConfig` takes them, for what the members have in common: labels, scored classes, heads.
            `max_seconds` is the shortest of the members', `text_dropout` the least. `calibration_temperature`
            divides the logarithm of the combined natural probabilities; `label_weights` are those of a stacked
            ensemble's regression.

    Raises:
        ValueError: an unknown `combine`, or a member whose place is not named or leads out of the folder.
    """

    model_type = "sailer_ensemble"

    def __init__(
        self, members: Sequence[Mapping[str, Any]] = (), combine: str = "probabilities", **kwargs: Any
    ) -> None:
        if combine not in COMBINE:
            raise ValueError(f"combine is {combine!r}; choose one of {list(COMBINE)}.")
        self.members = [dict(member) for member in members]
        self.combine = combine
        for index, member in enumerate(self.members):
            _check_place(index, member)
        super().__init__(**kwargs)
        self.auto_map = dict(ENSEMBLE_AUTO_MAP)

    def having(self, head: str) -> list[int]:
        """Positions of the members that have a head."""
        return [index for index, member in enumerate(self.members) if head in member["heads"]]

    def check_member(self, name: str, own: SailerConfig, heads: Sequence[str]) -> None:
        """See that a member's configuration fits; `heads` are those that the ensemble takes of it.

        Raises:
            ValueError: other labels, or a head that is not there; the message names the member.
        """
        for option, head in (("labels", "primary"), ("secondary_labels", "secondary"), ("sex_labels", "sex")):
            theirs, ours = getattr(own, option), getattr(self, option)
            if (head in heads or head == "primary") and theirs != ours:
                way = "" if head == "primary" else f", or leave the {head} head out (heads=)"
                raise ValueError(f"{name} has the {option} {theirs}, the ensemble {ours}: members must agree{way}.")
        if set(own.scored_labels) != set(self.scored_labels):
            raise ValueError(
                f"{name} decides among {own.scored_labels}, the ensemble among {self.scored_labels}: members must "
                "agree."
            )
        lost = [head for head in heads if head not in own.heads]
        if lost:
            raise ValueError(f"{name} has no {lost[0]} head, which the ensemble needs: it has only {own.heads}.")


def place_of(source: str | os.PathLike, index: int) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Folder or Hub id ("user/name@revision") of a system, what finds it, and its entry in an ensemble's `members`."""
    source = os.fspath(source)
    place, _, revision = (source, "", "") if os.path.isdir(source) else source.partition("@")
    entry = {"name": os.path.basename(os.path.normpath(place)), "subfolder": f"member_{index}"}
    return place, ({"revision": revision} if revision else {}), entry


def load_member(
    classes: Mapping[str, Any],
    ensemble: Any,
    index: int,
    member: Mapping[str, Any],
    located: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> Any:
    """What `load_part` gives of a member, from its subfolder of an ensemble or from the Hub."""
    _check_place(index, member)
    name = f"Member {index} ({member.get('name')}) of {ensemble}"
    if "repo_id" in member:
        there = {option: value for option, value in located.items() if option != "subfolder"}
        return load_part(
            classes, member["repo_id"], there | {"revision": member.get("revision") or "main"}, options, name
        )
    below = "/".join(filter(None, [located.get("subfolder"), member["subfolder"]]))
    return load_part(classes, ensemble, {**located, "subfolder": below}, options, name)


def load_part(
    classes: Mapping[str, Any],
    source: str | os.PathLike,
    located: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Any:
    """A system's model or processor, by one of our own classes: never by code that lies beside it.

    Args:
        classes: model_type of a config.json -> class with `from_pretrained`.
        source, located: where it is: a folder or Hub id, and options such as `revision` and `subfolder`.
        options: further ones of `from_pretrained`.
        name: what errors call it; by default the source.

    Raises:
        OSError: it is not there, or not whole.
        ValueError: it is of another kind, or cannot be used.
    """
    name = str(source) if name is None else name
    try:
        settings = PretrainedConfig.get_config_dict(source, **located)[0]
        if not settings:
            raise OSError("there is no config.json.")
        kind = str(settings.get("model_type"))
        if kind not in classes:
            raise ValueError(f"it is a {kind!r} model, expected {' or '.join(sorted(classes))}.")
        return classes[kind].from_pretrained(source, **located, **(options or {}))
    except OSError as error:
        raise OSError(f"{name} is not in its place, or not whole: {error}") from error
    except ValueError as error:
        if name in str(error):
            raise
        raise ValueError(f"{name}: {error}") from error


def take_push_options(save_directory: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """Of the options of a `save_pretrained(push_to_hub=True)`, taken out of them: what `push_to_hub` is called with.

    transformers' own uploads before all of our files are written: here saving comes first, and pushing after it.
    """
    push = {name: options.pop(name) for name in PUSH_OPTIONS if name in options}
    return {"repo_id": os.path.basename(os.path.abspath(save_directory))} | push


def _check_place(index: int, member: Mapping[str, Any]) -> None:
    place = member.get("subfolder", member.get("repo_id"))
    if not isinstance(place, str) or ("subfolder" in member and not SUBFOLDER.fullmatch(place)):
        raise ValueError(f"Member {index} is at {place!r}: name a subfolder of the ensemble, or a repo_id.")


def _relabelled(saved: dict[str, Any], naming: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with the labels that `naming` gives by any of `NAMING_LABELS`."""
    before = [label for _, label in sorted((int(key), label) for key, label in saved.get("id2label", {}).items())]
    number, labels = naming.get("num_labels"), naming.get("labels")
    if labels is None and "id2label" in naming:
        labels = [label for _, label in sorted((int(key), label) for key, label in naming["id2label"].items())]
    if labels is None and "label2id" in naming:
        labels = sorted(naming["label2id"], key=naming["label2id"].__getitem__)
    if labels is None:
        labels = before if number == len(before) else [f"LABEL_{index}" for index in range(number or 0)]
    if number is not None and number != len(labels):
        raise ValueError(f"num_labels is {number} but {len(labels)} labels are named: {list(labels)}.")
    if list(labels) == before:
        return dict(saved)
    dropped = {*OF_THE_LABELS, *NAMING_LABELS}
    return {name: value for name, value in saved.items() if name not in dropped} | {"labels": list(labels)}


def _shares(option: str, values: Sequence[float] | None) -> list[float] | None:
    if values is None:
        return None
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option} is {values!r}; give a list of numbers, one per label.") from error
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(f"{option} is {numbers}; every value must be finite and 0 or more.")
    return numbers


def _sub_config(name: str, config: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig | None:
    if config is None:
        return None
    if isinstance(config, PretrainedConfig):
        # A copy: a system's configuration hands its attention implementation, as yet undecided, down to its parts,
        # and a loaded tower that shared its own would go on without its masks.
        config = copy.deepcopy(config)
    else:
        if not isinstance(config, Mapping) or not isinstance(config.get("model_type"), str):
            raise ValueError(f"{name} has no model_type; pass the backbone's configuration or its to_dict().")
        config = dict(config)
        try:
            config = AutoConfig.for_model(config.pop("model_type"), **config)
        except StrictDataclassError as error:
            raise ValueError(f"{name}: {' '.join(str(error).split())}") from error
    for size in SIZES:
        value = getattr(config, size, None)
        if isinstance(value, int) and value < 1:  # other types are refused above
            raise ValueError(f"{name}: {config.attribute_map.get(size, size)} is {value!r}, a whole number from 1.")
    return config


SailerConfig.register_for_auto_class()
SailerEnsembleConfig.register_for_auto_class()

__all__ = ["SailerConfig", "SailerEnsembleConfig"]
