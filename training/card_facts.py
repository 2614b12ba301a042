"""A run, or a Trainer in a script of one's own, goes in; the facts that a model card is rendered from come out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from sailer.data.corpora import about_corpus
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import LabelSet
from sailer.data.statistics import class_counts, split_speakers
from sailer.hub.card import NOT_METRICS, NOTHING, SELECTION, TEST, TRAINING, origin_facts
from sailer.hub.origins import Origin, of_backbone, of_corpus, of_system

if TYPE_CHECKING:
    from sailer.settings import Settings
    from sailer.training.publishing import PublishingTrainer

BASELINES = {
    "baseline_majority_macro_f1": "always the commonest class",
    "baseline_shuffled_macro_f1": "the same system trained on shuffled labels",
}
# What a script's card says of its training, by the names of the arguments.
SHOWN_ARGUMENTS = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed")


def run_facts(
    settings: Settings,
    output_dir: Path,
    resolved: str,
    corpus: Mapping[str, Dataset],
    label_set: LabelSet,
    metrics: Mapping[str, Any],
    config: Any,
) -> dict[str, Any]:
    """What the model card says of a run of the main job; see `sailer.hub.card.render_card`.

    Args:
        settings: of the run.
        output_dir: where its system goes; the card is called after it.
        resolved: the settings as YAML.
        corpus: split -> canonical rows.
        label_set: the primary emotions.
        metrics: split -> figures, and `wall_seconds`.
        config: the system's configuration.
    """
    model, data, training = settings.model, settings.data, settings.training
    figures = {split: values for split, values in metrics.items() if isinstance(values, dict)}
    chance = {
        split: {title: {"macro_f1": values[key]} for key, title in BASELINES.items() if key in values}
        for split, values in figures.items()
    }
    uses = {split: TEST if data.is_test_split(split) else NOTHING for split in corpus}
    uses |= {data.validation_split: SELECTION, data.train_split: TRAINING}
    facts = {
        "model_name": output_dir.name,
        "model_id": training.hub_model_id or output_dir.name,
        "audio_backbone": model.audio_backbone or model.base_model,
        "text_backbone": model.text_backbone,
        "audio_layers": model.audio_layers,
        "discriminant_share": config.discriminant_share,
        "heads": model.heads,
        "labels": list(label_set.labels),
        "scored_labels": list(label_set.scored),
        "corpus": data.corpus,
        "synthetic": data.corpus == "synthetic",
        "splits": _splits(corpus, uses),
        "statistics": class_counts(corpus, label_set),
        "settings": resolved,
        "metrics": {
            split: {key: value for key, value in values.items() if key not in (*BASELINES, *NOT_METRICS)}
            for split, values in figures.items()
        },
        "baselines": {split: value for split, value in chance.items() if value},
        "training": {"epochs": training.num_train_epochs, "wall time": f"{metrics['wall_seconds']:.0f} s"},
        "files": {"training_curve.png": "Losses and validation metrics over the epochs"},
    }
    return facts | _about(data.corpus, data.corpus_languages, data.data_dir) | origin_facts(_origins(settings, config))


def trainer_facts(trainer: PublishingTrainer, **said: Any) -> dict[str, Any]:
    """What a card can say of a `SailerTrainer` in a script: what the Trainer knows, and what its user says.

    Args:
        trainer: after training, or before.
        said: facts of `render_card` by name that the Trainer cannot know, such as `corpus`, `audio_backbone` and
            `text_backbone` (Hub ids); `license` is that of a corpus of which nothing is known.
    """
    config: Any = getattr(trainer.model, "config", None)
    rows = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    rows["train"] = rows["train"].dataset if isinstance(rows["train"], PlannedDataset) else rows["train"]
    splits = {name: split for name, split in rows.items() if isinstance(split, Dataset) and "votes" in split.features}
    corpus, license_ = said.pop("corpus", None) or "a corpus without a name", said.pop("license", None)
    text = getattr(config, "text_config", None)
    audio_backbone = said.pop("audio_backbone", None) or config.audio_config.model_type
    text_backbone = said.pop("text_backbone", None) or (text and text.model_type)
    origins = [
        of_corpus(corpus, license_),
        of_backbone("speech encoder", audio_backbone, model_type=config.audio_config.model_type),
    ]
    if text_backbone:
        origins.append(of_backbone("text encoder", text_backbone, model_type=getattr(text, "model_type", None)))
    name = trainer.args.hub_model_id or Path(trainer.args.output_dir).resolve().name
    facts = {
        "model_name": name.split("/")[-1],
        "model_id": name,
        "audio_backbone": audio_backbone,
        "text_backbone": text_backbone,
        "audio_layers": config.audio_layers,
        "discriminant_share": getattr(config, "discriminant_share", 0.0),
        "heads": list(config.heads),
        "labels": list(config.labels),
        "scored_labels": list(config.scored_labels),
        "corpus": corpus,
        "splits": _splits(splits, {"train": TRAINING, "validation": SELECTION}),
        "statistics": class_counts(splits, trainer.label_set),
        "settings": "\n".join(f"{key}: {getattr(trainer.args, key)}" for key in SHOWN_ARGUMENTS),
        "metrics": _last_evaluation(trainer),
        "training": {"epochs": trainer.state.epoch, "steps": trainer.state.global_step},
    }
    return facts | _about(corpus, None, None) | origin_facts(origins) | said


def _origins(settings: Settings, config: Any) -> list[Origin]:
    """Of what a run's system is made."""
    model, data = settings.model, settings.data
    found = [of_corpus(data.corpus, data.corpus_license)]
    if model.base_model:
        return [*found, of_system(model.base_model)]
    for kind, source, hub_id, own in (
        ("speech encoder", model.audio_backbone, model.audio_backbone_id, config.audio_config),
        ("text encoder", model.text_backbone, model.text_backbone_id, config.text_config),
    ):
        if source:
            found.append(of_backbone(kind, source, hub_id, getattr(own, "model_type", None)))
    return found


def _about(corpus: str, languages: list[str] | None, data_dir: str | None) -> dict[str, Any]:
    """What is known of a corpus by its name, for the card's header and its list of what not to judge on."""
    about = about_corpus(corpus)
    named = data_dir if corpus == "hub" and data_dir and not Path(data_dir).exists() else corpus
    return {
        "language": languages or (list(about.languages) if about else None),
        "datasets": [named] if about or named != corpus else None,
        "kin": about.kin if about else "",
    }


def _splits(corpus: Mapping[str, Dataset], uses: Mapping[str, str]) -> list[dict[str, Any]]:
    trained_on = [split for split in corpus if uses[split] == TRAINING]
    return [{**facts, "use": uses[facts["split"]]} for facts in split_speakers(corpus, trained_on)]


def _last_evaluation(trainer: PublishingTrainer) -> dict[str, dict[str, float]]:
    """The figures on the validation rows of the weights that are kept: the best ones, or else the last."""
    found = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    best = [entry for entry in found if entry.get("step") == trainer.state.best_global_step]
    chosen = best if trainer.args.load_best_model_at_end and best else found
    if not chosen:
        return {}
    figures = {key.removeprefix("eval_"): value for key, value in chosen[-1].items() if key.startswith("eval_")}
    return {"validation": {key: value for key, value in figures.items() if key not in NOT_METRICS}}
