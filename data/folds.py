"""Folds of a corpus from a file: which clips test and which train, checked against its own clips and speakers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sailer.data.schema import CorpusError, CorpusReport

SIDES = {"train", "test"}


class Fold(NamedTuple):
    """Rows of a corpus: those that train and those that test."""

    train: list[int]
    test: list[int]


def read_folds(path: str | Path) -> dict[str, Any]:
    """A file of folds, for `fold_rows`.

    Args:
        path: JSON, either fold -> ids of the clips that it tests (all other folds' clips then train), or fold ->
            {"train": ids, "test": ids}.

    Raises:
        CorpusError: the file cannot be read, or does not have this form; the message names it and the fold.
    """
    try:
        folds = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(f"The folds in {path} cannot be read: {error}") from error
    if not isinstance(folds, dict) or not folds:
        raise CorpusError(f'{path} holds no folds: give a mapping, {{"fold 1": ["clip id", ...], ...}}.')
    for name, fold in folds.items():
        sides = list(fold.values()) if isinstance(fold, dict) and set(fold) == SIDES else [fold]
        for ids in sides:
            if not isinstance(ids, list) or not ids or not all(isinstance(clip, str) for clip in ids):
                raise CorpusError(
                    f'Fold {name!r} of {path} is neither a list of clip ids nor {{"train": ids, "test": ids}}, each '
                    "with one at least."
                )
    if len({isinstance(fold, dict) for fold in folds.values()}) > 1:
        raise CorpusError(f"{path} has folds of both forms: list the clips of all alike.")
    return folds


def fold_rows(
    folds: Mapping[str, Any],
    ids: Sequence[str],
    speakers: Sequence[str],
    report: CorpusReport,
    allow_missing: bool = False,
    allow_shared_speakers: bool = False,
) -> dict[str, Fold]:
    """The rows of each fold.

    Args:
        folds: as `read_folds` gives them.
        ids, speakers: of each row of the corpus; a speaker "" is unknown.
        report: counts what is left out: clips of the corpus in no fold, and with `allow_missing` those of a fold that
            the corpus lacks.
        allow_missing: leave such clips out, and a fold that has none left on a side, rather than raise.
        allow_shared_speakers: note speakers who are on both sides of a fold, rather than raise.

    Raises:
        CorpusError: a clip that the corpus lacks, is twice in a fold or in several folds that test; a speaker on both
            sides; or no fold with clips. The message names the fold, the clips or speakers, and the way out.
    """
    row_of = {clip: row for row, clip in enumerate(ids)}
    if isinstance(next(iter(folds.values())), dict):
        named = {name: (fold["train"], fold["test"]) for name, fold in folds.items()}
        listed = [(name, clip) for name, (train, test) in named.items() for clip in (*train, *test)]
    else:
        _check_apart(folds)
        listed = [(name, clip) for name, fold in folds.items() for clip in fold]
        named = {name: ([clip for other, clip in listed if other != name], fold) for name, fold in folds.items()}
    unknown: dict[str, str] = {}
    for name, clip in listed:
        if clip not in row_of:
            unknown.setdefault(clip, name)
    if unknown and not allow_missing:
        raise CorpusError(
            f"The folds name {len(unknown)} clips that the corpus lacks, {_some(list(unknown))} (the first in fold "
            f"{next(iter(unknown.values()))!r}): they are its clips' ids, see `sailer data`. To leave out what is not "
            "at hand, pass --allow_missing."
        )
    for clip in unknown:
        report.leave_out("the folds name it and the corpus lacks it", clip)
    found: dict[str, Fold] = {}
    for name, sides in named.items():
        fold = Fold(*([row_of[clip] for clip in side if clip in row_of] for side in sides))
        twice = [ids[row] for row, times in Counter([*fold.train, *fold.test]).items() if times > 1]
        if twice:
            raise CorpusError(f"Fold {name!r} names {_some(twice)} twice: a clip trains or tests, once.")
        if not fold.train or not fold.test:
            report.leave_out("a fold without clips to " + ("test" if fold.train else "train"), name)
            continue
        _check_speakers(name, fold, speakers, report, allow_shared_speakers)
        found[name] = fold
    if not found:
        raise CorpusError("No fold has clips of this corpus on both sides: " + " ".join(report.lines()))
    used = {row for fold in found.values() for side in fold for row in side}
    for row, clip in enumerate(ids):
        if row not in used:
            report.leave_out("it is in no fold", clip)
    return found


def _check_apart(folds: Mapping[str, Sequence[str]]) -> None:
    if len(folds) == 1:
        raise CorpusError('One fold alone leaves nothing to train on: give {"train": ids, "test": ids} for it.')
    first: dict[str, str] = {}
    for name, fold in folds.items():
        for clip in fold:
            if first.setdefault(clip, name) != name:
                raise CorpusError(f"Clip {clip!r} is in folds {first[clip]!r} and {name!r}: one of them tests it.")


def _check_speakers(
    name: str, fold: Fold, speakers: Sequence[str], report: CorpusReport, allow_shared_speakers: bool
) -> None:
    shared = {speakers[row] for row in fold.train} & {speakers[row] for row in fold.test} - {""}
    if shared and not allow_shared_speakers:
        raise CorpusError(
            f"Fold {name!r} has the same speakers on both sides, {_some(sorted(shared))}: its figures would not be of "
            "voices that are new. Put all clips of a speaker in one fold, or pass --allow_shared_speakers where the "
            "protocol is so."
        )
    if shared:
        report.note(f"Fold {name!r} has {len(shared)} speakers on both sides: {_some(sorted(shared))}.")
    if any(speakers[row] == "" for row in fold.test):
        report.note(f"Fold {name!r} has clips of unknown speakers: that they are new cannot be checked.")


def _some(items: Sequence[str], number: int = 3) -> str:
    return ", ".join(items[:number]) + (", ..." if len(items) > number else "")
