"""The paper's ablations (Tables 3 and 4), and ours of objective, weighting and layers, as one table with spreads.

    python benchmarks/ablation.py --markdown outputs/ablation.md

Every run is a recipe trained by train.py's own functions, on a frozen speech encoder whose features are kept on disk,
so that it trains heads alone (but for one row that fine-tunes the encoder). Synthetic rows: one corpus with simulated
votes and one training seed per --seeds; the epoch is chosen on its validation split, the figures are the balanced test
split's. RAVDESS rows (it has no votes, so nothing that needs them): five folds of four test actors of 1 to 20; two
others choose the epoch, and 14 train. Rows of RAVDESS with votes: recordings of 12 actors, as many of each emotion as
the challenge has in proportion, and votes by simulated annotators (benchmarks/parts/votes.py); six other actors test.
For each of --vote_seeds other actors, clips, votes and first weights; the rows of a seed share them.
Finished runs are found again in OUTPUT_DIR/runs.jsonl: a second call goes on where the first stopped, and two at once
(--corpora synthetic, --corpora ravdess) share the work; each prints what there is so far.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import DatasetDict
from datasets.utils.logging import disable_progress_bar
from parts.votes import draw_actors, with_votes
from scipy.stats import t
from tqdm.auto import tqdm
from transformers.utils import logging

from sailer.data.schema import LabelSet
from sailer.ensemble_sailer import load_system
from sailer.settings import DataSettings, Settings, load_recipe, resolve
from sailer.train import fit, prepare, read_corpus
from sailer.training.ensembling import build_ensemble
from sailer.training.evaluation import predict

SHARED = Path(__file__).resolve().parents[2] / "shared"
FOLDS, ACTORS_PER_FOLD, VALIDATING, ACTORS = 5, 4, 2, 20
METRICS = {"macro_f1": "macro-F1", "accuracy": "accuracy", "min_map": "Min. mAP"}
GAINS = ("macro_f1", "min_map")

# What every row starts from: the paper's method for speech alone, but at another rate and batch size: these corpora
# are a hundredth of its own, and at its 5e-4 the heads would be barely trained after 15 epochs.
BASE: dict[str, Any] = {
    "heads": ["primary"],
    "audio_layers": "last",
    "objective": "kl",
    "target_weighting": "product",
    "learning_rate": 1e-3,
    "num_train_epochs": 15,
    "per_device_train_batch_size": 16,
    "metric_for_best_model": "macro_f1",
    "cache_features": "disk",
    "feature_dtype": "float16",
    "disable_tqdm": True,
}
DROPOUT = {"annotation_dropout": 0.2}
# Mixes are the same in every row of a seed: three plans take turns, so that features can be kept.
MIXING = {"mixing_probability": 0.3, "augmentation_variants": 3}
BOTH = {**DROPOUT, **MIXING}
# What augmentation against rare classes does where class weights do not do it already.
UNWEIGHTED = {"target_weighting": "none"}
SECONDARY, ATTRIBUTES = ["primary", "secondary"], ["primary", "attributes"]


@dataclass(frozen=True)
class Row:
    """One line of the table: what is changed from BASE, and the paper's macro-F1 and Min. mAP (MSP-Podcast), if it has
    the row."""

    setting: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    paper: tuple[float, float] | None = None


# The teacher of a row that is distilled: the mean of so many systems that differ in their seed, trained beforehand.
TEACHERS = "three of kl to the votes"
TEACHER_SEEDS = (100, 200, 300)
AVERAGED = {"averaged": TEACHERS}  # the row of the teacher itself
DISTILLED = {"objective": "distil", "teacher": TEACHERS}
NO_OPTIONS = ("votes", "averaged")  # of a run, which `resolve` does not know
LAYERS = (
    Row("last layer"),
    Row("weighted sum", {"audio_layers": "weighted"}),
    Row("weighted sum of normalised layers", {"audio_layers": "weighted_norm"}),
    Row("normalised layers side by side", {"audio_layers": "concat_norm"}),
)
# Groups of rows; each is compared with the first of its group.
GROUPS: dict[str, dict[str, tuple[Row, ...]]] = {
    "synthetic": {
        "augmentation (Table 3)": (
            Row("none", paper=(0.401, 0.301)),
            Row("annotation dropout", DROPOUT, (0.403, 0.321)),
            Row("audio mixing", MIXING, (0.404, 0.336)),
            Row("both", BOTH, (0.406, 0.328)),
        ),
        "auxiliary targets (Table 4)": (
            Row("none", BOTH, (0.406, 0.328)),
            Row("secondary emotions", {**BOTH, "heads": SECONDARY}, (0.409, 0.322)),
            Row("attributes", {**BOTH, "heads": ATTRIBUTES}, (0.407, 0.305)),
            Row("both", {**BOTH, "heads": [*SECONDARY, "attributes"]}, (0.411, 0.316)),
        ),
        "objective": (
            Row("kl to the votes"),
            Row("ce to the consensus", {"objective": "ce"}),
            Row("three of the first row, averaged", AVERAGED),
            Row("distilled from those three", DISTILLED),
        ),
        "weighting": (
            Row("product (paper)"),
            Row("normalized", {"target_weighting": "normalized"}),
            Row("none", {"target_weighting": "none"}),
        ),
        "layers": LAYERS,
    },
    "ravdess": {
        "augmentation (Table 3)": (
            Row("none"),
            Row("audio mixing", MIXING),
            Row("same-emotion mixing", {**MIXING, "mixing_mode": "same_emotion"}),
        ),
        "auxiliary targets": (Row("none"), Row("speaker sex", {"heads": ["primary", "sex"]})),
        # With one vote a clip, a product that is normalised again is the vote itself: the same as no weighting.
        "weighting": (Row("product (paper)"), Row("none", {"target_weighting": "none"})),
        "layers": LAYERS,
    },
    "ravdess_votes": {
        "augmentation (Table 3)": (
            Row("none", paper=(0.401, 0.301)),
            Row("annotation dropout", DROPOUT, (0.403, 0.321)),
            Row("audio mixing", MIXING, (0.404, 0.336)),
            Row("both", BOTH, (0.406, 0.328)),
        ),
        "unweighted": (
            Row("none", UNWEIGHTED),
            Row("annotation dropout", {**UNWEIGHTED, **DROPOUT}),
            Row("audio mixing", {**UNWEIGHTED, **MIXING}),
            Row("both", {**UNWEIGHTED, **BOTH}),
        ),
        "distillation": (
            Row("kl to the votes"),
            Row("three of the first row, averaged", AVERAGED),
            Row("distilled from those three", DISTILLED),
        ),
    },
}
BEST = "ravdess_whisper_base_best"
RECIPES = ("ravdess_whisper_base", BEST)
# The best recipe again, but for the upper half of Whisper base.
FINE_TUNING = {
    "freeze_audio": False,
    "trainable_audio_layers": 3,
    "state_mixup": 0.0,  # which is for kept states
    "backbone_learning_rate": 1e-4,
    "num_train_epochs": 6,
    "per_device_train_batch_size": 16,
}
# RAVDESS with votes: the best recipe, whose pooled states are soon trained on, without the label that no clip has.
VOTING = {
    "labels": ["Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise", "Other"],
    # As the best recipe was before it augmented by itself, which would hide what these rows compare.
    **{"frame_pooling": 64, "num_train_epochs": 20, "state_mixup": 0.0, "audio_layers": "weighted_norm"},
    **{"trim_silence": None, "speed_perturbation": 0.0, "augmentation_variants": 0},
}
VOTES = {"annotators": 5, "fewest": 12}
# The recipe's own choice of these does not hold in a fold.
NOT_OF_A_RECIPE = (
    *("corpus", "data_dir", "corpus_options", "audio_backbone", "audio_backbone_id", "cache_features", "output_dir"),
    "seed",
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(arguments)
    options.command = sys.argv[1:] if arguments is None else arguments
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    disable_progress_bar()
    groups = rows_to_run(options)
    rows = [
        runs_of(corpus, row, options)
        for corpus in options.corpora
        for part, members in groups.get(corpus, {}).items()
        if not options.parts or part.split()[0] in options.parts
        for row in members
    ]
    # All rows of a seed or fold before the next one's: cut short, the rows still compare.
    in_turn = chain.from_iterable(zip_longest(*(runs.items() for runs in rows)))
    for key, recipe in tqdm(dict(filter(None, in_turn)).items(), desc="Runs", unit="run"):
        if key not in finished(folder):
            record = {"key": key, "recipe": recipe, **run(recipe, folder / "features")}
            with open(folder / "runs.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
    lines = table(groups, finished(folder), options)
    facts = [f"{name}: {value}  " for name, value in conditions(options).items()]
    text = "\n".join([*facts, "", markdown(lines)])
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        options.json.write_text(json.dumps({**conditions(options), "rows": lines}, indent=2) + "\n")


def rows_to_run(options: argparse.Namespace) -> dict[str, dict[str, tuple[Row, ...]]]:
    """The groups of rows by corpus, the recipes' among them; RAVDESS only where there is a copy."""
    groups = {"synthetic": GROUPS["synthetic"]}
    if options.ravdess is None:
        print("No copy of RAVDESS (--ravdess DIR): its rows are left out.", file=sys.stderr)
        return groups
    recipes = [Row(Path(name).stem, recipe_options(name)) for name in options.recipes]
    recipes.append(Row("upper half of the encoder fine-tuned", {**recipe_options(BEST), **FINE_TUNING}))
    ravdess = {**GROUPS["ravdess"], "recipe": tuple(recipes)}
    return {**groups, "ravdess": ravdess, "ravdess_votes": GROUPS["ravdess_votes"]}


def recipe_options(name: str) -> dict[str, Any]:
    """A recipe's options that hold in every fold."""
    return {option: value for option, value in load_recipe(name).items() if option not in NOT_OF_A_RECIPE}


def runs_of(corpus: str, row: Row, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The recipe of each seed or fold of a row, by a digest of it: equal runs of several rows are one."""
    recipes = []
    base = {**recipe_options(BEST), **VOTING} if corpus == "ravdess_votes" else {}
    common = {**BASE, "num_train_epochs": options.epochs, **base, **row.changes}
    if options.bf16:
        common |= {"bf16": True, "use_cpu": not torch.cuda.is_available()}  # transformers wants this said
    common["audio_backbone"] = str(options.audio_backbone)
    if common.get("freeze_audio") is False:
        common["cache_features"] = "off"
    if corpus == "synthetic":
        for seed in options.seeds:
            corpus_options = {**options.synthetic, "seed": seed}
            recipes.append({"corpus": corpus, "corpus_options": corpus_options, "seed": seed, **common})
    elif corpus == "ravdess_votes":
        for seed in options.vote_seeds:
            data = {"corpus": "ravdess", "data_dir": str(options.ravdess), "corpus_options": draw_actors(seed, ACTORS)}
            recipes.append({**data, "votes": {**VOTES, "seed": seed}, "seed": seed, **common})
    else:
        for fold in options.folds:
            data = {"corpus": corpus, "data_dir": str(options.ravdess), "corpus_options": fold_actors(fold)}
            recipes.append({**data, "seed": 0, **common})
    return {_digest(recipe): recipe for recipe in recipes}


def fold_actors(fold: int) -> dict[str, list[int]]:
    """RAVDESS's actors 1 to 20 in fold 1 to 5: four consecutive ones test, the next two validate, 14 others train."""
    order = [(ACTORS_PER_FOLD * (fold - 1) + place) % ACTORS + 1 for place in range(ACTORS)]
    return {
        "test_actors": order[:ACTORS_PER_FOLD],
        "validation_actors": order[ACTORS_PER_FOLD : ACTORS_PER_FOLD + VALIDATING],
        "train_actors": sorted(order[ACTORS_PER_FOLD + VALIDATING :]),
    }


def run(recipe: Mapping[str, Any], features: Path) -> dict[str, Any]:
    """Train a recipe and test it.

    Args:
        recipe: options as in a recipe's file; `votes`, options of `with_votes`, where votes are to be simulated.
        features: folder that all runs keep frozen features in; teachers are kept beside it.

    Returns:
        `metrics` on the test split, `seconds` of wall time, and when it `finished`.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        paths = {"output_dir": folder, "feature_cache_dir": str(features)}
        options = options_of(recipe)
        settings = resolve(options, paths, origin="ablation")
        label_set = settings.data.label_set()
        corpus = _corpus(settings, label_set)
        corpus = with_votes(corpus, label_set, **recipe["votes"]) if "votes" in recipe else corpus
        teacher = make_teacher(recipe, corpus, features) if TEACHERS in recipe.values() else None
        if "averaged" in recipe:
            metrics = predict(*load_system(teacher), corpus["test"], label_set).metrics
        else:
            own = options if teacher is None else options | {"teacher": str(teacher)}
            job = prepare(resolve(own, paths, origin="ablation"), corpus)
            metrics = fit(job).predict(job.corpus["test"]).metrics
    return {
        "metrics": {name: metrics[f"test_{name}"] for name in METRICS},
        "seconds": round(time.perf_counter() - started, 1),
        "finished": datetime.now().isoformat(timespec="seconds"),
    }


def options_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run `resolve` knows."""
    return {name: value for name, value in recipe.items() if name not in NO_OPTIONS}


def make_teacher(recipe: Mapping[str, Any], corpus: DatasetDict, features: Path) -> Path:
    """An ensemble of systems that learn the votes, each from other first weights and in another order.

    The rows of a seed have one: what is there already is not trained again.

    Args:
        recipe: that of the student, or of the row of the teacher itself.
        corpus: with its votes.
        features: as in `run`.

    Returns:
        The ensemble's folder, in `teachers` beside the features.
    """
    votes = {"votes": recipe["votes"]} if "votes" in recipe else {}
    own = {name: value for name, value in options_of(recipe).items() if name != "teacher"} | {"objective": "kl"}
    place = features.parent / "teachers" / _digest({**own, **votes, "teacher_seeds": TEACHER_SEEDS})
    if place.is_dir():
        return place
    with tempfile.TemporaryDirectory() as folder:
        members = []
        for seed in TEACHER_SEEDS:
            members.append(Path(folder) / f"teacher_{seed}")
            paths = {"output_dir": str(members[-1]), "feature_cache_dir": str(features), "seed": recipe["seed"] + seed}
            job = prepare(resolve(own, paths, origin="ablation"), corpus)
            fit(job)
            job.system.model.save_pretrained(members[-1])
            job.system.processor.save_pretrained(members[-1])
        return build_ensemble(members, place)


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs that a folder holds, by their key; a line that was cut short counts as not run."""
    records = {}
    path = folder / "runs.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            records[record["key"]] = record
    return records


def table(
    groups: Mapping[str, Mapping[str, tuple[Row, ...]]],
    records: Mapping[str, Mapping[str, Any]],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One dictionary a row: its metrics over the finished runs as (mean, standard deviation), and for each metric of
    GAINS the mean difference from the group's first row, seed by seed or fold by fold, with its 95 % interval."""
    lines = []
    for corpus, parts in groups.items():
        for part, rows in parts.items():
            for row in rows:
                runs = _scores(corpus, row, records, options)
                first = _scores(corpus, rows[0], records, options)
                line = {"corpus": corpus, "part": part, "setting": row.setting, "paper": row.paper}
                line["runs"] = len([run for run in runs if run])
                line |= {name: _spread([run[name] for run in runs if run]) for name in METRICS}
                pairs = [(run, base) for run, base in zip(runs, first, strict=True) if run and base]
                for name in GAINS:
                    gains = [] if row is rows[0] else [run[name] - base[name] for run, base in pairs]
                    line[f"{name}_gain"] = _with_interval(gains)
                lines.append(line)
    return lines


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """The rows that have run; a gain is set in bold where its interval leaves 0 out."""
    gains = [f"{METRICS[name]} to first row" for name in GAINS]
    titles = ["corpus", "rows", "setting", "runs", *METRICS.values(), *gains, "paper"]
    text = ["| " + " | ".join(titles) + " |", "|---|---|---|" + "--:|" * (len(titles) - 3)]
    for line in lines:
        if line["runs"]:
            cells = [line["corpus"], line["part"], line["setting"], str(line["runs"])]
            cells += ["{:.3f} ± {:.3f}".format(*line[name]) for name in METRICS]
            cells += [_show_gain(line[f"{name}_gain"]) for name in GAINS]
            cells.append("" if line["paper"] is None else "{:.3f}, {:.3f}".format(*line["paper"]))
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def conditions(options: argparse.Namespace) -> dict[str, str]:
    """When, on what and how the table was made."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return {
        "date": datetime.now().date().isoformat(),
        "hardware": f"{model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "software": ", ".join([f"Python {platform.python_version()}", *versions]),
        "command": "python benchmarks/ablation.py " + " ".join(options.command),
        "speech encoder": f"{Path(options.audio_backbone).name}, frozen but where a row says otherwise",
        "figures": "mean ± standard deviation over seeds or folds, on the test split; to first row: mean difference "
        "by seed or fold, with its 95 % interval by Student's t; paper: macro-F1 and Min. mAP on MSP-Podcast",
    }


def _digest(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def _scores(
    corpus: str, row: Row, records: Mapping[str, Mapping[str, Any]], options: argparse.Namespace
) -> list[dict[str, float] | None]:
    """Test metrics of each seed or fold of a row; None for one that has not run."""
    return [records[key]["metrics"] if key in records else None for key in runs_of(corpus, row, options)]


def _spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and sample standard deviation (0 of a single value); None of no values."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _with_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean, and its 95 % interval by Student's t (NaN of a single value); None of no values."""
    if not values:
        return None
    mean, reach = statistics.fmean(values), math.nan
    if len(values) > 1:
        reach = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def _show_gain(gain: tuple[float, float, float] | None) -> str:
    if gain is None:
        return ""
    mean, low, high = gain
    if math.isnan(low):
        return f"{mean:+.3f}"
    shown = f"**{mean:+.3f}**" if low > 0 or high < 0 else f"{mean:+.3f}"
    return f"{shown} ({low:+.3f} to {high:+.3f})"


def _corpus(settings: Settings, label_set: LabelSet) -> DatasetDict:
    data = settings.data
    return _read(json.dumps([data.corpus, data.data_dir, data.corpus_options]), label_set)


@lru_cache(maxsize=8)
def _read(description: str, label_set: LabelSet) -> DatasetDict:
    corpus, data_dir, corpus_options = json.loads(description)
    return read_corpus(DataSettings(corpus=corpus, data_dir=data_dir, corpus_options=corpus_options), label_set)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    backbone, ravdess = SHARED / "models" / "whisper-base-encoder", SHARED / "corpora" / "ravdess"
    parser.add_argument(
        "--audio_backbone",
        default=str(backbone) if backbone.is_dir() else "openai/whisper-base",
        help="frozen speech encoder: folder or Hub id (default: %(default)s)",
    )
    parser.add_argument(
        "--ravdess", type=Path, default=ravdess if ravdess.is_dir() else None, help="folder of RAVDESS"
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="recipes to compare in the folds")
    parser.add_argument("--corpora", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="what to run now")
    parts = list(dict.fromkeys(part.split()[0] for rows in GROUPS.values() for part in (*rows, "recipe")))
    parser.add_argument("--parts", nargs="+", choices=parts, help="groups of rows to run now (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--vote_seeds", nargs="+", type=int, default=[*range(10)], help="of RAVDESS with votes")
    parser.add_argument("--folds", nargs="+", type=int, choices=range(1, FOLDS + 1), default=[1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=int, default=BASE["num_train_epochs"])
    parser.add_argument("--bf16", action="store_true", help="train the heads in bfloat16: faster on a CPU that has it")
    parser.add_argument("--synthetic", type=json.loads, default={}, help="options of the synthetic corpus, as JSON")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--markdown", type=Path, help="write what is printed to this file")
    parser.add_argument("--json", type=Path, help="write conditions and rows to this file")
    return parser


if __name__ == "__main__":
    main()
