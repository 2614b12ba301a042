"""Splits of a corpus: their names, rows grouped by them, and speakers kept apart."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from sailer.data.schema import CorpusError, CorpusReport


@cache
def split_name(text: str) -> str | None:
    """The canonical name of a split (train, validation, test, test1, ...), or None where `text` names none.

    Raises:
        CorpusError: another name.
    """
    key = re.sub(r"[\s_-]", "", text).lower()
    if key in ("", "na", "n/a", "none", "unknown"):
        return None
    names = {"train": "train", "training": "train"}
    names |= dict.fromkeys(("development", "dev", "validation", "valid", "val"), "validation")
    if key not in names and not re.fullmatch(r"test\d*", key):
        raise CorpusError(f"split {text!r} is none of Train, Development, Validation, Test, Test1, Test2, ..., NA")
    return names.get(key, key)


def take_rows(columns: Mapping[str, Any], rows: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """The given rows of every column."""
    return {
        name: values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
        for name, values in columns.items()
    }


def by_split(
    columns: Mapping[str, Any], splits: Sequence[str], wanted: Sequence[str] | str | None = None
) -> dict[str, dict[str, Any]]:
    """Rows grouped by their split, train and validation first.

    Args:
        columns: canonical columns.
        splits: the split of each row.
        wanted: the splits to keep, as a list or "train,validation"; by default all.

    Raises:
        CorpusError: a wanted split that no row belongs to; the message names those there are.
    """
    present = sorted(set(splits), key=lambda name: (name != "train", name != "validation", name))
    rows = np.asarray(splits, dtype=object)
    return {
        name: take_rows(columns, np.flatnonzero(rows == name)) for name in present if name in chosen(present, wanted)
    }


def chosen(present: Sequence[str], wanted: Sequence[str] | str | None) -> list[str]:
    """The splits of `wanted`, under any of their names; all that are `present` if it is None.

    Raises:
        CorpusError: a split that is not there.
    """
    if wanted is None:
        return list(present)
    names = [name for name in (wanted.split(",") if isinstance(wanted, str) else wanted) if name.strip()]
    absent = [name for name in names if name not in present and split_name(name) not in present]
    if absent:
        raise CorpusError(f"The corpus has no split {absent}; it has {list(present)}.")
    return [name if name in present else str(split_name(name)) for name in names]


def assign_splits(
    named: Sequence[str | None],
    speakers: Sequence[str],
    has_column: bool,
    fractions: Mapping[str, float] | None,
    report: CorpusReport,
) -> list[str]:
    """The split of each clip of a table.

    Args:
        named: the split that each clip names; None where it names none. Such clips are "unassigned" beside others.
        speakers: the speaker of each; a clip without one is a speaker by itself.
        has_column: whether the table has a column of splits at all.
        fractions: without splits, the share of the clips that each split but "train" is to have at least; speakers
            are kept apart, and the same ones always fall alike. None puts all into "train".
        report: notes which of this was done.

    Raises:
        CorpusError: fractions beside a column of splits, outside 0 to 1 or together 1 or more, or a name that is no
            split.
    """
    if fractions and has_column:
        raise CorpusError("A split column and split_fractions are both given: leave one out.")
    if any(named):
        if None in named:
            report.note(f"{named.count(None)} clips name no split: they are the split 'unassigned'.")
        return [split or "unassigned" for split in named]
    if not fractions:
        report.note("No split is given: every clip is in 'train'. Name a split column, or set split_fractions.")
        return ["train"] * len(named)
    if any(not 0 <= share < 1 for share in fractions.values()) or sum(fractions.values()) >= 1:
        raise CorpusError(
            f"split_fractions {dict(fractions)}: give shares from 0 to 1 that leave some clips to train."
        )
    keys = [speaker or f"clip {row}" for row, speaker in enumerate(speakers)]
    clips = Counter(keys)
    order = iter(sorted(clips, key=lambda key: hashlib.sha256(key.encode()).digest()))
    split_of: dict[str, str] = {}
    for text, share in fractions.items():
        taken = 0
        while taken < share * len(keys) and (speaker := next(order, None)) is not None:
            split_of[speaker] = split_name(text) or "unassigned"
            taken += clips[speaker]
    return [split_of.get(key, "train") for key in keys]


def actor_splits(corpus: str, known: Sequence[int], **actors: str | int | Sequence[int]) -> dict[int, str]:
    """The split of each actor, from the options that name the actors of each split.

    Args:
        corpus: its name in messages.
        known: the actors that it has.
        **actors: `train_actors`, `validation_actors`, ... as lists of numbers or text such as "1-8,11".

    Raises:
        CorpusError: no actor numbers, an actor that the corpus has not, or one in two splits.
    """
    split_of: dict[int, str] = {}
    for option, value in actors.items():
        split = option.removesuffix("_actors")
        for actor in _parse_actors(corpus, option, value, known):
            if split_of.setdefault(actor, split) != split:
                raise CorpusError(f"Actor {actor} is in both {split_of[actor]}_actors and {option}.")
    return split_of


def _parse_actors(corpus: str, option: str, value: str | int | Sequence[int], known: Sequence[int]) -> list[int]:
    """Actor numbers from a list of them or from text such as "1-8,11"; a range may pass over numbers not given."""
    actors: list[int] = []
    try:
        for part in str(value).split(",") if isinstance(value, str | int) else map(str, value):
            if part.strip():
                first, _, last = part.partition("-")
                numbers = range(int(first), int(last or first) + 1)
                actors += [number for number in numbers if number in known or number in (numbers[0], numbers[-1])]
    except (TypeError, ValueError, IndexError):
        raise CorpusError(f"{option}={value!r} is not a list of actor numbers, nor text such as '1-8,11'.") from None
    if impossible := [actor for actor in actors if actor not in known]:
        raise CorpusError(f"{option} names actors {impossible}; {corpus} has actors {min(known)} to {max(known)}.")
    return actors
