"""Systems and corpora in; one table of every system on every corpus, over the classes that they share, out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from sailer.data import CorpusError, LabelSet, load_corpus
from sailer.data.atomic import replacing
from sailer.data.schema import canonical_features
from sailer.settings import SettingsError, load_recipe
from sailer.training.bootstrap import LEVEL, Resampling, decision_figures
from sailer.training.evaluation import label_set_of, load_systems, predict, write_json
from sailer.training.metrics import decisions
from sailer.training.report import shown
from sailer.training.report_plots import plot_matrix
from sailer.training.trainer import CONSENSUS

logger = logging.getLogger(__name__)

FIGURES = {"uar": "Unweighted average recall", "macro_f1": "Macro-F1"}
ALL = "all"
OTHER = "Other"
OWN, HEARD = "*", "+"
NOTE = (
    f"Decisions are taken among the classes that are compared; clips of others are left out. In brackets: {LEVEL} % "
    f"intervals over draws of the corpus's speakers. {OWN} the system was trained on other clips of this corpus; "
    f"{HEARD} and on some of these speakers."
)


@dataclass(frozen=True)
class Place:
    """A corpus to judge on: its name, split ("all" for all of them together) and folder."""

    corpus: str
    split: str = "test"
    data_dir: str | None = None

    @property
    def title(self) -> str:
        return f"{self.corpus} ({self.split})"


@dataclass
class Cell:
    """What a system said of a corpus: its clips by id, their consensus as a label, and the scores by label."""

    model: str
    place: Place
    label_set: LabelSet
    logits: np.ndarray
    labels: np.ndarray
    speakers: list[str]
    mark: str = ""

    @property
    def classes(self) -> list[str]:
        """The scored classes that some clip has."""
        return [label for label in self.label_set.scored if (self.labels == self.label_set.index(label)).any()]

    def figures(self, classes: Sequence[str], repeats: int, seed: int = 0) -> dict[str, Any]:
        """UAR, macro-F1 and accuracy of decisions among the classes, each a (value, interval)."""
        labels = self.label_set
        among = LabelSet(labels.labels, [label for label in labels.majority if label in classes], classes)
        resampling = Resampling(self.speakers, repeats, seed)
        found = decision_figures(resampling, decisions(self.logits, among), self.labels, among)
        figures: dict[str, Any] = {
            name: (float(found[name][0]), resampling.interval(found[name])) for name in ("uar", "macro_f1", "accuracy")
        }
        clips = int(np.isin(self.labels, among.indices(classes)).sum())
        return {"classes": list(classes), "clips": clips, "chance": 1 / len(classes), **figures}


@dataclass
class Trained:
    """What a system's recipe says that it was trained on: the corpus, and ids and speakers of its clips."""

    corpus: str | None = None
    clips: set[str] = field(default_factory=set)
    speakers: set[str] = field(default_factory=set)


def parse_place(text: str, split: str = "test") -> Place:
    """`NAME[:SPLIT][=DIR]` as a place.

    Args:
        text: such as "emo_db=DIR", "emo_db:all=DIR" or "synthetic".
        split: where none is named.

    Raises:
        CorpusError: no name.
    """
    named, _, folder = text.partition("=")
    name, _, own = named.partition(":")
    if not name:
        raise CorpusError(f"--corpora {text!r} names no corpus; give NAME=DIR, or NAME:SPLIT=DIR.")
    return Place(name, own or split, folder or None)


def evaluate_across(
    models: Sequence[str | Path],
    corpora: Sequence[str],
    output_dir: str | Path | None = None,
    split: str = "test",
    corpus_options: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    bootstrap: int = 1000,
) -> Path | None:
    """Judge every system on every corpus, over the classes in common, and print the table.

    Each system is judged by itself, with its own label set: an emotion of a corpus that it does not know is left out.
    The first table is over the classes that all systems and all corpora have, so that its cells can be compared; the
    second has, in each cell, all classes that this system and this corpus share.

    Args:
        models: folders or Hub ids of systems, and of ensembles.
        corpora: `NAME[:SPLIT][=DIR]` each, of names known to `load_corpus`; SPLIT "all" takes all splits together.
        output_dir: where cross_corpus.md, cross_corpus.json and cross_corpus.png go, if anywhere.
        split: of corpora that name none.
        corpus_options: corpus -> options of its loader.
        batch_size: clips per batch.
        bootstrap: draws of the speakers, for intervals.

    Returns:
        The folder, if there is one.

    Raises:
        CorpusError: a corpus cannot be read, lacks the split, is named twice with it, or has no consensus that the
            system scores; options of a corpus that is not named; or clips that a system was trained on (by the
            recipe.yaml in its folder).
        ValueError: a system without the primary head, or fewer than two classes in common (lists those of each).
    """
    places = [parse_place(text, split) for text in corpora]
    options = dict(corpus_options or {})
    if len({place.title for place in places}) < len(places):
        raise CorpusError(f"--corpora names a corpus and split twice: {[place.title for place in places]}.")
    strange = sorted(set(options) - {place.corpus for place in places})
    if strange or not all(isinstance(value, Mapping) for value in options.values()):
        raise CorpusError(
            f"--corpus_options is {options}; with --corpora give the options of each: {{{places[0].corpus}: "
            f"{{option: value}}}}, of {[place.corpus for place in places]}."
        )
    cells = []
    for name in map(str, models):
        ((model, processor),) = load_systems([name])
        label_set = label_set_of(model.config)
        for place in places:
            rows = _rows(place, label_set, options.get(place.corpus, {}))
            trained = _trained_on(name, place, label_set)
            mark = _mark(name, place, rows, trained)
            said = predict(model, processor, rows, label_set, batch_size)
            labels = said.label_ids[CONSENSUS].astype(int)
            cell = Cell(name, place, label_set, said.predictions["logits"], labels, list(rows["speaker"]), mark)
            if not cell.classes:
                raise CorpusError(
                    f"No clip of {place.title} has a consensus that {name} scores: {label_set.scored}. Does its "
                    "label_names option name them?"
                )
            cells.append(cell)
    common = [label for label in cells[0].classes if all(label in cell.classes for cell in cells)]
    if len(common) < 2:
        known = "; ".join(f"{cell.model} and {cell.place.title}: {cell.classes}" for cell in cells)
        raise ValueError(f"Fewer than two classes are common to all systems and corpora. {known}.")
    found: list[dict[str, Any]] = [
        {
            "model": cell.model,
            "corpus": cell.place.corpus,
            "split": cell.place.split,
            "trained_on_corpus": bool(cell.mark),
            "speakers_heard": HEARD in cell.mark,
            "speakers": len(set(cell.speakers) - {""}),
            "common": cell.figures(common, bootstrap),
            "own": cell.figures(cell.classes, bootstrap),
        }
        for cell in cells
    ]
    tables = [
        _table(f"{title}, classes in common", cells, [row["common"] for row in found], name, False)
        for name, title in FIGURES.items()
    ]
    tables += [
        _table(f"{title}, all classes of the pair", cells, [row["own"] for row in found], name, True)
        for name, title in FIGURES.items()
    ]
    head = f"Classes in common: {', '.join(common)}; chance {1 / len(common):.3f}."
    print("\n\n".join([head, *tables, NOTE]))
    if output_dir is None:
        return None
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "cross_corpus.md") as beside:
        text = [f"# Across corpora ({date.today().isoformat()})", head, "![UAR](cross_corpus.png)", *tables, NOTE]
        beside.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    write_json({"classes": common, "cells": found}, folder / "cross_corpus.json")
    values = [[row["common"]["uar"][0] for row in found[start : start + len(places)]] for start in _starts(cells)]
    names = [_short(cell.model) for cell in cells[:: len(places)]]
    plot_matrix(values, names, [place.title for place in places], 1 / len(common), folder / "cross_corpus.png")
    return folder


def _rows(place: Place, label_set: LabelSet, options: Mapping[str, Any]) -> Dataset:
    """The place's clips in the system's label set; those of other emotions have no label and no votes.

    A label set without "Other" is given one to load with: else a corpus with one emotion more could not be read.
    """
    has_other = OTHER in label_set.labels
    wider = label_set if has_other else LabelSet((*label_set.labels, OTHER), label_set.majority, label_set.scored)
    splits = load_corpus(place.corpus, place.data_dir, label_set=wider, **options)
    if place.split == ALL:
        rows = concatenate_datasets(list(splits.values()))
    elif place.split in splits:
        rows = splits[place.split]
    else:
        raise CorpusError(
            f"Corpus {place.corpus} has no split {place.split!r}; it has {list(splits)}, or take {ALL!r}."
        )
    if has_other:
        return rows
    columns = rows.select_columns(["votes", "label"]).with_format("numpy")[:]
    votes, labels = columns["votes"][:, :-1], columns["label"]
    rows = rows.select(np.flatnonzero(labels < len(label_set.labels)))
    votes = votes[labels < len(label_set.labels)]
    kept, feature = rows.remove_columns("votes"), canonical_features(label_set)["votes"]
    return kept.add_column("votes", votes.tolist(), feature=feature).select_columns(rows.column_names)


def _trained_on(model: str, place: Place, label_set: LabelSet) -> Trained:
    """What the recipe in a system's folder says of this corpus; nothing where there is none, or of another."""
    file = Path(model) / "recipe.yaml"
    if not file.is_file():
        return Trained()
    try:
        recipe = load_recipe(file)
    except SettingsError as error:
        logger.warning("What %s was trained on is not known: %s", model, error)
        return Trained()
    if recipe.get("corpus") != place.corpus:
        return Trained()
    wider = LabelSet([*dict.fromkeys((*label_set.labels, OTHER))], label_set.majority, label_set.scored)
    options = recipe.get("corpus_options") or {}
    audio = place.corpus in ("synthetic",)  # which has no labels without its voices
    splits = load_corpus(place.corpus, place.data_dir, label_set=wider, audio=audio, **options)
    heard = [splits[name] for name in (recipe.get("train_split", "train"),) if name in splits]
    clips = {clip for rows in heard for clip in rows["id"]}
    return Trained(place.corpus, clips, {name for rows in heard for name in rows["speaker"]} - {""})


def _mark(model: str, place: Place, rows: Dataset, trained: Trained) -> str:
    if trained.corpus is None:
        return ""
    seen = sorted(set(rows["id"]) & trained.clips)
    if seen:
        raise CorpusError(
            f"{len(seen)} clips of {place.title} are among those that {model} was trained on (such as {seen[0]}): "
            f"name another split, or the recipe's splits with --corpus_options '{{{place.corpus}: {{...}}}}'."
        )
    return OWN + (HEARD if set(rows["speaker"]) & trained.speakers else "")


def _table(title: str, cells: Sequence[Cell], figures: Sequence[Mapping[str, Any]], name: str, sizes: bool) -> str:
    """A Markdown table: a row a system, a column a corpus."""
    columns = list(dict.fromkeys(cell.place.title for cell in cells))
    lines = [f"| {title} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for start in _starts(cells):
        row = []
        for cell, found in list(zip(cells, figures, strict=True))[start : start + len(columns)]:
            size = f" ({len(found['classes'])} classes)" if sizes else ""
            row.append(f"{shown(*found[name])}{cell.mark}{size}, {found['clips']} clips")
        lines.append(f"| {_short(cells[start].model)} | {' | '.join(row)} |")
    return "\n".join(lines)


def _starts(cells: Sequence[Cell]) -> range:
    return range(0, len(cells), len({cell.place.title for cell in cells}))


def _short(model: str) -> str:
    return Path(model).name if Path(model).is_dir() else model


__all__ = ["Cell", "Place", "evaluate_across", "parse_place"]
