"""The system that a recipe trains: a new one on its backbones, or a checkpoint to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoFeatureExtractor, AutoTokenizer

from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor
from sailer.data import LabelSet
from sailer.data.atomic import replacing_folder
from sailer.discriminant_sailer import without_discriminant
from sailer.settings import ModelSettings
from sailer.training import tiny_backbones


def load_system(
    model_settings: ModelSettings, label_set: LabelSet, audio: str | Path | None, text: str | Path | None
) -> tuple[SailerForAudioClassification, SailerProcessor]:
    """A new system on two backbones, or the base model that the settings name.

    Of a base model what the settings do not freeze trains, though it was frozen there; what they freeze, which is the
    default, is as it has it. Neither has a discriminant, which is fitted after training.

    Raises:
        ValueError: a base model of other labels, or of fewer layers than are to be trained.
    """
    if model_settings.base_model:
        config = SailerConfig.from_pretrained(model_settings.base_model, **thawed(model_settings))
        model = SailerForAudioClassification.from_pretrained(model_settings.base_model, config=config)
        if model.config.labels != list(label_set.labels):
            raise ValueError(
                f"Base model {model_settings.base_model} has the labels {model.config.labels} and the recipe "
                f"{list(label_set.labels)}: name the same labels in the same order."
            )
        if lora := model_settings.lora():
            model.add_lora(**lora, source=model_settings.base_model)
        if model_settings.discriminant_share is not None:
            model.config.discriminant_share = model_settings.discriminant_share
        without_discriminant(model)
        return model, SailerProcessor.from_pretrained(model_settings.base_model)
    assert audio is not None, "ModelSettings has a backbone where it has no base model"
    model = SailerForAudioClassification.from_audio_text_pretrained(
        audio,
        text,
        labels=label_set.labels,
        majority_labels=label_set.majority,
        scored_labels=label_set.scored,
        **model_settings.config_options(),
    )
    without_discriminant(model)
    tokenizer = None if text is None else AutoTokenizer.from_pretrained(text, trust_remote_code=False)
    extractor = AutoFeatureExtractor.from_pretrained(audio, trust_remote_code=False)
    return model, SailerProcessor(extractor, tokenizer, trim_silence=model_settings.trim_silence)


def thawed(model_settings: ModelSettings) -> dict[str, Any]:
    """Options of a configuration that the settings do not freeze."""
    options: dict[str, Any] = {}
    if not model_settings.freeze_audio:
        options |= {"freeze_audio": False, "trainable_audio_layers": model_settings.trainable_audio_layers}
    if not model_settings.freeze_text:
        options["freeze_text"] = False
    return options


def local_backbone(name: str | None, folder: Path, train_rows: Dataset) -> str | Path | None:
    """`name`, or for one of the tiny backbones the folder below `folder` where it is, made there if it is not yet."""
    if name is None or name not in tiny_backbones.TINY:
        return name
    place = folder / name
    if not place.is_dir():
        texts = {"texts": train_rows["transcript"]} if name == "tiny-text" else {}
        with replacing_folder(place) as beside:
            tiny_backbones.TINY[name](beside, **texts)
    return place
