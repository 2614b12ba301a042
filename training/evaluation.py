"""Systems and a labelled split in; figures, baselines and plots out. Several systems are averaged (paper, Table 5)."""

from __future__ import annotations

import csv
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.special import log_softmax, softmax
from transformers import EvalPrediction

from sailer import SailerEnsemble, SailerForAudioClassification, SailerTrainer, SailerTrainingArguments
from sailer.configuration_sailer import SailerConfig, SailerEnsembleConfig
from sailer.data import CorpusError, LabelSet, load_corpus
from sailer.data.atomic import replacing, write_json
from sailer.data.challenge import read_file_list, write_submission
from sailer.data.collator import SailerCollator
from sailer.ensemble_sailer import HEAD_OF_OUTPUT, load_system
from sailer.processing_sailer import SailerEnsembleProcessor, SailerProcessor
from sailer.training.calibration import fit_temperature, natural_probabilities
from sailer.training.conformal import fit_conformal, known_probabilities, set_figures
from sailer.training.losses import ObjectiveSettings, SailerObjective
from sailer.training.metrics import decisions, distribution_metrics, majority_class_f1
from sailer.training.plots import plot_confusion
from sailer.training.report import Evaluated, add_intervals, write_report, write_table
from sailer.training.trainer import CONSENSUS, SplitPrediction

logger = logging.getLogger(__name__)

ENSEMBLE = "ensemble"
TARGET_OF_HEAD = {
    "primary": "labels",
    "secondary": "secondary_labels",
    "attributes": "attribute_labels",
    "sex": "sex_labels",
    "age": "age_labels",
}

# What `summary` shows of a split's figures, if it has them.
SUMMARY = {
    "macro_f1": "macro-F1",
    "baseline_majority_macro_f1": "  always the commonest class",
    "baseline_shuffled_macro_f1": "  trained on shuffled labels",
    "accuracy": "accuracy",
    "min_map": "Min. mAP",
    "aurc": "area under the risk-coverage curve",
    "ccc": "CCC of the attributes",
    "kl": "KL from the annotators, balanced prior",
    "natural_kl": "  natural prior, fitted temperature",
    "ece": "calibration error, balanced prior",
    "natural_uncalibrated_ece": "  natural prior",
    "natural_ece": "  natural prior, fitted temperature",
    "set90_coverage": "sets of 90 %: share with the consensus",
    "set90_size": "  classes in a set",
    "set90_by_class_coverage": "  a threshold for each class",
    "set90_by_class_size": "  classes in a set",
}


def evaluate_models(
    models: Sequence[str | Path],
    corpus: str,
    data_dir: str | Path | None = None,
    split: str = "test",
    output_dir: str | Path | None = None,
    corpus_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    bootstrap: int = 1000,
    embed_audio: bool = False,
    submission: str | None = None,
    file_list: str | Path | None = None,
) -> Path | None:
    """Evaluate systems on a split; of several, each and their ensemble (mean of probabilities). Print the figures.

    Args:
        models: folders or Hub ids of systems and ensembles with one label set. Several systems are loaded as an
            ensemble, so that what they have in common is computed once; beside an ensemble each is evaluated alone.
        corpus: name known to `load_corpus`.
        data_dir: the corpus's folder.
        split: which of its splits.
        output_dir: where the report goes, if anywhere: report.md and report.html, metrics.json (with `intervals`,
            `sets`, `differences` from the systems before, and of the last one `strata`, `groups` and `gaps`),
            predictions.csv (id, label, decision and probabilities of each clip, by the last system),
            predictions.parquet (of every system) and pictures.
        corpus_options: further options of the corpus's loader.
        batch_size: clips per batch.
        bootstrap: draws of the speakers, for intervals and differences.
        embed_audio: hold the worst clips' audio in the report, which then is report_with_audio.html and never pushed.
        submission: "categorical" or "attributes": also write what the last system says as the challenge's file,
            `submission_KIND.csv`. A split without labels gets that alone.
        file_list: names of the files that it must have; by default the split's clips.

    Returns:
        The folder, if there is one.

    Raises:
        ValueError: systems of different labels, or without the primary head (names them).
        CorpusError: the corpus cannot be read, or lacks the split (lists those it has) or its labels.
    """
    if output_dir is None and (submission or embed_audio):
        raise ValueError("A submission and audio in the report are files: name a folder for them with --output_dir.")
    loaded = load_systems(models)
    label_set = label_set_of(loaded[0][0].config)
    rows = labelled_rows(corpus, data_dir, split, label_set, corpus_options, submission is not None)
    is_labelled = _has_labels(rows)
    evaluated: list[Evaluated] = []
    for names, (model, processor) in zip(_names(models, loaded), loaded, strict=True):
        found, targets = _evaluate(names, model, processor, rows, label_set, batch_size, is_labelled)
        for system in found if is_labelled else ():
            print(summary(system.name, system.figures))
        evaluated += found
    if output_dir is None:
        return None
    folder, last = Path(output_dir), evaluated[-1]
    if submission is not None:
        _write_submission(submission, last, rows, label_set, file_list, folder)
    if not is_labelled:
        return folder
    logits, consensus = last.outputs["logits"], targets[CONSENSUS]
    _write_predictions(rows["id"], consensus, log_softmax(logits, axis=1), label_set, folder / "predictions.csv")
    write_table(evaluated, rows, consensus, label_set, folder / "predictions.parquet")
    draw_confusion(logits, consensus, label_set, folder / "confusion_matrix.png")
    add_intervals(evaluated, targets, rows["speaker"], label_set, bootstrap)
    write_report(folder, evaluated, targets, rows, label_set, f"{corpus} ({split})", embed_audio)
    write_json({system.name: system.figures for system in evaluated}, folder / "metrics.json")
    return folder


def label_set_of(config: SailerConfig) -> LabelSet:
    """A system's primary emotions."""
    return LabelSet(config.labels, config.majority_labels, config.scored_labels)


def labelled_rows(
    corpus: str,
    data_dir: str | Path | None,
    split: str,
    label_set: LabelSet,
    corpus_options: Mapping[str, Any] | None = None,
    unlabelled: bool = False,
) -> Dataset:
    """A split of a corpus; `unlabelled` ones too, if asked for.

    Raises:
        CorpusError: the corpus cannot be read, or lacks the split (lists those it has) or its labels.
    """
    splits = load_corpus(corpus, data_dir, label_set=label_set, **(corpus_options or {}))
    if split not in splits:
        raise CorpusError(f"Corpus {corpus} has no split {split!r}; it has {list(splits)}.")
    rows = splits[split]
    if not unlabelled and not _has_labels(rows):
        others = [name for name in splits if name != split]
        raise CorpusError(
            f"The split {split!r} of {corpus} has no labels to evaluate against; others: {others}. To write what a "
            "system says of it as the challenge's file, add --submission."
        )
    return rows


def predict(
    model: SailerForAudioClassification | SailerEnsemble,
    processor: SailerProcessor | SailerEnsembleProcessor,
    rows: Dataset,
    label_set: LabelSet,
    batch_size: int = 8,
) -> SplitPrediction:
    """A system's outputs on canonical rows, the targets beside them, and `emotion_report` under keys with "test_"."""
    with _trainer(model, processor, rows, label_set, batch_size) as trainer:
        return trainer.predict(rows)


def baselines(
    train_rows: Dataset, test_rows: Dataset, label_set: LabelSet, shuffled: SailerTrainer | None
) -> dict[str, float]:
    """Macro-F1 of always naming the commonest training class, and of a system trained on shuffled labels."""
    found = {"baseline_majority_macro_f1": majority_class_f1(train_rows["label"], test_rows["label"], label_set)}
    if shuffled is not None:
        found["baseline_shuffled_macro_f1"] = shuffled.predict(test_rows).metrics["test_macro_f1"]
    return found


def calibrate(
    model: SailerForAudioClassification | SailerEnsemble, validation: SplitPrediction, sets: bool = True
) -> None:
    """Fit the natural prior's temperature on the validation set's soft labels, and the scores for prediction sets on
    its consensus; both are kept in the model's config.

    Args:
        model: a system or an ensemble.
        validation: what it says of clips that it was not trained on, and their labels.
        sets: False leaves the system without sets, for clips on which more than a temperature was fitted.
    """
    if "logits" not in validation.predictions:
        return
    distributions = validation.label_ids["labels"]
    known = ~np.isnan(distributions).any(axis=1)
    if known.any():
        _fit_temperature(model, validation.predictions, distributions, known)
    model.config.conformal = None
    if sets:
        probabilities, labels = known_probabilities(model, validation.predictions), validation.label_ids[CONSENSUS]
        model.config.conformal = fit_conformal(probabilities, labels, label_set_of(model.config))


def _fit_temperature(
    model: Any, outputs: Mapping[str, np.ndarray], distributions: np.ndarray, known: np.ndarray
) -> None:
    config = model.config
    if "member_logits" not in outputs:
        logits = outputs["logits"][known]
        config.calibration_temperature = fit_temperature(logits, distributions[known], config.label_weights)
        return
    config.calibration_temperature = 1.0  # an ensemble's divides what its members, each with its own, say together
    natural = _natural(model, outputs["member_logits"])
    if natural is None:
        logger.warning("A member's training weights are not known: the natural prior stays as it is.")
        return
    combined = np.log(natural.astype(np.float64).clip(min=1e-12))
    config.calibration_temperature = fit_temperature(combined[known], distributions[known])


def recalibrate(
    model: str | Path,
    corpus: str,
    data_dir: str | Path | None = None,
    split: str = "validation",
    corpus_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
) -> Path:
    """Fit a saved system's temperature and prediction sets on a split that it was not trained on, as training does at
    its end, and write them to its config.json.

    Args:
        model: folder of a system or an ensemble.
        corpus, data_dir, split, corpus_options, batch_size: labelled clips, see `evaluate_models`.

    Returns:
        The folder.

    Raises:
        ValueError: not a folder, or a system without the primary head.
        CorpusError: the corpus cannot be read, or lacks the split or its labels.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise ValueError(f"{model} is no folder, and calibration is written to one: name a system's folder.")
    ((system, processor),) = load_systems([folder])
    label_set = label_set_of(system.config)
    rows = labelled_rows(corpus, data_dir, split, label_set, corpus_options)
    prediction = predict(system, processor, rows, label_set, batch_size)
    calibrate(system, prediction)
    if system.config.conformal is None:
        raise ValueError(
            f"No clip of {corpus} ({split}) has a consensus among {list(label_set.scored)}: none was fit."
        )
    fitted = {name: getattr(system.config, name) for name in ("calibration_temperature", "conformal")}
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) | fitted
    with replacing(folder / "config.json") as beside:
        beside.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    clips = system.config.conformal["clips"]
    print(f"Temperature {system.config.calibration_temperature:.3f}, prediction sets from {clips} clips")
    return folder


def calibration_report(model: SailerForAudioClassification, prediction: SplitPrediction) -> dict[str, float]:
    """KL, JS and calibration error to the annotators under the natural prior, at temperature 1 and as fitted; and
    coverage and size of prediction sets, where the system has scores for them."""
    report: dict[str, float] = {}
    if "logits" not in prediction.predictions:
        return report
    logits, distributions = prediction.predictions["logits"], prediction.label_ids["labels"]
    temperatures = {"natural_uncalibrated": 1.0, "natural": model.config.calibration_temperature}
    for name, temperature in temperatures.items():
        probabilities = natural_probabilities(logits, model.config.label_weights, temperature)
        figures = distribution_metrics(probabilities, distributions)
        report |= {f"{name}_{key}": value for key, value in figures.items()}
    if model.config.conformal is not None:
        balanced, labels = softmax(logits, axis=1), prediction.label_ids[CONSENSUS]
        report |= set_figures(balanced, labels, label_set_of(model.config), model.config.conformal)
    return report


def summary(name: str, figures: Mapping[str, float]) -> str:
    """The figures of one split or system, and its baselines, for the terminal."""
    figures = without_prefix(figures)
    lines = [f"\n{name}: {figures.get('scored_clips', 0):.0f} scored clips"]
    return "\n".join(lines + [f"  {title:40s}{figures[key]:.4f}" for key, title in SUMMARY.items() if key in figures])


def draw_confusion(logits: np.ndarray, labels: np.ndarray, label_set: LabelSet, path: Path) -> None:
    """Plot the decisions on the scored clips; nothing if there is none."""
    scored = np.asarray(label_set.indices(label_set.scored))
    kept = np.isin(labels, scored)
    if kept.any():
        place = np.full(len(label_set.labels), -1)
        place[scored] = np.arange(len(scored))
        plot_confusion(place[labels[kept]], place[decisions(logits[kept], label_set)], label_set.scored, path)


def without_prefix(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures by the names of `emotion_report`, without the Trainer's prefix."""
    return {key.removeprefix("eval_").removeprefix("test_"): value for key, value in figures.items()}


@contextmanager
def _trainer(
    model: Any, processor: Any, rows: Dataset, label_set: LabelSet, batch_size: int
) -> Iterator[SailerTrainer]:
    with tempfile.TemporaryDirectory() as folder:
        yield SailerTrainer(
            model,
            SailerTrainingArguments(folder, per_device_eval_batch_size=batch_size),
            objective=SailerObjective(ObjectiveSettings(target_weighting="none")),
            label_set=label_set,
            data_collator=SailerCollator(processor, label_set, model.config.heads, model.config.max_seconds),
            eval_dataset=rows,
        )


def load_systems(models: Sequence[str | Path]) -> list[tuple[Any, Any]]:
    """Models and their processors; several systems come as one ensemble.

    Raises:
        ValueError: systems of different labels, or without the primary head (names them).
    """
    kinds = [SailerConfig.get_config_dict(model)[0].get("model_type") for model in models]
    if len(models) > 1 and SailerEnsembleConfig.model_type not in kinds:
        sources = list(models)
        return [(SailerEnsemble.from_pretrained(sources), SailerEnsembleProcessor.from_pretrained(sources))]
    loaded = [load_system(model) for model in models]
    first = loaded[0][0].config
    for name, (model, _) in zip(models, loaded, strict=True):
        if model.config.labels != first.labels:
            raise ValueError(f"{models[0]} has the labels {first.labels} and {name} {model.config.labels}.")
        if "primary" not in model.config.heads:
            raise ValueError(f"{name} predicts no primary emotions, only {model.config.heads}.")
    return loaded


def _has_labels(rows: Dataset) -> bool:
    columns = rows.select_columns(["label", "votes", "attributes"]).with_format("numpy")[:]
    return bool((columns["label"] >= 0).any() or columns["votes"].any() or np.isfinite(columns["attributes"]).any())


def _names(models: Sequence[str | Path], loaded: Sequence[Any]) -> list[list[str]]:
    """What the figures of each loaded model go by: its own name, or its members' and its own."""
    names = [str(name) for name in models]
    return [[*names, ENSEMBLE]] if len(loaded) < len(names) else [[name] for name in names]


def _evaluate(
    names: Sequence[str],
    model: Any,
    processor: Any,
    rows: Dataset,
    label_set: LabelSet,
    batch_size: int,
    is_labelled: bool,
) -> tuple[list[Evaluated], dict[str, np.ndarray]]:
    """The figures of a model, before them those of its members where they are named; and the targets."""
    with _trainer(model, processor, rows, label_set, batch_size) as trainer:
        if not is_labelled:
            trainer.compute_metrics = None
        prediction = trainer.predict(rows)
        outputs, targets = prediction.predictions, prediction.label_ids
        found = []
        for index, name in enumerate(names[:-1] if is_labelled else ()):
            member = model.members[index]
            own = {
                output: outputs[f"member_{output}"][:, model.config.having(head).index(index)]
                for output, head in HEAD_OF_OUTPUT.items()
                if head in member.config.heads and f"member_{output}" in outputs
            }
            wanted = {TARGET_OF_HEAD[head] for head in member.config.heads}
            asked = {key: value for key, value in targets.items() if key in wanted or key == CONSENSUS}
            said: Any = (own, asked)
            figures = trainer.report(EvalPrediction(*said))
            natural, conformal = _natural(member, own["logits"]), member.config.conformal
            found.append(Evaluated(name, own, figures, natural, conformal))
    natural = _natural(model, outputs.get("member_logits", outputs["logits"]))
    own = {name: value for name, value in outputs.items() if not name.startswith("member_")}
    figures = without_prefix(prediction.metrics)
    return [*found, Evaluated(names[-1], own, figures, natural, model.config.conformal)], targets


def _natural(model: Any, logits: np.ndarray) -> np.ndarray | None:
    try:
        return model.probabilities(torch.from_numpy(logits), "natural").numpy()
    except ValueError:  # its training weights are not known
        return None


def _write_submission(
    kind: str, system: Evaluated, rows: Dataset, label_set: LabelSet, file_list: str | Path | None, folder: Path
) -> None:
    """What a system says of a split, as the challenge's file."""
    names = [
        Path(audio["path"]).name if audio["path"] else f"{clip}.wav"
        for clip, audio in zip(rows["id"], rows["audio"], strict=True)
    ]
    said: Any = system.outputs.get("attributes", ())
    if kind == "categorical":
        said = [label_set.labels[index] for index in decisions(system.outputs["logits"], label_set)]
    elif not len(said):
        raise ValueError(f"{system.name} has no attributes head, which a submission of attributes needs.")
    wanted = None if file_list is None else read_file_list(file_list)
    write_submission(kind, folder / f"submission_{kind}.csv", dict(zip(names, said, strict=True)), wanted)


def _write_predictions(
    ids: Sequence[str], labels: np.ndarray, log_probabilities: np.ndarray, label_set: LabelSet, path: Path
) -> None:
    names = dict(enumerate(label_set.labels))
    decided = decisions(log_probabilities, label_set)
    with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "decision", *label_set.labels])
        for clip, label, decision, row in zip(ids, labels, decided, np.exp(log_probabilities), strict=True):
            writer.writerow(
                [clip, names.get(int(label), ""), names[int(decision)], *(f"{value:.6f}" for value in row)]
            )
