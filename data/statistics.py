"""What is in a corpus: the paper's Table 1 and more as text, its distributions as a picture, its rows as a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from sailer.data.atomic import replacing_folder
from sailer.data.corpora.hub import LABEL_SET_FILE
from sailer.data.labels import agreement, entropy, fleiss_kappa
from sailer.data.schema import NO_AGREEMENT, UNLABELLED, CorpusError, CorpusReport, LabelSet

STATISTICS_FILE = "statistics.txt"
PLOT_FILE = "distributions.png"
# Machine-made transcripts (`sailer.data.transcription`): kept when a folder is written again.
TRANSCRIPTS_FILE = "machine_transcripts.jsonl"

_Splits = Mapping[str, Dataset]
_Rows = Mapping[str, np.ndarray]


def describe(
    datasets: _Splits,
    label_set: LabelSet | None = None,
    report: CorpusReport | None = None,
    machine_made: Mapping[str, int] | None = None,
) -> str:
    """Text: clips per class and split (paper, Table 1), hours, annotators, agreement, transcripts, what was left out.

    Args:
        datasets: split -> canonical rows.
        label_set: their primary emotions.
        report: what the loader left out and noticed.
        machine_made: split -> number of transcripts made by speech recognition.
    """
    columns = list(datasets)
    counts = class_counts(datasets, label_set)
    names = list(next(iter(counts.values())))
    rows = [[name, *(f"{counts[split][name]:,}" for split in columns)] for name in names]
    rows.append(["All", *(f"{len(datasets[split]):,}" for split in columns)])
    if len(columns) > 1:
        for row, name in zip(rows, [*names, "All"], strict=True):
            total = sum(map(len, datasets.values())) if name == "All" else sum(counts[s][name] for s in columns)
            row.append(f"{total:,}")
    header = [*columns, *(["all"] if len(columns) > 1 else [])]

    parts = [{name: _column(dataset, name) for name in _MEASURED} for dataset in datasets.values()]
    if len(parts) > 1:
        parts.append({name: np.concatenate([part[name] for part in parts]) for name in _MEASURED})
    facts = [[name, *(measure(part) for part in parts)] for name, measure in _MEASURES.items()]
    if machine_made:
        made = [machine_made.get(split, 0) for split in columns]
        facts.append(["  of them machine-made", *(f"{n:,}" for n in [*made, sum(made)][: len(header)])])
    text = [
        "Clips per class",
        _table(header, rows),
        "",
        "Annotation, recordings and transcripts",
        _table(header, facts),
    ]
    text += ["", *shared_speaker_warnings(datasets)]
    lines = report.lines() if report else []
    return "\n".join([*text, *lines, *([] if lines else ["Nothing was left out."])]).strip()


def save(
    datasets: DatasetDict | _Splits,
    output_dir: str | Path,
    label_set: LabelSet | None = None,
    report: CorpusReport | None = None,
    machine_made: Mapping[str, int] | None = None,
) -> Path:
    """Write the rows as Arrow (for `load_from_disk`, or the corpus `hub` of a recipe), their statistics and a picture.

    Args:
        datasets: split -> canonical rows.
        output_dir: a folder that is new, empty or was written by this function before; it is replaced as a whole.
        label_set: their primary emotions.
        report, machine_made: as for `describe`.

    Returns:
        `output_dir`.

    Raises:
        CorpusError: a folder that holds something else.
    """
    output_dir, label_set = Path(output_dir), label_set or LabelSet()
    check_output_dir(output_dir)
    with replacing_folder(output_dir) as partial:
        DatasetDict(datasets).save_to_disk(partial)
        names = {"labels": label_set.labels, "majority": label_set.majority, "scored": label_set.scored}
        (partial / LABEL_SET_FILE).write_text(json.dumps(names, indent=1), encoding="utf-8")
        text = describe(datasets, label_set, report, machine_made)
        (partial / STATISTICS_FILE).write_text(text + "\n", encoding="utf-8")
        plot(datasets, partial / PLOT_FILE, label_set)
        if (output_dir / TRANSCRIPTS_FILE).is_file():
            shutil.copy2(output_dir / TRANSCRIPTS_FILE, partial)
    return output_dir


def check_output_dir(output_dir: Path) -> None:
    """Refuse a folder whose content is not what `save` and `transcription` write; ask before the long work.

    Raises:
        CorpusError: it would be replaced.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise CorpusError(f"{output_dir} is a file: give a folder.")
    own = {LABEL_SET_FILE, TRANSCRIPTS_FILE}
    content = {entry.name for entry in output_dir.iterdir()} if output_dir.is_dir() else set()
    if content and not content & own:
        raise CorpusError(f"{output_dir} holds other files ({sorted(content)[0]}, ...): give a new or empty folder.")


def class_counts(datasets: _Splits, label_set: LabelSet | None = None) -> dict[str, dict[str, int]]:
    """Split -> class -> clips; "No agreement" always, "Unlabelled" if any split has such clips."""
    labels = (label_set or LabelSet()).labels
    values = {split: np.asarray(dataset["label"]) for split, dataset in datasets.items()}
    codes = {**{name: code for code, name in enumerate(labels)}, "No agreement": NO_AGREEMENT}
    if any((label == UNLABELLED).any() for label in values.values()):
        codes["Unlabelled"] = UNLABELLED
    return {
        split: {name: int((label == code).sum()) for name, code in codes.items()} for split, label in values.items()
    }


def shared_speakers(datasets: _Splits) -> dict[tuple[str, str], list[str]]:
    """Speakers that two splits share, by the pair of splits."""
    speakers = {split: set(dataset["speaker"]) - {""} for split, dataset in datasets.items()}
    pairs = {(one, other): sorted(speakers[one] & speakers[other]) for one, other in combinations(speakers, 2)}
    return {pair: names for pair, names in pairs.items() if names}


def split_speakers(datasets: _Splits, trained_on: Sequence[str]) -> list[dict[str, Any]]:
    """Of each split: its name as `split`, `clips`, `speakers` (names), how many clips are of `unknown` ones, and those
    `shared` with the splits that a system was trained on (all of them, of such a split)."""
    speakers = {split: set(dataset["speaker"]) - {""} for split, dataset in datasets.items()}
    trained = set().union(*(speakers[split] for split in trained_on))
    return [
        {
            "split": split,
            "clips": len(dataset),
            "speakers": sorted(speakers[split]),
            "unknown": sum(not name for name in dataset["speaker"]),
            "shared": sorted(speakers[split] & trained),
        }
        for split, dataset in datasets.items()
    ]


def shared_speaker_warnings(datasets: _Splits, examples: int = 10) -> list[str]:
    """A line for each pair of splits that share speakers, with their names."""
    return [
        f"WARNING: {one} and {other} share {len(names)} speakers: {', '.join(names[:examples])}"
        f"{', ...' * (len(names) > examples)}"
        for (one, other), names in shared_speakers(datasets).items()
    ]


def plot(datasets: _Splits, path: str | Path, label_set: LabelSet | None = None) -> Path:
    """Draw each split's share of clips by class and of votes by class, as a PNG."""
    # Not through pyplot, which would keep the figure and may ask for a display.
    from matplotlib.figure import Figure

    labels = list((label_set or LabelSet()).labels)
    counts = class_counts(datasets, label_set)
    classes = list(next(iter(counts.values())))
    figure = Figure(figsize=(12, 1.6 + 0.12 * (len(datasets) + 1.5) * len(classes)), layout="constrained")
    clips, votes = figure.subplots(1, 2, width_ratios=(len(classes), len(labels)))
    height = 0.8 / len(datasets)
    for position, (split, dataset) in enumerate(datasets.items()):
        own = np.array(list(counts[split].values()))
        total = _column(dataset, "votes").sum(axis=0)
        for axes, names, values, unit in ((clips, classes, own, "clips"), (votes, labels, total, "votes")):
            places = np.arange(len(names)) + (position - (len(datasets) - 1) / 2) * height
            label = f"{split} ({values.sum():,.0f} {unit})"
            bars = axes.barh(places, values / max(values.sum(), 1), height, label=label, color=f"C{position}")
            axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=2, fontsize=min(8, 55 * height))
    for axes, names, title in (
        (clips, classes, "Share of clips by class"),
        (votes, labels, "Share of votes by class"),
    ):
        axes.set(title=title, yticks=range(len(names)), yticklabels=names, xlim=(0, axes.get_xlim()[1] * 1.12))
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3)
    figure.savefig(path, dpi=120, format="png")
    return Path(path)


def _column(dataset: Dataset, name: str) -> np.ndarray:
    return np.asarray(dataset.select_columns(name).with_format("numpy")[name][:])


def _mean(measure: Callable[[np.ndarray], np.ndarray]) -> Callable[[_Rows], str]:
    """The mean over clips that have votes."""
    return lambda rows: _number(np.nanmean(measure(rows["votes"]))) if rows["votes"].any() else "-"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}".replace("-0.000", "0.000")


def _share(known: Callable[[_Rows], np.ndarray | np.bool]) -> Callable[[_Rows], str]:
    return lambda rows: f"{100 * np.mean(known(rows)):.1f} %"


def _range(values: np.ndarray, digits: str) -> str:
    return f"{values.mean():{digits}} ({values.min():.3g}-{values.max():.3g})" if len(values) else "-"


def _hours(rows: _Rows) -> str:
    known = rows["duration"][~np.isnan(rows["duration"])]
    unknown = len(rows["duration"]) - len(known)
    return "-" if not len(known) else f"{known.sum() / 3600:.2f}" + (f" + {unknown} clips" if unknown else "")


_MEASURED = ("duration", "votes", "secondary_votes", "attributes", "speaker", "transcript")
_MEASURES: dict[str, Callable[[_Rows], str]] = {
    "Hours": _hours,
    "Seconds per clip (range)": lambda rows: _range(rows["duration"][~np.isnan(rows["duration"])], ".1f"),
    "Clips with votes": _share(lambda rows: rows["votes"].any(axis=1)),
    "Annotators per clip (range)": lambda rows: _range(rows["votes"].sum(axis=1)[rows["votes"].any(axis=1)], ".2f"),
    "Agreement: share of first class": _mean(agreement),
    "Entropy of votes (nats)": _mean(entropy),
    "Fleiss' kappa": lambda rows: _number(fleiss_kappa(rows["votes"])),
    "Clips with secondary votes": _share(lambda rows: rows["secondary_votes"].any(axis=1)),
    "Clips with attributes": _share(lambda rows: ~np.isnan(rows["attributes"]).any(axis=1)),
    "Speakers": lambda rows: f"{len(set(rows['speaker']) - {''}):,}",
    "Clips with speaker": _share(lambda rows: rows["speaker"] != ""),
    "Clips with transcript": _share(lambda rows: rows["transcript"] != ""),
}


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Lines of aligned columns: names to the left, numbers to the right."""
    cells = [["", *header], *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    )
