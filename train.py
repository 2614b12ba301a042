"""The main job: a recipe and a corpus in, one folder out that anyone can load; trained, evaluated, drawn and used."""

from __future__ import annotations

import copy
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict
from transformers import pipeline, set_seed

from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor, SailerTrainer
from sailer.adapters_sailer import lora_of
from sailer.data import CorpusError, LabelSet, load_corpus
from sailer.data.atomic import adding_to_folder, write_json
from sailer.data.collator import SailerCollator
from sailer.data.labels import shuffle_labels
from sailer.data.preview import preview
from sailer.data.sampler import PlannedDataset
from sailer.data.sharing import read_once
from sailer.data.statistics import shared_speaker_warnings
from sailer.data.team import Team
from sailer.hub.publishing import make_repository
from sailer.settings import DataSettings, Settings, load_recipe, resolve, to_yaml
from sailer.training import checks, seeds
from sailer.training.card_facts import run_facts
from sailer.training.checkpoints import run_identity
from sailer.training.discriminant import learn_discriminant
from sailer.training.evaluation import (
    baselines,
    calibrate,
    calibration_report,
    draw_confusion,
    summary,
    without_prefix,
)
from sailer.training.features import FeatureStore
from sailer.training.groups import View, by_kind, group_report, group_section, largest_gap
from sailer.training.losses import SailerObjective, label_prior, label_weights
from sailer.training.plots import plot_training
from sailer.training.report_plots import plot_groups
from sailer.training.speakers import learn_mean_voice
from sailer.training.streams import streamed_clips
from sailer.training.systems import load_system, local_backbone
from sailer.training.teaching import targets_of, taught
from sailer.training.trainer import SplitPrediction
from sailer.training.watch import Watch

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
ADAPTERS = "adapters"


@dataclass
class System:
    """A model, what feeds it, and how its targets were weighted."""

    model: SailerForAudioClassification
    processor: SailerProcessor
    label_set: LabelSet
    label_weights: list[float]
    label_prior: list[float]


@dataclass
class Job:
    """What `prepare` makes and the later stages need."""

    settings: Settings
    output_dir: Path
    resolved: str
    corpus: DatasetDict
    system: System
    planned: PlannedDataset
    shuffled: PlannedDataset | None = None
    features: FeatureStore | None = None
    started: float = 0.0
    shared_rows: Path | None = None
    watch: Watch = field(default_factory=Watch)

    @property
    def train_rows(self) -> Dataset:
        return self.corpus[self.settings.data.train_split]

    @property
    def validation_rows(self) -> Dataset:
        return self.corpus[self.settings.data.validation_split]

    @property
    def test_rows(self) -> dict[str, Dataset]:
        """The test splits by name, in the corpus's order."""
        return {name: rows for name, rows in self.corpus.items() if self.settings.data.is_test_split(name)}


@dataclass
class Evaluation:
    """Figures by split, what the system says of each test split, and its figures by groups of clips."""

    metrics: dict[str, Any]
    predictions: dict[str, SplitPrediction]
    groups: dict[str, Any] = field(default_factory=dict)


def run(recipe: str | Path = "demo", overrides: Mapping[str, Any] | None = None) -> Path:
    """Train the system of a recipe.

    Args:
        recipe: name of a bundled recipe or path of a YAML file.
        overrides: options on top of it.

    Returns:
        The folder with the checkpoint, `metrics.json`, `groups.json` (of the test splits' groups of clips),
        `training_log.json` (losses, gradient norms and learning rates as they were logged), plots, model card and the
        recipe as resolved.

    Raises:
        SettingsError: an unknown option or a contradiction.
        CorpusError: the corpus cannot be read.
        ValueError: a backbone cannot be loaded.
    """
    options, given = load_recipe(recipe), dict(overrides or {})
    settings = resolve(options, given, origin=f"recipe {recipe}")
    if settings.data.seeds is None:
        return train(settings)
    named = given if "seeds" in given else options | given
    seeds.check_seeds(settings.data.seeds, settings.given | {"seed": named.get("seed")})
    return train_seeds(settings, lambda own: resolve(options, given | own, origin=f"recipe {recipe}"))


def train_seeds(settings: Settings, resolved: Callable[[dict[str, Any]], Settings]) -> Path:
    """Train one system with each seed, in `seed-N` of the output folder, and sum them up in its report.md.

    What is finished is not trained again, what was cut short goes on. Kept hidden states lie in one folder for all.

    Args:
        settings: with seeds.
        resolved: the same settings with some options changed.

    Raises:
        SettingsError: a folder holds the finished system of other settings.
    """
    output_dir, runs = Path(settings.training.output_dir), list(settings.data.seeds or [])
    common: dict[str, Any] = {"seeds": None}
    if settings.data.cache_features != "off":
        folder = settings.data.feature_cache_dir or str(output_dir / "features")
        common |= {"cache_features": "disk", "feature_cache_dir": folder}
    own = {seed: common | {"seed": seed, "output_dir": str(output_dir / f"seed-{seed}")} for seed in runs}
    finished = [seed for seed in runs if seeds.is_finished(output_dir / f"seed-{seed}", to_yaml(resolved(own[seed])))]
    for seed in runs:
        print(f"\nseed {seed} is finished" if seed in finished else f"\nseed {seed}")
        if seed not in finished:
            begun = any((output_dir / f"seed-{seed}" / CHECKPOINTS).glob("checkpoint-*"))
            train(resolved(own[seed] | ({"resume_from_checkpoint": True} if begun else {})))
    if settings.training.process_index == 0:
        report = seeds.write_summary(output_dir, runs)
        print(f"\n{len(runs)} seeds:\n{seeds.summary_lines(output_dir)}\nThe figures of all are in {report}")
    return output_dir


def train(settings: Settings) -> Path:
    """Train, evaluate, save and try the system that the settings describe; see `run`."""
    with Watch.of_this_run() as watch:
        job = prepare(settings, watch=watch)
        try:
            trainer = fit(job)
            evaluation = evaluate(job, trainer)
            return save(job, trainer, evaluation)
        finally:
            if job.shared_rows is not None and settings.training.local_process_index == 0:
                shutil.rmtree(job.shared_rows, ignore_errors=True)


def prepare(settings: Settings, corpus: DatasetDict | None = None, watch: Watch | None = None) -> Job:
    """Check the settings, read the corpus, build the system and keep what its frozen towers say of the clips.

    Args:
        settings: of the run.
        corpus: the settings' corpus, where it has been read before.
        watch: the processes that train together, where there are several.

    Raises:
        SettingsError: settings that would fail, or do nothing, later on (see `sailer.training.checks`).
        CorpusError, ValueError: as `run` does.
    """
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving, which take a moment
    resolved, output_dir = to_yaml(settings), Path(settings.training.output_dir)
    label_set = settings.data.label_set()
    checks.check_before_reading(settings, label_set, output_dir)
    settings.training.output_dir = str(output_dir / CHECKPOINTS)
    set_seed(settings.training.seed)
    shared_rows = None
    if settings.training.push_to_hub and settings.training.process_index == 0:  # who may not write hears of it now
        name = settings.training.hub_model_id or output_dir.resolve().name
        settings.training.hub_model_id = make_repository(name, bool(settings.training.hub_private_repo)).repo_id
    if corpus is None:
        folder = Path(settings.training.output_dir) / "corpus"
        team = Team.of_this_run(per_machine=True)
        corpus, shared_rows = read_once(lambda: read_corpus(settings.data, label_set), folder, team)
    watch = watch or Watch()
    checks.check_same_corpus(corpus, watch)
    checks.check_corpus(settings, label_set, corpus)
    for name, rows in corpus.items() if settings.training.process_index == 0 else ():
        print(f"{name}: {len(rows)} clips, {np.nansum(rows.with_format('numpy')['duration']) / 3600:.2f} h")
    if settings.objective.objective == "distil":
        judged = taught(corpus[settings.data.train_split], settings, label_set)
        corpus = DatasetDict({**corpus, settings.data.train_split: judged})
    train_rows = corpus[settings.data.train_split]
    planned = PlannedDataset(train_rows, settings.augmentation, label_set, seed=settings.training.seed)
    system = build_system(settings, label_set, train_rows, watch)
    job = Job(settings, output_dir, resolved, corpus, system, planned)
    job.started, job.shared_rows, job.watch = started, shared_rows, watch
    if settings.data.shuffled_label_baseline:
        shuffled = shuffle_labels(train_rows, settings.training.seed)
        job.shuffled = PlannedDataset(shuffled, settings.augmentation, label_set, seed=settings.training.seed)
    if settings.data.preview and settings.training.process_index == 0:
        folder = preview(planned, settings.data.preview, output_dir / "preview", system.processor.sampling_rate)
        print(f"{settings.data.preview} augmented clips, their targets and a chart of the classes are in {folder}")
    heard = [planned, *filter(None, [job.shuffled]), job.validation_rows, *job.test_rows.values()]
    job.features = cache_features(settings, system, heard, output_dir)
    return job


def evaluate(job: Job, trainer: SailerTrainer) -> Evaluation:
    """Figures of the validation and test splits, after the temperature has been fitted on the validation split.

    A test split that stands in for a validation split fits no temperature.
    """
    model, data = job.system.model, job.settings.data
    validation = trainer.predict(job.validation_rows)
    if data.validation_split not in job.test_rows:
        calibrate(model, validation)
    metrics: dict[str, Any] = {"validation": validation.metrics | calibration_report(model, validation)}
    metrics["validation"]["calibration_temperature"] = model.config.calibration_temperature
    baseline = fit_baseline(job) if job.shuffled else None
    predictions, groups = {}, {}
    for name, rows in job.test_rows.items():
        predictions[name] = trainer.predict(rows)
        metrics[name] = predictions[name].metrics | calibration_report(model, predictions[name])
        if "primary" in model.config.heads:
            metrics[name] |= baselines(job.train_rows, rows, job.system.label_set, baseline)
            logits, targets = predictions[name].predictions["logits"], predictions[name].label_ids
            groups[name] = group_report(View(logits, targets, rows, job.system.label_set))
    return Evaluation({key: without_prefix(figures) for key, figures in metrics.items()}, predictions, groups)


def fit_baseline(job: Job) -> SailerTrainer:
    """The same system trained afresh on shuffled labels: what chance gives."""
    if job.settings.training.process_index == 0:
        print("\nBaseline: the same system trained on shuffled labels")
    assert job.shuffled is not None
    # In a place of its own: it must neither go on from the system's checkpoints nor replace them.
    training = copy.copy(job.settings.training)
    training.output_dir = str(job.output_dir / CHECKPOINTS / "shuffled_labels")
    training.resume_from_checkpoint, training.push_to_hub = None, False
    set_seed(training.seed)
    settings = replace(job.settings, training=training)
    system = build_system(settings, job.system.label_set, job.train_rows, job.watch)
    return fit(replace(job, settings=settings, system=system, planned=job.shuffled))


def save(job: Job, trainer: SailerTrainer, evaluation: Evaluation) -> Path:
    """Write the system, its figures, plots and card to the output folder, and try it there.

    Returns:
        The folder.
    """
    metrics: dict[str, Any] = evaluation.metrics | {"wall_seconds": time.perf_counter() - job.started}
    output_dir, label_set = job.output_dir, job.system.label_set
    if not trainer.is_world_process_zero():
        return output_dir
    with adding_to_folder(output_dir) as folder:
        if job.settings.model.save_merged and lora_of(job.system.model.config):
            job.system.model.save_pretrained(folder / ADAPTERS)
            job.system.processor.save_pretrained(folder / ADAPTERS)
            job.system.model.merge_lora()
        job.system.model.save_pretrained(folder)
        job.system.processor.save_pretrained(folder)
        write_json(metrics, folder / "metrics.json")
        write_json(evaluation.groups, folder / "groups.json")
        write_json(trainer.state.log_history, folder / "training_log.json")
        (folder / "recipe.yaml").write_text(job.resolved)
        plot_training(trainer.state.log_history, folder / "training_curve.png")
        for name, prediction in evaluation.predictions.items():
            if "logits" in prediction.predictions:
                path = folder / ("confusion_matrix.png" if len(job.test_rows) == 1 else f"confusion_{name}.png")
                logits, labels = prediction.predictions["logits"], prediction.label_ids["consensus"]
                draw_confusion(logits, labels, label_set, path)
        config = job.system.model.config
        facts = run_facts(job.settings, output_dir, job.resolved, job.corpus, label_set, metrics, config)
        facts["groups"] = {name: text for name, found in evaluation.groups.items() if (text := group_section(found))}
        for name in facts["groups"]:
            path = folder / ("groups.png" if len(job.test_rows) == 1 else f"groups_{name}.png")
            found = evaluation.groups[name]
            plot_groups(by_kind(found["groups"]), path, largest_gap(found["gaps"]))
            facts["files"][path.name] = f"Figures of {name} by group"
        trainer.card_facts = facts
        trainer.create_model_card(folder=folder)
    trainer.args.output_dir = str(output_dir)  # which trainer.push_to_hub() publishes
    shutil.rmtree(output_dir / CHECKPOINTS, ignore_errors=True)  # optimizer states, for a run that was cut short
    for name in ("validation", *job.test_rows):
        print(summary(name, metrics[name]))
    try_out(output_dir, next(iter(job.test_rows.values()), job.validation_rows))
    if job.settings.training.push_to_hub:
        print(f"\nPublished: {trainer.push_to_hub().repo_url}")
    print(f"\nThe system, its card and its figures are in {output_dir}")
    return output_dir


def read_corpus(data: DataSettings, label_set: LabelSet) -> DatasetDict:
    """The recipe's corpus in canonical rows.

    Raises:
        CorpusError: the corpus cannot be read, or lacks a split that the recipe names (lists those it has).
    """
    options = data.corpus_options | ({"streamed": data.train_split} if data.streaming else {})
    corpus = load_corpus(data.corpus, data.data_dir, label_set=label_set, **options)
    for split in (data.train_split, data.validation_split, *(data.test_splits or [])):
        if split not in corpus:
            raise CorpusError(f"Corpus {data.corpus} has no split {split!r}; it has {list(corpus)}.")
    for warning in shared_speaker_warnings(corpus):
        logger.warning(warning.removeprefix("WARNING: "))
    return corpus


def build_system(settings: Settings, label_set: LabelSet, train_rows: Dataset, watch: Watch | None = None) -> System:
    """The model and processor of the settings, with the training targets' prior q and weights w in the config.

    Of several processes, those that `watch` knows, the first one makes the tiny backbones.

    Raises:
        ValueError: a backbone or base model cannot be loaded, or has other labels than the corpus (names both).
    """
    folder = Path(settings.training.output_dir) / "backbones"
    if settings.model.lora():  # adapters are loaded over it: it stays
        folder = folder.parents[1] / "backbones"
    names = (settings.model.audio_backbone, settings.model.text_backbone)
    if settings.training.process_index == 0:
        backbones = [local_backbone(name, folder, train_rows) for name in names]
    (watch or Watch()).agree("backbones", "made")
    backbones = [local_backbone(name, folder, train_rows) for name in names]
    model, processor = load_system(settings.model, label_set, *backbones)
    prior = label_prior(targets_of(train_rows, settings.objective))
    weights = label_weights(prior, label_set.labels)
    objective = SailerObjective(settings.objective, weights, prior)
    model.config.label_prior = prior.tolist()
    model.config.conformal = None  # a base model's are of its own weights
    model.config.label_weights = objective.implied_label_weights(len(label_set.labels)).tolist()
    model.config.target_weighting = settings.objective.target_weighting
    if settings.objective.teacher and settings.objective.distil_weight == 1:  # its scores mean what the teacher's do
        model.config.label_weights = SailerConfig.get_config_dict(settings.objective.teacher)[0].get("label_weights")
    model.config.text_dropout = settings.augmentation.text_dropout
    return System(model, processor, label_set, weights.tolist(), prior.tolist())


def fit(job: Job) -> SailerTrainer:
    """Train the system on clips under augmentation; its best epoch's weights are loaded at the end."""
    settings, system, args = job.settings, job.system, job.settings.training
    collator = SailerCollator(
        system.processor,
        system.label_set,
        system.model.config.heads,
        max_seconds=settings.model.max_seconds,
        hard_targets=settings.objective.objective == "ce",
        features=job.features,
        log_mel=settings.training.device.type == "cpu",
    )
    trainer = SailerTrainer(
        system.model,
        args,
        objective=SailerObjective(settings.objective, system.label_weights, system.label_prior),
        label_set=system.label_set,
        manifold_mixup=settings.augmentation.manifold_mixup,
        state_mixup=settings.augmentation.state_mixup,
        evaluation_collator=replace(collator, hard_targets=False),
        train_dataset=streamed_clips(job.planned, settings) if settings.data.streaming else job.planned,
        eval_dataset=job.validation_rows,
        data_collator=collator,
        processing_class=system.processor,
        identity=run_identity(settings, job.corpus, args.world_size),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    if settings.data.streaming:  # whose clips are heard in the archives' order, not looked up
        system.model.config.discriminant_share = 0.0  # a base model's
    else:
        learn_discriminant(trainer, job.planned, args.seed)
        learn_mean_voice(trainer, job.train_rows, args.seed)
    if trainer.is_world_process_zero() and args.load_best_model_at_end:
        if trainer.state.best_global_step is None:
            logger.warning(
                "%s was not defined after any evaluation: the last weights are kept.", args.metric_for_best_model
            )
        else:
            print(f"Best {args.metric_for_best_model} on validation: {trainer.state.best_metric:.4f}")
    return trainer


def cache_features(
    settings: Settings, system: System, datasets: list[PlannedDataset | Dataset], output_dir: Path
) -> FeatureStore | None:
    """The frozen towers' hidden states of everything that the run will hear, or None where they are not to be kept."""
    data, args = settings.data, settings.training
    if data.cache_features == "off":
        return None
    folder = None
    if data.cache_features == "disk":
        folder = Path(data.feature_cache_dir or output_dir / "features")
    collator = SailerCollator(
        system.processor,
        system.label_set,
        system.model.config.heads,
        max_seconds=settings.model.max_seconds,
        log_mel=args.device.type == "cpu",
    )
    model: torch.nn.Module = system.model  # whose own `to` says nothing of devices
    model.to(args.device).eval()
    return FeatureStore.build(
        system.model,
        collator,
        datasets,
        folder=folder,
        dtype=data.feature_dtype,
        num_workers=args.dataloader_num_workers or 0,
        team=Team.of_this_run(per_machine=folder is None),
        # As they would be computed in training.
        precision=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
    )


def try_out(folder: Path, rows: Dataset, clips: int = 3) -> None:
    """Load the folder as anyone would, and print what it says of a few unseen clips of different classes.

    The run is over and its result is saved: what goes wrong here is told, and fails nothing.
    """
    try:
        labels = np.asarray(rows["label"])
        _, first = np.unique(labels, return_index=True)
        chosen = [int(i) for i in sorted(first) if labels[i] >= 0][:clips] or list(range(min(clips, len(rows))))
        classifier = pipeline(None, model=str(folder), trust_remote_code=True)
        names = classifier.model.config.labels
        print(f"\npipeline(model={str(folder)!r}, trust_remote_code=True) on unseen clips:")
        for row in (rows[i] for i in chosen):
            source = row["audio"]["path"] or row["audio"]["bytes"]
            scores = classifier({"audio": source, "text": row["transcript"]}, top_k=3)
            told = ", ".join(f"{score['label']} {score['score']:.2f}" for score in scores)
            truth = names[row["label"]] if row["label"] >= 0 else "no agreement"
            print(f"  {row['id']} ({truth}): {told}")
    except Exception as error:  # whatever it is, a night's training is not lost over it
        logger.warning("The system is saved, but could not be tried on unseen clips: %s", error)


if __name__ == "__main__":
    from sailer.cli import main  # a script is imported twice: here and, for its work, as sailer.train

    sys.exit(main(["train", *sys.argv[1:]]))
