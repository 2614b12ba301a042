"""Systems and a labelled split in; figures, baselines and plots out. Several systems are averaged (paper, Table 5)."""

from __future__ import annotations

import csv
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import log_softmax, logsumexp

from sailer import SailerForAudioClassification, SailerProcessor, SailerTrainer, SailerTrainingArguments
from sailer.atomic import replacing
from sailer.data import CorpusError, LabelSet, load_corpus
from sailer.data.collator import SailerCollator
from sailer.training.calibration import fit_temperature, natural_probabilities
from sailer.training.losses import ObjectiveSettings, SailerObjective
from sailer.training.metrics import decisions, distribution_metrics, emotion_report, majority_class_f1
from sailer.training.plots import plot_confusion
from sailer.training.trainer import SplitPrediction

# What `summary` shows of a split's figures, if it has them.
SUMMARY = {
    "macro_f1": "macro-F1",
    "baseline_majority_macro_f1": "  always the commonest class",
    "baseline_shuffled_macro_f1": "  trained on shuffled labels",
    "accuracy": "accuracy",
    "min_map": "Min. mAP",
    "ccc": "CCC of the attributes",
    "kl": "KL from the annotators, balanced prior",
    "natural_kl": "  natural prior, fitted temperature",
    "ece": "calibration error, balanced prior",
    "natural_uncalibrated_ece": "  natural prior",
    "natural_ece": "  natural prior, fitted temperature",
}


def evaluate_models(
    models: Sequence[str | Path],
    corpus: str,
    data_dir: str | Path | None = None,
    split: str = "test",
    output_dir: str | Path | None = None,
    corpus_options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
) -> Path | None:
    """Evaluate systems on a split, each by itself and, of several, the mean of their probabilities; print the figures.

    Args:
        models: folders or Hub ids of systems with one label set.
        corpus: name known to `load_corpus`.
        data_dir: the corpus's folder.
        split: which of its splits.
        output_dir: where `metrics.json`, `predictions.csv` (id, label, decision and probabilities of each clip) and
            `confusion_matrix.png` go, if anywhere.
        corpus_options: further options of the corpus's loader.
        batch_size: clips per batch.

    Returns:
        The folder, if there is one.

    Raises:
        ValueError: systems of different labels, or without the primary head (names them).
        CorpusError: the corpus cannot be read or lacks the split (lists those it has).
    """
    loaded = [SailerForAudioClassification.from_pretrained(model) for model in models]
    config = loaded[0].config
    for name, model in zip(models, loaded, strict=True):
        if model.config.labels != config.labels:
            raise ValueError(f"{models[0]} has the labels {config.labels} and {name} {model.config.labels}.")
        if "primary" not in model.config.heads:
            raise ValueError(f"{name} predicts no primary emotions, only {model.config.heads}.")
    label_set = LabelSet(config.labels, config.majority_labels, config.scored_labels)
    splits = load_corpus(corpus, data_dir, label_set=label_set, **(corpus_options or {}))
    if split not in splits:
        raise CorpusError(f"Corpus {corpus} has no split {split!r}; it has {list(splits)}.")
    rows = splits[split]

    figures, probabilities = {}, []
    for name, model in zip(models, loaded, strict=True):
        prediction = predict(model, SailerProcessor.from_pretrained(name), rows, label_set, batch_size)
        figures[str(name)] = without_prefix(prediction.metrics)
        targets = prediction.label_ids
        probabilities.append(log_softmax(prediction.predictions["logits"], axis=1))
        print(summary(str(name), figures[str(name)]))
    mean = logsumexp(probabilities, axis=0) - math.log(len(models))
    if len(models) > 1:
        figures["ensemble"] = emotion_report(mean, targets["labels"], targets["consensus"], label_set)
        print(summary("ensemble", figures["ensemble"]))
    if output_dir is None:
        return None
    folder = Path(output_dir)
    write_json(figures, folder / "metrics.json")
    _write_predictions(rows["id"], targets["consensus"], mean, label_set, folder / "predictions.csv")
    draw_confusion(mean, targets["consensus"], label_set, folder / "confusion_matrix.png")
    return folder


def predict(
    model: SailerForAudioClassification,
    processor: SailerProcessor,
    rows: Dataset,
    label_set: LabelSet,
    batch_size: int = 8,
) -> SplitPrediction:
    """A system's outputs on canonical rows, the targets beside them, and `emotion_report` under keys with "test_"."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = SailerTrainingArguments(folder, per_device_eval_batch_size=batch_size)
        trainer = SailerTrainer(
            model,
            arguments,
            objective=SailerObjective(ObjectiveSettings(target_weighting="none")),
            label_set=label_set,
            data_collator=SailerCollator(processor, label_set, model.config.heads, model.config.max_seconds),
            eval_dataset=rows,
        )
        return trainer.predict(rows)


def baselines(
    train_rows: Dataset, test_rows: Dataset, label_set: LabelSet, shuffled: SailerTrainer | None
) -> dict[str, float]:
    """Macro-F1 of always naming the commonest training class, and of a system trained on shuffled labels."""
    found = {"baseline_majority_macro_f1": majority_class_f1(train_rows["label"], test_rows["label"], label_set)}
    if shuffled is not None:
        found["baseline_shuffled_macro_f1"] = shuffled.predict(test_rows).metrics["test_macro_f1"]
    return found


def calibrate(model: SailerForAudioClassification, validation: SplitPrediction) -> None:
    """Fit the natural prior's temperature on the validation set's soft labels and keep it in the model's config."""
    if "logits" in validation.predictions:
        distributions = validation.label_ids["labels"]
        known = ~np.isnan(distributions).any(axis=1)
        if known.any():
            model.config.calibration_temperature = fit_temperature(
                validation.predictions["logits"][known], distributions[known], model.config.label_weights
            )


def calibration_report(model: SailerForAudioClassification, prediction: SplitPrediction) -> dict[str, float]:
    """KL, JS and calibration error to the annotators under the natural prior, at temperature 1 and as fitted."""
    report: dict[str, float] = {}
    if "logits" not in prediction.predictions:
        return report
    logits, distributions = prediction.predictions["logits"], prediction.label_ids["labels"]
    temperatures = {"natural_uncalibrated": 1.0, "natural": model.config.calibration_temperature}
    for name, temperature in temperatures.items():
        probabilities = natural_probabilities(logits, model.config.label_weights, temperature)
        figures = distribution_metrics(probabilities, distributions)
        report |= {f"{name}_{key}": value for key, value in figures.items()}
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


def write_json(figures: Mapping[str, Any] | Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write figures as JSON, which has no NaN: what is not defined becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float | np.floating):
            return float(value) if math.isfinite(value) else None
        return value

    with replacing(path) as beside:
        beside.write_text(json.dumps(plain(figures), indent=1) + "\n")


def without_prefix(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures by the names of `emotion_report`, without the Trainer's prefix."""
    return {key.removeprefix("eval_").removeprefix("test_"): value for key, value in figures.items()}


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
