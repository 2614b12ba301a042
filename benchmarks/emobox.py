"""Recipes by EmoBox's protocol (arXiv 2406.07162): speaker-disjoint folds, all other clips train, no epoch is chosen.

    python benchmarks/emobox.py --data_dir RAVDESS --markdown outputs/emobox.md
    python benchmarks/emobox.py --corpus emo_db --data_dir EMO-DB --folds folds.json \
        --labels Angry Bored Disgust Fear Happy Neutral Sad

RAVDESS's six folds (8 classes, Calm among them) are built in; actors whose clips are not at hand are left out, which
is said. Another corpus takes a file of folds: JSON, fold -> ids of the clips that it tests, or fold -> {"train": ids,
"test": ids}. The figures are those of the last epoch, whatever a recipe says. Frozen towers encode each clip once, for
all folds and recipes alike. Finished runs are kept in OUTPUT_DIR/runs: a second call goes on where the first stopped.
The row "baseline of seconds" is scikit-learn's: the means over time of every layer of the best recipe's encoder,
standardised, 300 principal components, linear discriminant analysis with shrinkage.

The second table has each fold's UA, WA and macro-F1. Of several seeds two rows more are the mean of their figures,
fold by fold, and the figures of their ensemble, by the mean of their probabilities, as `sailer ensemble` does it.

The third table adapts each system to the speakers of the fold that tests it: every clip by n others of its speaker,
drawn --draws times, in turn of all emotions or of one alone, as `SpeechEmotionPipeline.adapt` does it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from datasets.utils.logging import disable_progress_bar
from tqdm.auto import tqdm
from transformers.utils import logging

from sailer.data import LabelSet, load_corpus
from sailer.data.folds import Fold, fold_rows, read_folds
from sailer.data.rendering import rendering_key
from sailer.data.schema import CorpusReport
from sailer.layers_sailer import reference_of
from sailer.settings import load_recipe, parse_overrides, resolve
from sailer.train import Job, fit, prepare
from sailer.training.arguments import TARGETS
from sailer.training.discriminant import discriminant_analysis
from sailer.training.evaluation import write_json
from sailer.training.features import FeatureStore
from sailer.training.metrics import decision_metrics, decisions
from sailer.training.trainer import CONSENSUS, SailerTrainer

SHARED = Path(__file__).resolve().parents[2] / "shared"
# EmoBox's folds of RAVDESS, by the actors that each tests.
RAVDESS_FOLDS = {
    **{"1": (1, 11, 20, 21), "2": (4, 10, 12, 14), "3": (8, 9, 19, 23)},
    **{"4": (3, 5, 7, 24), "5": (2, 15, 16, 18), "6": (6, 13, 17, 22)},
}
RAVDESS_LABELS = ("Angry", "Calm", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise")
# What EmoBox's table has for them (24 actors, frozen encoders): accuracy and macro-F1, in per cent.
PUBLISHED = {
    "EmoBox: Whisper large-v3 (635 M)": (75.9, 75.2),
    "EmoBox: WavLM large (315 M)": (72.2, 71.4),
    "EmoBox: HuBERT large (316 M)": (70.3, None),
}
BEST = "ravdess_whisper_base_best"
BASELINE = "baseline of seconds"
METRICS = {"uar": "UA", "accuracy": "WA", "macro_f1": "macro-F1"}
# How many recordings of a speaker adapt a system to them: of all emotions in turn, or of one (of which there are few).
BALANCED, ONE_EMOTION = (1, 3, 5, 10, 20), (1, 3, 5)
# A fold has no clips to choose by, and these would choose; places are the benchmark's own.
NOT_OF_A_RECIPE = ("corpus", "data_dir", "corpus_options", "output_dir", "metric_for_best_model", "validation_split")
PROTOCOL = {"validation_split": "test", "load_best_model_at_end": False, "eval_strategy": "no", "save_strategy": "no"}


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    logging.disable_progress_bar()
    disable_progress_bar()
    report = CorpusReport()
    rows = read_rows(options, report)
    folds = read_fold_rows(options, rows, report)
    print("\n".join(report.lines()))
    results: dict[str, dict[str, dict[str, float]]] = {}
    if options.baseline:
        results[BASELINE] = run_baseline(options, rows, folds)
    for recipe in options.recipes:
        title, runs = Path(recipe).stem, []
        for seed in options.seeds:
            name = title + (f", seed {seed}" if len(options.seeds) > 1 else "")
            runs.append(
                {
                    fold: run(recipe_of(recipe, seed, options), rows, sides, options, f"{name}, fold {fold}")
                    for fold, sides in tqdm(folds.items(), desc=name, unit="fold")
                }
            )
            results[name] = {fold: found["metrics"] for fold, found in runs[-1].items()}
        if len(runs) > 1:
            figures = [results[f"{title}, seed {seed}"] for seed in options.seeds]
            results[f"{title}, mean of {len(runs)} seeds"] = mean_of(figures)
            results[f"{title}, ensemble of {len(runs)} seeds"] = ensemble_of(runs, labels_of(options))
    text = table(results, options.corpus == "ravdess" and options.folds is None)
    text += "\n\n" + fold_table(results) + "\n\n" + adaptation_table(results)
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text("\n\n".join(["\n".join(report.lines()), text]) + "\n", encoding="utf-8")
    if options.json:
        write_json({"report": report.lines(), "results": results}, options.json)


def read_rows(options: argparse.Namespace, report: CorpusReport) -> Dataset:
    """Every clip of the corpus, whatever its split."""
    corpus_options: dict[str, Any] = parse_overrides(["--corpus_options", options.corpus_options])["corpus_options"]
    if options.corpus == "ravdess":
        everyone = {"train_actors": "1-24", "validation_actors": [], "test_actors": []}
        corpus_options = everyone | corpus_options
    label_set = labels_of(options)
    corpus = load_corpus(options.corpus, options.data_dir, label_set=label_set, report=report, **corpus_options)
    return concatenate_datasets(list(corpus.values()))


def read_fold_rows(options: argparse.Namespace, rows: Dataset, report: CorpusReport) -> dict[str, Fold]:
    """The folds that there are clips of."""
    ids, speakers = rows["id"][:], rows["speaker"][:]
    if options.folds is not None:
        folds = read_folds(options.folds)
        allowed = {"allow_missing": options.allow_missing, "allow_shared_speakers": options.allow_shared_speakers}
        return fold_rows(folds, ids, speakers, report, **allowed)
    if options.corpus != "ravdess":
        raise SystemExit(f"--folds: only RAVDESS's folds are built in; give a file of {options.corpus}'s.")
    clips: dict[str, list[str]] = {}
    for clip, speaker in zip(ids, speakers, strict=True):
        clips.setdefault(speaker, []).append(clip)
    by_fold = {}
    for name, actors in RAVDESS_FOLDS.items():
        by_fold[name] = [clip for actor in actors for clip in clips.get(f"ravdess-{actor:02d}", [])]
        absent = [actor for actor in actors if f"ravdess-{actor:02d}" not in clips]
        if absent:
            report.note(f"Fold {name} lacks the clips of actors {absent}: it tests {len(actors) - len(absent)}.")
    return fold_rows({name: fold for name, fold in by_fold.items() if fold}, ids, speakers, report)


def labels_of(options: argparse.Namespace) -> LabelSet:
    """The classes: those that are given, or RAVDESS's eight. None is a majority class: nothing is dropped or mixed."""
    if options.labels is None and options.corpus != "ravdess":
        raise SystemExit(f"--labels: name the classes of {options.corpus}.")
    return LabelSet(options.labels or RAVDESS_LABELS, ())


def recipe_of(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """A recipe's options in a fold, under the protocol."""
    recipe = {option: value for option, value in load_recipe(name).items() if option not in NOT_OF_A_RECIPE}
    classes = labels_of(options)
    labels = {"labels": list(classes.labels), "majority_labels": [], "scored_labels": list(classes.scored)}
    if recipe.get("cache_features", "off") != "off":
        recipe["cache_features"] = "disk"
    backbone = {"audio_backbone": options.audio_backbone} if options.audio_backbone else {}
    return {**recipe, **labels, **PROTOCOL, **backbone, "seed": seed, "corpus": options.corpus, "disable_tqdm": True}


def prepare_fold(recipe: Mapping[str, Any], rows: Dataset, fold: Fold, options: argparse.Namespace, place: str) -> Job:
    """The recipe's job on the clips of a fold, with its checkpoints below `place`."""
    paths = {"output_dir": place, "feature_cache_dir": str(options.output_dir / "features")}
    corpus = DatasetDict({"train": rows.select(fold.train), "test": rows.select(fold.test)})
    with contextlib.redirect_stdout(io.StringIO()):
        return prepare(resolve(recipe, paths, origin="emobox"), corpus)


def run(
    recipe: Mapping[str, Any], rows: Dataset, fold: Fold, options: argparse.Namespace, title: str
) -> dict[str, Any]:
    """A recipe trained on one side of a fold and tested on the other: `metrics`, and of each tested clip `labels` and
    `probabilities`. A run that is there already is read."""
    clips = [rows.select(side)["id"][:] for side in fold]
    key = hashlib.sha256(json.dumps([recipe, *clips]).encode()).hexdigest()[:16]
    path = options.output_dir / "runs" / f"{key}.json"
    if path.exists() and "probabilities" in (found := json.loads(path.read_text(encoding="utf-8"))):
        return found
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        job = prepare_fold(recipe, rows, fold, options, place)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = fit(job)
            tested = trainer.predict(job.corpus["test"])
            taken = {"seconds": time.perf_counter() - started}
            adapted = adapt(job, trainer, options.draws) if job.system.model.config.speaker_reference else {}
    found: dict[str, Any] = {"title": title, "finished": datetime.now().isoformat(timespec="seconds")}
    found |= {"recipe": dict(recipe), "metrics": {name: tested.metrics[f"test_{name}"] for name in METRICS}}
    found["metrics"] |= taken | adapted
    found["labels"] = tested.label_ids["consensus"].tolist()
    said = torch.from_numpy(tested.predictions["logits"]).softmax(-1)
    found["probabilities"] = [[round(share, 6) for share in row] for row in said.tolist()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(found, path)
    return found


def adapt(job: Job, trainer: SailerTrainer, draws: int) -> dict[str, float]:
    """The macro-F1 on a fold's clips, each adapted by others of its speaker, by how many and of which emotions."""
    rows, model = job.corpus["test"], job.system.model
    labels, speakers = np.asarray(rows["label"]), np.asarray(rows["speaker"])

    batch = trainer.evaluation_collator([rows[place] for place in range(len(rows))])
    inputs = {name: value for name, value in batch.items() if name not in (*TARGETS, CONSENSUS)}

    def said(shifts: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        means, logits = [], []
        for start in range(0, len(rows), 32):
            part = {name: value[start : start + 32].to(model.device) for name, value in inputs.items()}
            own = None if shifts is None else shifts[start : start + 32].to(model.device)
            with torch.no_grad():
                outputs = model(**part, speaker_shift=own)
            means.append(outputs.speech_means.float().cpu())
            logits.append(outputs.logits.float().cpu())
        return torch.cat(means), torch.cat(logits)

    model.eval()
    means, logits = said(None)
    reference, probabilities = reference_of(model).cpu(), logits.softmax(-1)
    figures = {}
    for kind, counts in (("balanced", BALANCED), ("one emotion", ONE_EMOTION)):
        for count in counts:
            scores = []
            for draw in range(draws):
                generator = np.random.default_rng([count, draw, kind == "balanced"])
                shifts = torch.zeros_like(means)
                for place in range(len(rows)):
                    others = choose(place, labels, speakers, count, kind == "balanced", generator)
                    shifts[place] = reference.shift(reference.statistics(means[others], probabilities[others]))
                decided = decisions(said(shifts)[1].numpy(), job.system.label_set)
                scores.append(decision_metrics(decided, labels, job.system.label_set)["macro_f1"])
            figures[f"{kind}, {count}"] = statistics.fmean(scores)
    return figures


def choose(
    place: int, labels: np.ndarray, speakers: np.ndarray, count: int, balanced: bool, generator: np.random.Generator
) -> list[int]:
    """Up to `count` other clips of a clip's speaker: of all emotions in turn, or of one that is drawn."""
    others = [row for row in np.flatnonzero(speakers == speakers[place]) if row != place]
    others = [others[row] for row in generator.permutation(len(others))]
    if balanced:
        turn = {row: sum(labels[row] == labels[other] for other in others[:at]) for at, row in enumerate(others)}
        return sorted(others, key=turn.__getitem__)[:count]
    emotion = generator.choice(sorted({labels[row] for row in others})) if others else None
    return [row for row in others if labels[row] == emotion][:count]


def run_baseline(options: argparse.Namespace, rows: Dataset, folds: Mapping[str, Fold]) -> dict[str, dict[str, float]]:
    """The baseline's figures by fold, from the states that the best recipe keeps."""
    recipe = recipe_of(BEST, 0, options)
    with tempfile.TemporaryDirectory() as place:
        every = sorted({row for fold in folds.values() for side in fold for row in side})
        job = prepare_fold(recipe, rows, Fold(every, every), options, place)
    assert job.features is not None, f"{BEST} keeps its encoder's states"
    found, labels = clip_means(job.features, rows.select(every)), np.asarray(rows["label"])
    means = np.zeros((len(rows), found.shape[1]), found.dtype)
    means[every] = found
    results = {}
    for name, fold in folds.items():
        started = time.perf_counter()
        train = [row for row in fold.train if labels[row] >= 0]
        classifier = discriminant_analysis(means[train].shape)
        classifier.fit(means[train], labels[train])
        figures = decision_metrics(classifier.predict(means[fold.test]), labels[fold.test], job.system.label_set)
        results[name] = {key: figures[key] for key in METRICS} | {"seconds": time.perf_counter() - started}
    return results


def clip_means(features: FeatureStore, rows: Dataset) -> np.ndarray:
    """Each clip's mean over time of every layer, side by side: (clips, layers * width)."""
    means = []
    for row in rows.select_columns(["id", "transcript"]):
        batch = features.inputs([rendering_key(row)], [row["transcript"]])
        states, frames = batch["pooled_hidden_states"][0].float(), batch["attention_mask"][0].float()
        means.append(torch.einsum("lgw,g->lw", states, frames / frames.sum()).flatten())
    return torch.stack(means).numpy()


def mean_of(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean of several runs' figures, fold by fold; those that every run has."""
    return {
        fold: {key: statistics.fmean(run[fold][key] for run in runs) for key in runs[0][fold] if key in runs[-1][fold]}
        for fold in runs[0]
    }


def ensemble_of(runs: Sequence[Mapping[str, Any]], label_set: LabelSet) -> dict[str, dict[str, float]]:
    """The figures, fold by fold, of the mean of several runs' probabilities."""
    figures = {}
    for fold in runs[0]:
        mean = np.mean([run[fold]["probabilities"] for run in runs], axis=0)
        scores = decision_metrics(decisions(mean, label_set), np.array(runs[0][fold]["labels"]), label_set)
        seconds = sum(run[fold]["metrics"]["seconds"] for run in runs)
        figures[fold] = {key: scores[key] for key in METRICS} | {"seconds": seconds}
    return figures


def table(results: Mapping[str, Mapping[str, Mapping[str, float]]], with_published: bool) -> str:
    """Figures in per cent: means over the folds, their standard deviation, and the macro-F1 of each."""
    text = ["| system | folds | UA | WA | macro-F1 | macro-F1 by fold | seconds |", "|---|--:|--:|--:|--:|---|--:|"]
    for name, folds in results.items():
        columns = {key: [100 * fold[key] for fold in folds.values()] for key in METRICS}
        means = [f"{statistics.fmean(column):.1f}" for column in columns.values()]
        if len(folds) > 1:
            means[-1] += f" ± {statistics.stdev(columns['macro_f1']):.1f}"
        by_fold = ", ".join(f"{value:.1f}" for value in columns["macro_f1"])
        seconds = sum(fold["seconds"] for fold in folds.values())
        text.append(f"| {' | '.join([name, str(len(folds)), *means, by_fold, f'{seconds:.0f}'])} |")
    for name, (accuracy, f1) in PUBLISHED.items() if with_published else ():
        text.append(f"| {name} | 6 |  | {accuracy} | {'' if f1 is None else f1} |  |  |")
    return "\n".join(text)


def fold_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """UA, WA and macro-F1 in per cent by fold."""
    names = list(dict.fromkeys(fold for folds in results.values() for fold in folds))
    text = [f"| {', '.join(METRICS.values())} | {' | '.join(f'fold {name}' for name in names)} |"]
    text += ["|---|" + "--:|" * len(names)]
    for name, folds in results.items():
        cells = [", ".join(f"{100 * folds[fold][key]:.1f}" for key in METRICS) for fold in names]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def adaptation_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Macro-F1 in per cent by how many recordings of the speaker adapted a system: means over folds and draws."""
    cases = [f"balanced, {count}" for count in BALANCED] + [f"one emotion, {count}" for count in ONE_EMOTION]
    text = [f"| system, adapted by | 0 | {' | '.join(cases)} |", "|---|" + "--:|" * (1 + len(cases))]
    for name, folds in results.items():
        if all(case in fold for fold in folds.values() for case in cases):
            figures = [statistics.fmean(fold[case] for fold in folds.values()) for case in ("macro_f1", *cases)]
            text.append(f"| {name} | {' | '.join(f'{100 * figure:.1f}' for figure in figures)} |")
    return "\n".join(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    backbone, ravdess = SHARED / "models" / "whisper-base-encoder", SHARED / "corpora" / "ravdess"
    parser.add_argument("--corpus", default="ravdess", help="a corpus of `sailer data --help` (default: %(default)s)")
    parser.add_argument(
        "--data_dir", type=Path, default=ravdess if ravdess.is_dir() else None, help="the corpus's folder"
    )
    parser.add_argument("--corpus_options", default="{}", metavar="YAML", help="as in a recipe: '{option: value}'")
    parser.add_argument("--labels", nargs="+", help="the classes (default: RAVDESS's eight)")
    parser.add_argument("--folds", type=Path, metavar="FILE", help="JSON (default: EmoBox's folds of RAVDESS)")
    parser.add_argument("--allow_missing", action="store_true", help="leave out clips that are not at hand")
    parser.add_argument("--allow_shared_speakers", action="store_true", help="where the protocol has them")
    parser.add_argument("--recipes", nargs="*", default=[BEST], help="names or files (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--audio_backbone", default=str(backbone) if backbone.is_dir() else None, metavar="DIR")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True, help="scikit-learn's row")
    parser.add_argument("--draws", type=int, default=3, help="of the recordings that adapt (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/emobox"))
    parser.add_argument("--markdown", type=Path, help="write what is printed to this file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
