"""SailerConfig: two backbones, the fusion head's shape, the label set, and what the scores mean (paper, section 2)."""

import copy
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

PRIMARY_LABELS = ("Angry", "Contempt", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise", "Other")
MAJORITY_LABELS = ("Neutral", "Happy", "Sad", "Angry")
SECONDARY_LABELS = (
    *("Angry", "Sad", "Happy", "Amused", "Neutral", "Frustrated", "Depressed", "Surprise", "Concerned", "Disgust"),
    *("Disappointed", "Excited", "Confused", "Annoyed", "Fear", "Contempt", "Other"),
)
ATTRIBUTES = ("arousal", "valence", "dominance")
SEX_LABELS = ("female", "male")
HEADS = ("primary", "secondary", "attributes", "sex", "age")
AUDIO_LAYERS = ("last", "weighted", "weighted_norm")
TARGET_WEIGHTINGS = ("none", "product", "normalized")

AUTO_MAP = {
    "AutoConfig": "configuration_sailer.SailerConfig",
    "AutoModel": "modeling_sailer.SailerModel",
    "AutoModelForAudioClassification": "modeling_sailer.SailerForAudioClassification",
    "AutoProcessor": "processing_sailer.SailerProcessor",
}
CUSTOM_PIPELINES = {
    "audio-classification": {
        "impl": "pipeline_sailer.SpeechEmotionPipeline",
        "pt": ["AutoModelForAudioClassification"],
        "type": "multimodal",
    }
}


class SailerConfig(PretrainedConfig):
    r"""
    Configuration of a SAILER system.

    Args:
        audio_config (`PretrainedConfig` or `dict`): the speech encoder's configuration (Whisper, WavLM, ...).
        text_config (`PretrainedConfig` or `dict`, *optional*): the text encoder's; `None` for a speech-only system.
        audio_layers (`str`, defaults to `"last"`): `"last"` hidden state, `"weighted"` sum of all hidden states, or
            `"weighted_norm"` (each layer-normalised first).
        hidden_size (`int`, defaults to 256): filters of the 1x1 convolutions and width of each MLP's hidden layer.
        conv_dropout (`float`, defaults to 0.1): dropout between the convolutions.
        frame_pooling (`int`, defaults to 1): speech frames that are averaged into one before the convolutions (the
            paper's convolutions see every frame).
        frame_norm (`bool`, defaults to `False`): batch-normalise the speech frames before the convolutions (not the
            paper's).
        heads (sequence of `str`): outputs to build, of `"primary"`, `"secondary"`, `"attributes"`, `"sex"`, `"age"`.
        freeze_audio, freeze_text (`bool`, default to `True`): whether the towers stay as they were loaded.
        labels (sequence of `str`, *optional*): primary emotions; the nine of MSP-Podcast by default (or `id2label`).
        trainable_audio_layers (`int`, *optional*): where the audio tower is not frozen, train only so many of its
            transformer layers, counted from the output; all else of it stays as it was loaded. `None` trains it all.
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
        text_dropout (`float`, defaults to 0.0): share of training clips whose transcript was withheld; above zero the
            system may be run on speech alone.

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
        text_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.audio_config = _sub_config("audio_config", audio_config)
        self.text_config = _sub_config("text_config", text_config)
        self.audio_layers = audio_layers
        self.hidden_size = hidden_size
        self.conv_dropout = conv_dropout
        self.frame_pooling = frame_pooling
        self.frame_norm = frame_norm
        self.heads = [head for head in HEADS if head in heads]
        self.freeze_audio = freeze_audio
        self.freeze_text = freeze_text
        self.trainable_audio_layers = trainable_audio_layers
        self.attend_to_padding = attend_to_padding
        self.secondary_labels = list(secondary_labels)
        self.sex_labels = list(sex_labels)
        self.max_seconds = max_seconds
        self.sampling_rate = sampling_rate
        self.target_weighting = target_weighting
        self.label_weights = None if label_weights is None else [float(value) for value in label_weights]
        self.label_prior = None if label_prior is None else [float(value) for value in label_prior]
        self.calibration_temperature = calibration_temperature
        self.text_dropout = text_dropout

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
        self._check(heads, names)

        # Always this folder's own code: a name that a loader prefixed with a repository must not be saved again.
        kwargs["auto_map"] = dict(AUTO_MAP)
        kwargs["custom_pipelines"] = {task: dict(spec) for task, spec in CUSTOM_PIPELINES.items()}
        super().__init__(**kwargs)

    @property
    def labels(self) -> list[str]:
        """Primary labels in the order of the logits."""
        return [self.id2label[i] for i in range(len(self.id2label))]

    def _check(self, heads: Sequence[str], names: list[str]) -> None:
        for option, value, allowed in (
            ("audio_layers", [self.audio_layers], AUDIO_LAYERS),
            ("target_weighting", [self.target_weighting], TARGET_WEIGHTINGS),
            ("heads", heads, HEADS),
            ("majority_labels", self.majority_labels, names),
            ("scored_labels", self.scored_labels, names),
        ):
            unknown = [item for item in value if item not in allowed]
            if unknown:
                raise ValueError(f"{option}: unknown {unknown}; choose from {list(allowed)}.")
        if not self.heads:
            raise ValueError(f"heads is empty: a system needs at least one of {list(HEADS)}.")
        if len(set(names)) != len(names):
            raise ValueError(f"labels name a class twice: {names}.")
        for option in ("label_weights", "label_prior"):
            value = getattr(self, option)
            if value is not None and len(value) != len(names):
                raise ValueError(f"{option} has {len(value)} values for {len(names)} labels {names}.")
        if not isinstance(self.frame_pooling, int) or self.frame_pooling < 1:
            raise ValueError(f"frame_pooling is a whole number from 1, got {self.frame_pooling!r}.")
        self._check_trainable_layers()
        if not self.calibration_temperature > 0:
            raise ValueError(f"calibration_temperature must be positive, got {self.calibration_temperature}.")

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


def _sub_config(name: str, config: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig | None:
    if config is None or isinstance(config, PretrainedConfig):
        # A copy: a system's configuration hands its attention implementation, as yet undecided, down to its parts,
        # and a loaded tower that shared its own would go on without its masks.
        return copy.deepcopy(config)
    config = dict(config)
    if "model_type" not in config:
        raise ValueError(f"{name} has no model_type; pass the backbone's configuration or its to_dict().")
    return AutoConfig.for_model(config.pop("model_type"), **config)


SailerConfig.register_for_auto_class()

__all__ = ["SailerConfig"]
