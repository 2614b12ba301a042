"""What systems said of a split goes in; report.md, a self-contained report.html and their pictures come out."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import log_softmax, softmax

from sailer.data.atomic import replacing
from sailer.data.rendering import render
from sailer.data.schema import ATTRIBUTES, LabelSet
from sailer.training.bootstrap import (
    LEVEL,
    Resampling,
    decision_figures,
    distribution_figures,
    divergences,
    reliability_parts,
    replicated_figures,
)
from sailer.training.metrics import CALIBRATION_BINS, decisions
from sailer.training.report_plots import plot_agreement, plot_groups, plot_reliability, plot_speakers

TEMPLATES = Path(__file__).parents[1] / "model_cards"
# The figures of the whole split by their names in the report; the first three are the paper's, under its names.
TITLES = {
    "macro_f1": "Macro-F1",
    "accuracy": "Accuracy",
    "min_map": "Min. mAP",
    "uar": "Unweighted average recall",
    "kl": "KL from the annotators (nats)",
    "js": "JS divergence (nats)",
    "ece": "Calibration error",
    "natural_kl": "KL, natural prior",
    "natural_ece": "Calibration error, natural prior",
    "ccc": "CCC, mean of the attributes",
    **{f"ccc_{name}": f"CCC, {name}" for name in ATTRIBUTES},
    "secondary_kl": "KL, secondary emotions",
    "secondary_map": "mAP, secondary emotions",
    "sex_accuracy": "Accuracy, speaker's sex",
    "age_mae": "Mean absolute error of the age (years)",
}
PAPERS = ("macro_f1", "accuracy", "min_map")
COMPARED = (*PAPERS, "kl", "ccc")
AGES = ((0, 30), (30, 45), (45, 60), (60, 150))
DURATIONS = ((0, 2), (2, 4), (4, 8), (8, float("inf")))
AGREEMENTS = ((0, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0), (1.0, 1.1))
WORST = 20
EMBEDDED_SECONDS = 60.0
FEW = 10  # speakers: with fewer, intervals and p say little
SPEAKERS = 40  # rows of the table; the picture and metrics.json have all
WITH_AUDIO = "report_with_audio.html"


@dataclass
class Evaluated:
    """A system's outputs on a split by name, (clips, ...) each, its figures, and its natural probabilities."""

    name: str
    outputs: dict[str, np.ndarray]
    figures: dict[str, Any]
    natural: np.ndarray | None
    replicates: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Table:
    """A table of the report: cells are text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    picture: str = ""


def add_intervals(
    systems: Sequence[Evaluated],
    targets: Mapping[str, np.ndarray],
    speakers: Sequence[str],
    label_set: LabelSet,
    repeats: int = 1000,
    seed: int = 0,
) -> Resampling:
    """Give each system's figures their `intervals`, and `differences` from each system before it.

    Args:
        systems: with figures; their `replicates` are kept for `write_report`.
        targets: by the collator's names.
        speakers: (clips,).
        label_set: the primary emotions.
        repeats, seed: of the bootstrap.
    """
    resampling = Resampling(speakers, repeats, seed)
    for system in systems:
        system.replicates = replicated_figures(resampling, system.outputs, targets, label_set, system.natural)
        system.figures |= {name: float(values[0]) for name, values in system.replicates.items()} | system.figures
        system.figures["intervals"] = {name: resampling.interval(values) for name, values in system.replicates.items()}
    for one, other in combinations(systems, 2):
        differences = {
            name: resampling.compare(other.replicates[name], one.replicates[name])
            for name in COMPARED
            if name in one.replicates and name in other.replicates
        }
        other.figures.setdefault("differences", {})[one.name] = differences
    return resampling


def write_report(
    folder: Path,
    systems: Sequence[Evaluated],
    targets: Mapping[str, np.ndarray],
    rows: Dataset,
    label_set: LabelSet,
    split: str,
    embed_audio: bool = False,
    seed: int = 0,
) -> Path:
    """Write report.md, report.html, and the pictures. The last system is the one that is looked at closely.

    Args:
        folder: where to; its confusion_matrix.png is there already.
        systems: after `add_intervals`.
        targets: by the collator's names.
        rows: the split's canonical rows, in the order of the outputs.
        label_set: the primary emotions.
        split: what the split is called.
        embed_audio: write report_with_audio.html instead of report.html, with the worst clips in it. Corpora are
            licensed: `sailer push` refuses such a report.
        seed: of the bootstrap within groups.

    Returns:
        The HTML file.
    """
    main = systems[-1]
    view = _View(main, targets, rows, label_set, len(next(iter(main.replicates.values()))) - 1, seed)
    groups = {kind: view.groups(kind) for kind in ("sex", "age", "duration")}
    speakers = view.groups("speaker")
    main.figures["groups"] = {**groups, "speaker": speakers}
    tables = [_figures_table(systems), *_differences_table(systems), _class_table(main, targets, label_set)]
    pictures = {"Confusion matrix": "confusion_matrix.png"}
    curves = {"balanced prior": view.reliability(softmax(main.outputs["logits"], axis=1))}
    if main.natural is not None:
        curves["natural prior"] = view.reliability(main.natural)
    if any(curve["clips"].any() for curve in curves.values()):
        plot_reliability(curves, folder / "reliability.png")
        pictures["Reliability"] = "reliability.png"
    agreement = view.agreement()
    if agreement:
        plot_agreement(agreement, folder / "agreement.png")
        tables.append(_group_table("Agreement against error", agreement, ("error", "kl"), "agreement.png"))
    if any(groups.values()):
        plot_groups(groups, folder / "groups.png")
    for kind, found in groups.items():
        if found:
            picture = "groups.png" if found is next(filter(None, groups.values())) else ""
            tables.append(_group_table(f"By {kind}", found, ("macro_f1", "accuracy", "kl"), picture))
    if speakers:
        plot_speakers(speakers, folder / "speakers.png")
        ordered = sorted(speakers, key=lambda row: row["accuracy"][0])
        table = _group_table("By speaker", ordered[:SPEAKERS], ("accuracy", "macro_f1"), "speakers.png")
        table.note = "Intervals over the speaker's clips; the worst first."
        if len(ordered) > SPEAKERS:
            table.note += f" {len(ordered) - SPEAKERS} more are in metrics.json."
        tables.append(table)
    facts = {
        "title": f"Evaluation on {split}",
        "date": date.today().isoformat(),
        "systems": [system.name for system in systems],
        "main": main.name,
        "tables": tables,
        "pictures": pictures,
        "worst": list(view.worst(embed_audio)),
        "clips": len(rows),
        "scored": int(main.figures["scored_clips"]),
        "speakers": len(set(rows["speaker"]) - {""}),
        "unknown": sum(not name for name in rows["speaker"]),
        "few": len(set(rows["speaker"])) < FEW and "" not in rows["speaker"],
        "draws": view.repeats,
        "level": LEVEL,
        "embedded": embed_audio,
    }
    _render("report.md.jinja", facts, folder / "report.md")
    images = {path.name: _data_uri(path.read_bytes(), "image/png") for path in folder.glob("*.png")}
    name = WITH_AUDIO if embed_audio else "report.html"
    return _render("report.html.jinja", facts | {"images": images}, folder / name)


def write_table(
    systems: Sequence[Evaluated], rows: Dataset, labels: np.ndarray, label_set: LabelSet, path: Path
) -> None:
    """Write predictions.parquet: a row per system and clip, with the decision, every probability and other outputs."""
    import pandas as pd

    names = dict(enumerate(label_set.labels))
    clips = rows.select_columns(["id", "speaker", "sex", "age", "duration"]).to_pandas()
    clips["label"] = [names.get(int(label)) for label in labels]
    parts = []
    for system in systems:
        part = clips.copy()
        part.insert(0, "system", system.name)
        part["decision"] = [names[int(index)] for index in decisions(system.outputs["logits"], label_set)]
        for prefix, values in (("", softmax(system.outputs["logits"], axis=1)), ("natural_", system.natural)):
            if values is not None:
                part[[f"{prefix}{label}" for label in label_set.labels]] = values.astype(np.float32)
        if "attributes" in system.outputs:
            part[list(ATTRIBUTES)] = system.outputs["attributes"].astype(np.float32)
        if "age" in system.outputs:
            part["predicted_age"] = system.outputs["age"].astype(np.float32)
        parts.append(part)
    with replacing(path) as beside:
        pd.concat(parts, ignore_index=True).to_parquet(beside, index=False)


class _View:
    """One system's outputs on a split, looked at by groups of clips."""

    def __init__(
        self,
        system: Evaluated,
        targets: Mapping[str, np.ndarray],
        rows: Dataset,
        label_set: LabelSet,
        repeats: int,
        seed: int,
    ) -> None:
        self.system, self.rows, self.label_set, self.repeats, self.seed = system, rows, label_set, repeats, seed
        self.labels, self.distributions = targets["consensus"].astype(int), targets["labels"]
        self.probabilities = softmax(system.outputs["logits"].astype(np.float64), axis=1)
        self.decided = decisions(system.outputs["logits"], label_set)
        self.scored = np.isin(self.labels, label_set.indices(label_set.scored))
        self.speakers = np.array(rows["speaker"], dtype=object)

    def groups(self, kind: str) -> list[dict[str, Any]]:
        """Rows of figures for each group of clips of a kind: speaker, sex, age or duration; unknown ones too."""
        if kind in ("speaker", "sex"):
            values = np.array(self.rows[kind], dtype=object)
            chosen = {str(name) or "unknown": values == name for name in sorted(set(values))}
        else:
            numbers = np.array(self.rows[kind], dtype=float)
            bands = AGES if kind == "age" else DURATIONS
            chosen = {_band(low, high, kind): (numbers >= low) & (numbers < high) for low, high in bands}
            chosen["unknown"] = np.isnan(numbers)
        if set(chosen) == {"unknown"} or not any(mask.any() for name, mask in chosen.items() if name != "unknown"):
            return []
        # Within a speaker it is the clips that are drawn.
        return [
            row for name, mask in chosen.items() if (row := self._figures(name, mask, kind == "speaker")) is not None
        ]

    def agreement(self) -> list[dict[str, Any]]:
        """Rows of error and divergence by the share of annotators who chose the commonest class."""
        shares = self.distributions.max(axis=1)  # NaN without votes
        found = []
        for low, high in AGREEMENTS:
            name = "all" if low == 1 else f"{low:.1f}-{high:.1f}"
            row = self._figures(name, (shares >= low) & (shares < high) if low < 1 else shares >= 1)
            if row is not None:
                value, interval = row.pop("accuracy")
                row["error"] = (1 - value, interval and [1 - end for end in reversed(interval)])
                found.append(row)
        return found

    def reliability(self, probabilities: np.ndarray) -> dict[str, np.ndarray]:
        """For `plot_reliability`."""
        known = np.isfinite(self.distributions).all(axis=1)
        shape = (CALIBRATION_BINS,)
        curve = {name: np.full(shape, np.nan) for name in ("confidence", "agreement", "low", "high")}
        curve["clips"] = np.zeros(shape)
        if known.any():
            resampling = Resampling(self.speakers[known], self.repeats, self.seed)
            confidence, agreed, bins = reliability_parts(probabilities[known], self.distributions[known])
            places = np.eye(CALIBRATION_BINS)[bins]
            clips, sums, sure = (
                resampling.sums(places * x[:, None]) for x in (np.ones(len(bins)), agreed, confidence)
            )
            with np.errstate(invalid="ignore", divide="ignore"):
                means, curve["confidence"] = sums / clips, sure[0] / clips[0]
            curve["clips"], curve["agreement"] = clips[0], means[0]
            for index in np.flatnonzero(clips[0]):
                curve["low"][index], curve["high"][index] = (
                    resampling.interval(means[:, index]) or [means[0, index]] * 2
                )
        return curve

    def worst(self, embed_audio: bool) -> Iterator[dict[str, str]]:
        """The clips whose consensus the system thought least likely, each with a link to its recording."""
        names = self.label_set.labels
        own = log_softmax(self.system.outputs["logits"], axis=1)[np.arange(len(self.labels)), self.labels]
        divergence = divergences(self.probabilities, np.nan_to_num(self.distributions, nan=0.0))
        order = [int(i) for i in np.argsort(np.where(self.scored, own, np.inf), kind="stable") if self.scored[i]]
        for index in order[:WORST]:
            row = self.rows[index]
            path = row["audio"]["path"]
            link = Path(path).resolve().as_uri() if path and Path(path).is_file() else ""
            votes = np.nan_to_num(self.distributions[index])
            told = [f"{names[i]} {votes[i]:.2f}" for i in np.argsort(-votes) if votes[i] > 0]
            yield {
                "id": row["id"],
                "link": link,
                "audio": _embedded(row) if embed_audio else link,
                "speaker": row["speaker"] or "unknown",
                "seconds": f"{row['duration']:.1f}",
                "label": names[self.labels[index]],
                "decision": names[self.decided[index]],
                "probability": f"{np.exp(own[index]):.4f}",
                "votes": ", ".join(told) or "-",
                "kl": f"{divergence[index]:.3f}" if told else "-",
            }

    def _figures(self, name: str, mask: np.ndarray, by_clip: bool = False) -> dict[str, Any] | None:
        if not mask.any():
            return None
        speakers = [""] * int(mask.sum()) if by_clip else self.speakers[mask]
        resampling = Resampling(speakers, self.repeats, self.seed)
        found = decision_figures(resampling, self.decided[mask], self.labels[mask], self.label_set)
        found |= distribution_figures(resampling, self.probabilities[mask], self.distributions[mask])
        figures = {
            key: (float(found[key][0]), resampling.interval(found[key])) for key in ("macro_f1", "accuracy", "kl")
        }
        counts = {"clips": int(mask.sum()), "scored": int(self.scored[mask].sum())}
        people = len(set(self.speakers[mask]) - {""})
        return {"group": name, **counts, "speakers": people, **figures}


def _figures_table(systems: Sequence[Evaluated]) -> Table:
    there = [name for name in TITLES if any(name in system.replicates for system in systems)]
    rows = [
        [
            TITLES[name],
            *(
                shown(system.figures[name], system.figures["intervals"][name], name == "accuracy")
                if name in system.replicates
                else "-"
                for system in systems
            ),
        ]
        for name in there
    ]
    note = "Macro-F1, Accuracy (in %) and Min. mAP are the paper's, over the scored classes."
    return Table("Figures", ["", *(system.name for system in systems)], rows, note)


def _differences_table(systems: Sequence[Evaluated]) -> list[Table]:
    rows = []
    for system in systems:
        for other, found in system.figures.get("differences", {}).items():
            for name, compared in found.items():
                p = "-" if compared["p"] is None else f"{compared['p']:.3f}"
                value = shown(compared["difference"], compared["interval"], name == "accuracy", sign=True)
                rows.append([f"{system.name} - {other}", TITLES[name], value, p])
    note = "Both systems are judged on the same draws of speakers (a paired bootstrap)."
    return [Table("Differences", ["", "figure", "difference", "p"], rows, note)] if rows else []


def _class_table(system: Evaluated, targets: Mapping[str, np.ndarray], label_set: LabelSet) -> Table:
    rows = []
    for index, label in enumerate(label_set.labels):
        clips = int((targets["consensus"] == index).sum())
        if f"f1_{label}" in system.replicates:
            cells = [
                shown(float(system.replicates[f"{name}_{label}"][0]), system.figures["intervals"][f"{name}_{label}"])
                for name in ("precision", "recall", "f1", "ap")
            ]
            rows.append([label, str(clips), *cells])
        elif clips:
            rows.append([label, str(clips), *["not scored"] * 4])
    return Table("By class", ["", "clips", "precision", "recall", "F1", "average precision"], rows)


def _group_table(title: str, found: Sequence[Mapping[str, Any]], names: Sequence[str], picture: str) -> Table:
    titles = {"error": "decided wrongly", **TITLES}
    rows = [
        [
            row["group"],
            *(str(row[name]) for name in ("clips", "scored", "speakers")),
            *(shown(row[name][0], row[name][1], name == "accuracy") for name in names),
        ]
        for row in found
    ]
    return Table(title, ["", "clips", "scored", "speakers", *(titles[name] for name in names)], rows, picture=picture)


def shown(value: float, interval: Sequence[float] | None, percent: bool = False, sign: bool = False) -> str:
    """A figure and its interval as text."""
    if not np.isfinite(value):
        return "-"
    scale, form = (100, ".2f") if percent else (1, ".3f")
    form = f"+{form}" if sign else form
    ends = "" if interval is None else f" [{', '.join(f'{scale * end:{form}}' for end in interval)}]"
    return f"{scale * value:{form}}{ends}"


def _band(low: float, high: float, kind: str) -> str:
    unit = "years" if kind == "age" else "s"
    if high in (AGES[-1][1], DURATIONS[-1][1]):
        return f"{low} {unit} or more"
    return f"under {high} {unit}" if low == 0 else f"{low} to {high} {unit}"


def _embedded(row: Mapping[str, Any]) -> str:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, render(row, 16000, EMBEDDED_SECONDS), 16000, format="WAV", subtype="PCM_16")
    return _data_uri(file.getvalue(), "audio/wav")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _render(template: str, facts: Mapping[str, Any], path: Path) -> Path:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=template.endswith("html.jinja"),
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    with replacing(path) as beside:
        beside.write_text(environment.get_template(template).render(facts), encoding="utf-8")
    return path
