"""What would fail late, or do nothing in silence, is refused before the first clip is read."""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig, SchedulerType, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from sailer.adapters_sailer import checked_lora
from sailer.configuration_sailer import SEX_LABELS, SailerConfig
from sailer.data.corpora import about_corpus
from sailer.data.labels import distribution
from sailer.data.schema import ATTRIBUTES, SECONDARY_LABELS, CorpusError, LabelSet
from sailer.hub.origins import LICENSES
from sailer.layers_sailer import NORMALIZED_LAYERS
from sailer.settings import LORA_OPTIONS, DataSettings, ModelSettings, Settings, SettingsError
from sailer.training.checkpoints import check_whole, digest_of_rows
from sailer.training.losses import COMPONENTS, ObjectiveSettings, SailerObjective
from sailer.training.mixup import UNPOOLED
from sailer.training.tiny_backbones import TINY

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from sailer.training.arguments import SailerTrainingArguments
    from sailer.training.watch import Watch

# The least value of each option that is a number of something, and whether it may be that value.
LEAST: dict[str, tuple[float, bool]] = {
    "hidden_size": (1, True),
    "frame_pooling": (1, True),
    "trainable_audio_layers": (1, True),
    "conv_dropout": (0, True),
    "trim_silence": (0, False),
    "preview": (0, True),
    "streaming_buffer": (1, True),
    "gradient_accumulation_steps": (1, True),
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "dataloader_num_workers": (0, True),
    "learning_rate": (0, False),
    "weight_decay": (0, True),
    "data_seed": (0, True),
    "save_steps": (0, False),
    "eval_steps": (0, False),
}


def check_settings(settings: Settings) -> None:
    """Refuse options that contradict each other, or that nothing can be done with.

    Raises:
        SettingsError: names the option and the way out.
    """
    model, data, training = settings.model, settings.data, settings.training
    _check_numbers(settings)
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
    if settings.objective.objective == "distil" and "primary" not in model.heads and not model.base_model:
        raise SettingsError("objective is 'distil', which teaches primary emotions: add primary to heads.")
    _check_discriminant(settings)
    _check_lora(settings)
    frozen = model.freeze_audio and (model.freeze_text or not model.text_backbone) and not model.lora()
    if training.backbone_learning_rate is not None and frozen and not model.base_model:
        raise SettingsError(
            "backbone_learning_rate is set but every backbone is frozen: set freeze_audio (or freeze_text) to false, "
            "or leave it out."
        )
    if training.torch_compile and data.cache_features != "off" and frozen and not model.base_model:
        raise SettingsError(
            f"torch_compile is true but cache_features is {data.cache_features!r}: the encoders, whose layers are "
            "compiled, do not run in training. Leave one of them out."
        )
    if training.gradient_checkpointing and frozen and not model.base_model:
        raise SettingsError(
            "gradient_checkpointing is true but every backbone is frozen, where it saves nothing: set freeze_audio "
            "(or freeze_text) to false, or leave it out."
        )
    trains_text = model.base_model or (model.text_backbone and not model.freeze_text)
    if training.neftune_noise_alpha and not trains_text:
        raise SettingsError(
            "neftune_noise_alpha is set but no text encoder trains: set text_backbone, and freeze_text to false, or "
            "leave it out."
        )
    if settings.augmentation.text_dropout and not (model.text_backbone or model.base_model):
        raise SettingsError(
            "text_dropout is set but the system has no text encoder: set text_backbone, or text_dropout to 0."
        )
    if settings.augmentation.state_mixup and not model.base_model:
        if data.cache_features == "off" or (model.text_backbone and not model.freeze_text):
            raise SettingsError(
                f"state_mixup is {settings.augmentation.state_mixup:g} but not every tower's states are kept: set "
                "cache_features, with freeze_text true, or manifold_mixup in its place."
            )
        if model.audio_layers in NORMALIZED_LAYERS and model.frame_pooling == 1:
            raise SettingsError(UNPOOLED)
    _check_splits(settings)
    _check_corpus_facts(settings.data)
    if data.streaming:
        _check_streaming(settings)


def _check_streaming(settings: Settings) -> None:
    """Refuse what needs clips in another order than they are streamed in."""
    data, training, mixing = settings.data, settings.training, settings.augmentation.mixing_probability
    if data.corpus != "hub" or not data.data_dir:
        raise SettingsError(
            f"streaming is true and corpus is {data.corpus!r}: only datasets of the corpus 'hub' are streamed, named "
            "by data_dir. Leave streaming out."
        )
    reasons = {
        f"mixing_probability is {mixing:g}": mixing > 0,
        f"cache_features is {data.cache_features!r}": data.cache_features != "off",
        "train_sampling_strategy is 'group_by_length'": training.train_sampling_strategy == "group_by_length",
        f"preview is {data.preview}": data.preview > 0,
        f"discriminant_share is {settings.model.discriminant_share}": settings.model.discriminant_share,
        "objective is 'distil'": settings.objective.objective == "distil",  # the teacher hears every clip beforehand
        "dataloader_persistent_workers is true": training.dataloader_persistent_workers,
    }
    for told, is_wanted in reasons.items():
        if is_wanted:
            name = told.split()[0]
            raise SettingsError(
                f"{told} but streaming is true: clips are heard once, in the order of the stream, and no other can be "
                f"looked up. Leave {name} out, or streaming."
            )


def check_before_reading(settings: Settings, label_set: LabelSet, output_dir: Path) -> None:
    """Refuse an output folder, a metric or a length of clips that the run could not do with at its end.

    Args:
        settings: of the run.
        label_set: the primary emotions.
        output_dir: where the finished system goes.

    Raises:
        SettingsError: a metric that no report has; a tracker or an optimizer whose library is not there; clips longer
            than the speech encoder hears; a README in the output folder that no run wrote. The message says what to
            do.
        CheckpointError: a checkpoint to go on from that is not whole.
    """
    card, recipe = output_dir / "README.md", output_dir / "recipe.yaml"
    if output_dir.exists() and not output_dir.is_dir():
        raise SettingsError(f"output_dir {output_dir} is a file: name a folder.")
    if card.exists() and not recipe.exists():
        raise SettingsError(
            f"{card} is none that a run wrote (there is no recipe.yaml beside it), and the model card would take its "
            "place: move it, or choose another output_dir."
        )
    heads = _heads(settings.model)
    if settings.training.metric_for_best_model is not None and heads is not None:
        _check_metric_name(settings, _report(_every_target(heads, label_set), heads, label_set))
    _check_tools(settings.training)
    if isinstance(settings.training.resume_from_checkpoint, str):
        check_whole(Path(settings.training.resume_from_checkpoint))
    _check_max_seconds(settings)
    if settings.objective.teacher is not None:
        from sailer.training.teaching import check_teacher

        check_teacher(settings.objective.teacher, label_set)


def check_corpus(settings: Settings, label_set: LabelSet, corpus: DatasetDict) -> None:
    """Refuse a corpus whose annotations leave nothing to train on, or nothing to select the best epoch by.

    Raises:
        CorpusError: no training clip has what the objective learns from.
        SettingsError: the validation split does not define `metric_for_best_model`.
    """
    data, heads = settings.data, _heads(settings.model)
    rows = corpus[data.train_split].select_columns(["votes", "label"]).with_format("numpy")[:]
    objective = settings.objective
    is_taught = objective.objective == "distil"
    needs_votes = objective.objective != "ce" and not (is_taught and objective.distil_weight == 1)
    if needs_votes and "primary" in (heads or ()) and not np.any(rows["votes"]):
        way = ", but they have labels: set objective to ce." if (rows["label"] >= 0).any() else ", nor a label."
        way = ": set distil_weight to 1, to learn from the teacher alone." if is_taught else way
        raise CorpusError(
            f"No clip of {data.train_split!r} has annotators' votes, which the objective {objective.objective!r} "
            f"learns from{way}"
        )
    name = settings.training.metric_for_best_model
    if name is None or heads is None:
        return
    report = _report(_targets(corpus[data.validation_split], heads), heads, label_set)
    _check_metric_name(settings, report)
    if settings.training.load_best_model_at_end and math.isnan(report[name.removeprefix("eval_")]):
        raise SettingsError(
            f"metric_for_best_model is {name!r}, which the clips of {data.validation_split!r} do not define: no epoch "
            "would be the best. Choose another metric, or set load_best_model_at_end to false."
        )


def _check_numbers(settings: Settings) -> None:
    for part in (settings.model, settings.data, settings.training):
        for name, (least, allowed) in LEAST.items():
            value = getattr(part, name, None)
            if value is not None and not (value > least or (allowed and value == least)):
                bound = f"at least {least:g}" if allowed else f"more than {least:g}"
                raise SettingsError(f"{name} is {value!r}: it must be {bound}.")
    training = settings.training
    if training.max_steps <= 0 and not training.num_train_epochs > 0:
        raise SettingsError(
            f"num_train_epochs is {training.num_train_epochs!r}: it must be more than 0. (To use a system as it is, "
            "evaluate it: sailer evaluate MODEL.)"
        )


def _check_discriminant(settings: Settings) -> None:
    share, model = settings.model.discriminant_share, settings.model
    if share is None:
        return
    if not 0 <= share <= 1:
        raise SettingsError(f"discriminant_share is {share:g}; give a share from 0 to 1.")
    if share and "primary" not in model.heads and not model.base_model:
        raise SettingsError(
            "discriminant_share is set but there is no primary head: add primary to heads, or leave it out."
        )


def _check_lora(settings: Settings) -> None:
    model, lora = settings.model, settings.model.lora()
    default = ModelSettings(audio_backbone="any")
    for name in LORA_OPTIONS:
        needed = f"{name.split('_')[0]}_lora_rank" if name.startswith(("audio_", "text_")) else "audio_lora_rank"
        is_alone = getattr(model, needed) is None if name.startswith(("audio_", "text_")) else not lora
        if is_alone and getattr(model, name) != getattr(default, name):
            raise SettingsError(f"{name} is {getattr(model, name)!r}, which does nothing without LoRA: set {needed}.")
    if not lora:
        return
    if importlib.util.find_spec("peft") is None:
        raise SettingsError("LoRA needs peft, which is not installed: pip install 'sailer[lora]'.")
    has_text = bool(model.text_backbone or model.base_model)
    for tower, options in lora.items():
        try:
            checked_lora(tower, options, getattr(model, f"freeze_{tower}"), tower == "audio" or has_text)
        except ValueError as error:
            raise SettingsError(str(error)) from error
    if settings.data.cache_features != "off" and "audio" in lora:
        raise SettingsError(
            f"cache_features is {settings.data.cache_features!r} but audio_lora_rank is {model.audio_lora_rank}: only "
            "a frozen encoder's states can be kept, and LoRA trains in it. Set cache_features to off."
        )
    if settings.training.gradient_checkpointing and (model.freeze_text or not has_text):
        raise SettingsError(
            "gradient_checkpointing does nothing for a frozen encoder, nor for LoRA in it: leave it out (bf16 and "
            "audio_lora_layers save memory)."
        )


def _check_splits(settings: Settings) -> None:
    data = settings.data
    if data.validation_split == data.train_split:
        raise SettingsError(
            f"validation_split is {data.validation_split!r}, which the system is trained on: name another split, or "
            "have the corpus make one (most have the option split_fractions)."
        )
    if data.is_test_split(data.train_split):
        raise SettingsError(
            f"train_split is {data.train_split!r}, which is among the test splits: name another, or set test_splits."
        )
    if data.is_test_split(data.validation_split) and settings.training.load_best_model_at_end:
        raise SettingsError(
            f"validation_split is {data.validation_split!r}, which is a test split too: the best epoch would be "
            "selected on the clips that test it. Name another split, or set load_best_model_at_end to false."
        )


def check_same_corpus(corpus: DatasetDict, watch: Watch) -> None:
    """Refuse processes that read other rows: their steps would be of other clips.

    Raises:
        CorpusError: names a process, its machine and what differs.
    """
    if watch.size == 1:
        return
    counts = {name: len(rows) for name, rows in corpus.items()}
    own = {"host": socket.gethostname(), "clips": counts, "digest": digest_of_rows(corpus.values())}
    everyones = [json.loads(said) for said in watch.agree("corpus", json.dumps(own))]
    for index, theirs in enumerate(everyones):
        if theirs["digest"] != everyones[0]["digest"]:
            told = f"{theirs['clips']} clips, and process 0 ({everyones[0]['host']}) {everyones[0]['clips']}"
            if theirs["clips"] == everyones[0]["clips"]:
                told = "as many clips as process 0, but what is said of them differs"
            raise CorpusError(
                f"Process {index} ({theirs['host']}) reads another corpus: it sees {told}. All machines must see the "
                "same files: compare what data_dir holds on them."
            )


def _check_corpus_facts(data: DataSettings) -> None:
    known, stated = about_corpus(data.corpus), data.corpus_license
    if stated is not None and stated not in LICENSES:
        near = difflib.get_close_matches(stated, LICENSES, n=1)
        raise SettingsError(
            f"corpus_license is {stated!r}, which the Hub does not know"
            + (f" (did you mean {near[0]!r}?)" if near else "")
            + ": name one of https://huggingface.co/docs/hub/repositories-licenses, or other."
        )
    if stated is not None and known is not None and known.license not in ("", stated):
        raise SettingsError(
            f"corpus_license is {stated!r}, but {known.title} is under {known.license}: leave it out, it is for "
            "corpora of which nothing is known."
        )
    wrong = [language for language in data.corpus_languages or [] if not re.fullmatch("[a-z]{2,3}", language)]
    if wrong:
        raise SettingsError(f"corpus_languages has {wrong[0]!r}: name languages as en, de, cmn (ISO 639).")


def _check_metric_name(settings: Settings, known: Mapping[str, float]) -> None:
    name = settings.training.metric_for_best_model
    if name is not None and name.removeprefix("eval_") not in known:
        near = difflib.get_close_matches(name.removeprefix("eval_"), list(known), n=1)
        raise SettingsError(
            f"metric_for_best_model is {name!r}, which is not in the report of this system"
            + (f" (did you mean {near[0]!r}?)" if near else "")
            + f"; it has {', '.join(known)}."
        )


def _check_tools(training: SailerTrainingArguments) -> None:
    """Refuse trackers, optimizers and schedules that cannot be made: else all clips would be read before that."""
    there = get_available_reporting_integrations()
    for name in training.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise SettingsError(f"report_to is {name!r}; choose of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}.")
        if name not in there:
            raise SettingsError(f"report_to is {name!r}, which is not installed: pip install {name}, or leave it out.")
    any_model: Any = torch.nn.Linear(1, 1)
    try:
        Trainer.get_optimizer_cls_and_kwargs(training, any_model)
    except (ImportError, ValueError, RuntimeError) as error:
        raise SettingsError(f"optim is {OptimizerNames(training.optim).value}: {error}") from error
    schedule: Any = training.lr_scheduler_type
    options: Any = training.lr_scheduler_kwargs or {}
    try:
        get_scheduler(schedule, torch.optim.SGD([torch.zeros(1)]), 0, 1, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"lr_scheduler_type is {SchedulerType(schedule).value}, lr_scheduler_kwargs {options}: {error}"
        ) from error


def _heads(model: ModelSettings) -> list[str] | None:
    """Of the system that will be trained; None of a base model that cannot be read, which is told where it is."""
    if not model.base_model:
        return model.heads
    try:
        return SailerConfig.from_pretrained(model.base_model).heads
    except (OSError, ValueError):
        return None


def _check_max_seconds(settings: Settings) -> None:
    backbone = settings.model.base_model or settings.model.audio_backbone
    assert backbone is not None, "ModelSettings has a backbone where it has no base model"
    positions: int | None = 1500  # of a tiny Whisper
    if backbone not in TINY:
        try:
            config: Any = AutoConfig.from_pretrained(backbone, trust_remote_code=False)
        except (OSError, ValueError):
            return  # that it cannot be loaded is told where it is
        config = getattr(config, "audio_config", None) or config
        positions = getattr(config, "max_source_positions", None)
    elif backbone != "tiny-whisper":
        positions = None
    if positions is not None and settings.model.max_seconds > positions / 50:
        raise SettingsError(
            f"max_seconds is {settings.model.max_seconds:g}, and {backbone} hears {positions / 50:g} s at most: set "
            f"max_seconds to {positions / 50:g} or less."
        )


def _report(targets: Mapping[str, np.ndarray], heads: list[str], label_set: LabelSet) -> dict[str, float]:
    """The report of a system that answers at random: its keys, and NaN where the clips do not define a figure."""
    from sailer.training.trainer import split_report

    random = np.random.default_rng(0)
    clips = len(targets["consensus"])
    shapes = {
        "primary": (clips, len(label_set.labels)),
        "secondary": (clips, len(SECONDARY_LABELS)),
        "attributes": (clips, len(ATTRIBUTES)),
        "sex": (clips, len(SEX_LABELS)),
        "age": (clips,),
    }
    outputs = {COMPONENTS[head][0]: random.random(shapes[head], dtype=np.float32) for head in heads}
    objective = SailerObjective(ObjectiveSettings(target_weighting="none"))
    return split_report(objective, label_set, outputs, targets)


def _targets(rows: Dataset, heads: list[str]) -> dict[str, np.ndarray]:
    """What the collator makes of the rows' annotations, without their audio."""
    names = ["votes", "secondary_votes", "attributes", "label", "sex", "age"]
    columns = rows.select_columns(names).with_format("numpy")[:]
    sexes: dict[str, int] = {label: index for index, label in enumerate(SEX_LABELS)}
    targets = {
        "primary": distribution(columns["votes"]).astype(np.float32),
        "secondary": distribution(columns["secondary_votes"]).astype(np.float32),
        "attributes": columns["attributes"].astype(np.float32),
        "sex": np.array([sexes.get(sex, -100) for sex in columns["sex"].tolist()]),
        "age": columns["age"].astype(np.float32),
    }
    return {COMPONENTS[head][1]: targets[head] for head in heads} | {"consensus": columns["label"]}


def _every_target(heads: list[str], label_set: LabelSet) -> dict[str, np.ndarray]:
    """Clips that have every annotation and every class: their report has every key."""
    classes = np.arange(2 * len(label_set.labels)) % len(label_set.labels)
    shares = classes.astype(np.float32) / len(label_set.labels)
    targets: dict[str, np.ndarray] = {
        "primary": np.eye(len(label_set.labels), dtype=np.float32)[classes],
        "secondary": np.eye(len(SECONDARY_LABELS), dtype=np.float32)[classes % len(SECONDARY_LABELS)],
        "attributes": np.stack([shares] * len(ATTRIBUTES), axis=1),
        "sex": classes % len(SEX_LABELS),
        "age": shares,
    }
    return {"consensus": classes, **{COMPONENTS[head][1]: targets[head] for head in heads}}
