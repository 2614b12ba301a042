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
from sailer.hub.templates import render as render_template
from sailer.training.bootstrap import LEVEL, Resampling, divergences, replicated_figures
from sailer.training.conformal import set_report
from sailer.training.groups import KINDS, View, by_kind, largest_gap
from sailer.training.metrics import ANSWERED, confidences, decisions, risk_coverage
from sailer.training.report_plots import plot_agreement, plot_groups, plot_reliability, plot_risk, plot_speakers

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
    "natural_js": "JS divergence, natural prior",
    "natural_ece": "Calibration error, natural prior",
    "aurc": "Area under the risk-coverage curve",
    "ccc": "CCC, mean of the attributes",
    **{f"ccc_{name}": f"CCC, {name}" for name in ATTRIBUTES},
    "secondary_kl": "KL, secondary emotions",
    "secondary_map": "mAP, secondary emotions",
    "sex_accuracy": "Accuracy, speaker's sex",
    "age_mae": "Mean absolute error of the age (years)",
}
WORST = 20
EMBEDDED_SECONDS = 60.0
FEW = 10  # speakers: with fewer, intervals and p say little
SPEAKERS = 40  # rows of the table; the picture and metrics.json have all
WITH_AUDIO = "report_with_audio.html"
GAPS_NOTE = (
    "The lowest and the highest group were chosen for their difference, which is therefore somewhat too large. It "
    "shows where the system is not to be relied on; no decision about people is to be drawn from it."
)


@dataclass
class Evaluated:
    """A system's outputs on a split by name, (clips, ...) each, its figures, its natural probabilities, and what its
    configuration keeps for prediction sets."""

    name: str
    outputs: dict[str, np.ndarray]
    figures: dict[str, Any]
    natural: np.ndarray | None
    conformal: Mapping[str, Any] | None = None
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
    """Give each system's figures their `intervals`, `sets` where it has scores for them, and `differences` from each
    system before it.

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
        if system.conformal is not None:
            said = {"balanced": softmax(system.outputs["logits"], axis=1), "natural": system.natural}
            known = {prior: values for prior, values in said.items() if values is not None}
            labels = targets["consensus"].astype(int)
            system.figures["sets"] = set_report(resampling, known, labels, label_set, system.conformal, speakers)
    for one, other in combinations(systems, 2):
        differences = {
            name: resampling.compare(other.replicates[name], one.replicates[name])
            for name in TITLES
            if all(np.isfinite(system.replicates.get(name, [np.nan])[0]) for system in (one, other))
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
    repeats = len(next(iter(main.replicates.values()))) - 1
    view = View(main.outputs["logits"], targets, rows, label_set, main.natural, repeats, seed)
    pictures = {"Confusion matrix": "confusion_matrix.png"}
    curves = {"balanced prior": view.reliability(view.probabilities)}
    if main.natural is not None:
        curves["natural prior"] = view.reliability(main.natural)
    if any(curve["clips"].any() for curve in curves.values()):
        plot_reliability(curves, folder / "reliability.png")
        pictures["Reliability"] = "reliability.png"
    tables = [
        *(_figures_table(systems), *_differences_table(systems), _class_table(main, targets, label_set)),
        *(*_risk_tables(main, view, folder), *_set_tables(main), *_agreement_tables(main, view, folder)),
        *_group_tables(main, view, folder),
    ]
    facts = {
        "title": f"Evaluation on {split}",
        "date": date.today().isoformat(),
        "systems": [system.name for system in systems],
        "main": main.name,
        "tables": tables,
        "pictures": pictures,
        "worst": list(_worst(view, main.outputs["logits"], embed_audio)),
        "clips": len(rows),
        "scored": int(main.figures["scored_clips"]),
        "speakers": len(set(rows["speaker"]) - {""}),
        "unknown": sum(not name for name in rows["speaker"]),
        "few": len(set(rows["speaker"])) < FEW and "" not in rows["speaker"],
        "draws": repeats,
        "level": LEVEL,
        "embedded": embed_audio,
    }
    render_template("report.md.jinja", facts, folder / "report.md")
    images = {path.name: _data_uri(path.read_bytes(), "image/png") for path in folder.glob("*.png")}
    name = WITH_AUDIO if embed_audio else "report.html"
    return render_template("report.html.jinja", facts | {"images": images}, folder / name)


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


def _risk_tables(system: Evaluated, view: View, folder: Path) -> list[Table]:
    """The error among the clips of which the system is surest; nothing without scored clips."""
    confidence, wrong = confidences(system.outputs["logits"], view.labels, view.label_set)
    if not np.isfinite(wrong).any():
        return []
    intervals = system.figures["intervals"]
    shares = [(share, f"risk_{round(100 * share)}") for share in ANSWERED]
    bands = [(share, *(intervals[name] or (np.nan, np.nan))) for share, name in shares]
    plot_risk(*risk_coverage(confidence, wrong), bands, folder / "risk_coverage.png")
    rows = [[f"{share:.0%}", shown(system.figures[name], intervals[name])] for share, name in shares]
    note = (
        "The share decided wrongly of the scored clips that the system is surest of, by the probability of its "
        f"decision. The area under the curve is {shown(system.figures['aurc'], intervals['aurc'])}; of an order by "
        f"chance it would be {system.figures['risk_100']:.3f}."
    )
    return [Table("Risk and coverage", ["clips answered", "decided wrongly"], rows, note, "risk_coverage.png")]


def _set_tables(system: Evaluated) -> list[Table]:
    rows = [
        [
            f"{row['asked']:.0%}, {row['prior']} prior" + (", by class" if row["by_class"] else ""),
            shown(row["covered"][0], row["covered"][1], percent=True),
            *(shown(*row[name]) for name in ("size", "single", "empty")),
            *(_lowest(row[name]) for name in ("classes", "speakers")),
        ]
        for row in system.figures.get("sets", [])
    ]
    if not rows or system.conformal is None:
        return []
    note = (
        f"Thresholds are from {system.conformal['clips']} calibration clips. For clips and speakers like those the "
        "consensus is in a set as often as was asked for; here it is measured, and was not promised."
    )
    header = ["asked for", "has the consensus (%)", "labels in a set", "one label", "empty"]
    return [Table("Prediction sets", [*header, "lowest class", "lowest speaker"], rows, note)]


def _lowest(covered: Mapping[str, float]) -> str:
    if not covered:
        return "-"
    name = min(covered, key=covered.__getitem__)
    return f"{name} {100 * covered[name]:.0f}"


def _agreement_tables(system: Evaluated, view: View, folder: Path) -> list[Table]:
    """Error and divergences by how far the annotators agree; nothing without votes."""
    rows = view.agreement()
    if not rows:
        return []
    plot_agreement(rows, folder / "agreement.png")
    system.figures["strata"] = strata = view.strata()
    names = [name for name in ("kl", "js", "ece", "natural_kl", "natural_js", "natural_ece") if name in strata[0]]
    return [
        _group_table("Agreement against error", rows, ("error", "kl"), "agreement.png"),
        Table(
            "By entropy of the votes",
            ["", "clips", "speakers", *(TITLES[name] for name in names)],
            [
                [_with_note(row), str(row["clips"]), str(row["speakers"]), *(shown(*row[name]) for name in names)]
                for row in strata
            ],
            "Strata of the annotators' distribution by its entropy in nats: 0 where they all agree.",
        ),
    ]


def _group_tables(system: Evaluated, view: View, folder: Path) -> list[Table]:
    """Figures by group and the gaps between groups."""
    found = {kind: rows for kind in (*KINDS, "speaker") if (rows := view.groups(kind))}
    gaps = view.gaps()
    system.figures |= {"groups": found, "gaps": gaps}
    speakers, tables, picture = found.get("speaker", []), [], ""
    groups = by_kind(found)
    if groups:
        plot_groups(groups, folder / "groups.png", largest_gap(gaps))
        picture = "groups.png"
    for kind, rows in groups.items():
        tables.append(_group_table(f"By {kind}", rows, ("macro_f1", "accuracy", "kl"), picture))
        picture = ""
    if speakers:
        plot_speakers(speakers, folder / "speakers.png")
        ordered = sorted(speakers, key=lambda row: row["accuracy"][0])
        table = _group_table("By speaker", ordered[:SPEAKERS], ("accuracy", "macro_f1"), "speakers.png")
        table.note = "Intervals over the speaker's clips; the worst first."
        if len(ordered) > SPEAKERS:
            table.note += f" {len(ordered) - SPEAKERS} more are in metrics.json."
        tables.append(table)
    if gaps:
        cells = [
            [
                f"{gap['kind']}: {TITLES[gap['figure']]}",
                *(f"{gap[end]} {gap['values'][place]:.3f}" for place, end in ((0, "low"), (1, "high"))),
                shown(gap["difference"], gap["interval"]),
                "-" if gap["p"] is None else f"{gap['p']:.3f}",
            ]
            for gap in gaps
        ]
        note = f"{largest_gap(gaps)} {GAPS_NOTE}"
        tables.append(Table("Gaps between groups", ["", "lowest", "highest", "difference", "p"], cells, note))
    return tables


def _with_note(row: Mapping[str, Any]) -> str:
    return f"{row['group']} ({row['note']})" if "note" in row else row["group"]


def _group_table(title: str, found: Sequence[Mapping[str, Any]], names: Sequence[str], picture: str) -> Table:
    titles = {"error": "decided wrongly", **TITLES}
    rows = [
        [
            _with_note(row),
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


def _worst(view: View, logits: np.ndarray, embed_audio: bool) -> Iterator[dict[str, str]]:
    """The clips whose consensus the system thought least likely, each with a link to its recording."""
    names = view.label_set.labels
    own = log_softmax(logits, axis=1)[np.arange(len(view.labels)), view.labels]
    divergence = divergences(view.probabilities, np.nan_to_num(view.distributions, nan=0.0))
    order = [int(i) for i in np.argsort(np.where(view.scored, own, np.inf), kind="stable") if view.scored[i]]
    for index in order[:WORST]:
        row = view.rows[index]
        path = row["audio"]["path"]
        link = Path(path).resolve().as_uri() if path and Path(path).is_file() else ""
        votes = np.nan_to_num(view.distributions[index])
        told = [f"{names[i]} {votes[i]:.2f}" for i in np.argsort(-votes) if votes[i] > 0]
        yield {
            "id": row["id"],
            "link": link,
            "audio": _embedded(row) if embed_audio else link,
            "speaker": row["speaker"] or "unknown",
            "seconds": f"{row['duration']:.1f}",
            "label": names[view.labels[index]],
            "decision": names[view.decided[index]],
            "probability": f"{np.exp(own[index]):.4f}",
            "votes": ", ".join(told) or "-",
            "kl": f"{divergence[index]:.3f}" if told else "-",
        }


def _embedded(row: Mapping[str, Any]) -> str:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, render(row, 16000, EMBEDDED_SECONDS), 16000, format="WAV", subtype="PCM_16")
    return _data_uri(file.getvalue(), "audio/wav")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
