"""Clips' votes in, one epoch's plan out: what is dropped, mixed and left out, and the targets (paper, section 2).

Nothing here touches audio: the collator renders what the plan says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sailer.data.labels import distribution
from sailer.data.schema import ATTRIBUTES, SECONDARY_LABELS, CorpusError, LabelSet

if TYPE_CHECKING:
    from datasets import Dataset, Features

ANNOTATION_DROPOUT = 0.2
MAXIMUM_GAP_SECONDS = 2.0
DropoutMode = Literal["majority", "empirical"]
MixingMode = Literal["minority", "same_emotion"]

# The columns of the canonical row that a plan depends on.
NARROW_COLUMNS = ("votes", "secondary_votes", "attributes", "label")
# And one that rows have which a teacher has judged: its distribution over the labels.
TEACHER_COLUMN = "teacher"

# Each kind of random number has a stream of its own; a row of the first holds these draws, in this order.
_CHOICES, _ANNOTATIONS, _SUBSET, _SPEED = range(4)
_MIX, _CLASS, _CLIP, _ORDER, _COIN, _SECONDS, _ROUNDING, _TEXT = range(8)
_MAP_BATCH = 10_000


@dataclass
class AugmentationSettings:
    """How training clips are augmented; everything is off by default.

    Args:
        annotation_dropout: share of a clip's annotations that is dropped, from the majority classes only. The paper's
            is 0.2, which `True` stands for.
        annotation_dropout_mode: which of them. "majority": each with equal probability; "empirical": in proportion to
            the class's share in the corpus' empirical distribution, so that the commonest class loses most.
        mixing_probability: probability p_a with which a clip is mixed with another one.
        mixing_mode: "minority": a clip of a majority class with one of a minority class (drawn by inverse frequency,
            then uniformly); "same_emotion": a clip of any class with another of its class (EMix).
        max_seconds: longest training clip, mixes included.
        speed_perturbation: clips are played at a speed drawn from 1 / (1 + this) to 1 + this, evenly by its logarithm:
            higher and lower voices than the corpus has (https://www.isca-archive.org/interspeech_2015/
            ko15_interspeech.html). Of K plans that are cycled through, each has a clip at another one of K speeds,
            as far from each other: they are the same whatever the seed, so that kept states serve every seed.
        text_dropout: probability with which a clip's transcript is withheld.
        undersample_majority: share of the majority classes' clips that an epoch leaves out, another one each epoch.
        augmentation_variants: 0 for a fresh plan every epoch; K to cycle through K plans, so that features of
            a frozen encoder can be kept.
        manifold_mixup: alpha of the Beta distribution that the trainer mixes fused embeddings by; 0 is off.
        state_mixup: alpha of the Beta distribution that the trainer mixes frozen towers' kept states by; 0 is off.

    Raises:
        ValueError: an option outside its range or set of values; the message names it.
    """

    annotation_dropout: float | bool = 0.0
    annotation_dropout_mode: DropoutMode = "majority"
    mixing_probability: float = 0.0
    mixing_mode: MixingMode = "minority"
    max_seconds: float = 15.0
    speed_perturbation: float = 0.0
    text_dropout: float = 0.0
    undersample_majority: float = 0.0
    augmentation_variants: int = 0
    manifold_mixup: float = 0.0
    state_mixup: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.annotation_dropout, bool):
            self.annotation_dropout = ANNOTATION_DROPOUT if self.annotation_dropout else 0.0
        for option in (
            "annotation_dropout",
            "mixing_probability",
            "text_dropout",
            "undersample_majority",
            "speed_perturbation",
        ):
            value = getattr(self, option)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"{option} is a rate between 0 and 1, got {value!r}.")
        for option, mode in (("annotation_dropout_mode", DropoutMode), ("mixing_mode", MixingMode)):
            if getattr(self, option) not in get_args(mode):
                raise ValueError(f"{option} is one of {list(get_args(mode))}, got {getattr(self, option)!r}.")
        if not isinstance(self.augmentation_variants, int) or self.augmentation_variants < 0:
            raise ValueError(f"augmentation_variants is a whole number from 0, got {self.augmentation_variants!r}.")
        for option in ("manifold_mixup", "state_mixup"):
            value = getattr(self, option)
            if not 0 <= value < math.inf:
                raise ValueError(f"{option} is a number from 0, got {value!r}.")
        if self.speed_perturbation and self.augmentation_variants == 1:
            raise ValueError(
                "speed_perturbation needs another number of augmentation_variants than 1: one plan has one speed."
            )
        if self.manifold_mixup and self.state_mixup:
            raise ValueError(
                f"manifold_mixup is {self.manifold_mixup:g} and state_mixup {self.state_mixup:g}: a batch is mixed "
                "once; leave one of them out."
            )
        shortest = MAXIMUM_GAP_SECONDS if self.mixing_probability else 0
        if not self.max_seconds > shortest:
            raise ValueError(f"max_seconds must exceed {shortest} s (the longest silence), got {self.max_seconds!r}.")


def plan_features(label_set: LabelSet, is_taught: bool = False) -> Features:
    """`datasets.Features` of a plan: one row per training row of an epoch.

    index is the clip's row in the corpus; partner is the row that it is mixed with or -1, heard first if
    partner_first is set; gap is in seconds, positive for silence between the two and negative for overlap; all of it
    is played at speed. votes are the clip's own after annotation dropout. The targets are those of what is heard, NaN
    where unknown; hard_target is the consensus label's (both labels' mean, for a mix). drop_text withholds the
    transcript. Of rows with a `TEACHER_COLUMN` there is a teacher_target too.
    """
    from datasets import Features, List, Value

    labels = List(Value("float32"), length=len(label_set.labels))
    return Features(
        {
            "index": Value("int32"),
            "partner": Value("int32"),
            "partner_first": Value("bool"),
            "gap": Value("float32"),
            "speed": Value("float32"),
            "votes": labels,
            "target": labels,
            "hard_target": labels,
            "secondary_target": List(Value("float32"), length=len(SECONDARY_LABELS)),
            "attribute_target": List(Value("float32"), length=len(ATTRIBUTES)),
            "drop_text": Value("bool"),
            **({"teacher_target": labels} if is_taught else {}),
        }
    )


def plan_epoch(
    rows: Dataset,
    settings: AugmentationSettings,
    label_set: LabelSet,
    seed: int,
    epoch: int,
    num_proc: int | None = None,
) -> Dataset:
    """One epoch's plan, a function of its arguments alone (`num_proc` changes nothing but the time).

    Args:
        rows: clips with at least the columns `NARROW_COLUMNS` of the canonical row; other columns are not read.
        settings: the augmentations.
        label_set: the primary label set of the rows.
        seed: not negative.
        epoch: number of the epoch, from 0.
        num_proc: processes of `Dataset.map`.

    Returns:
        A plan with the columns of `plan_features`, in the order of the corpus and of the same length every epoch.

    Raises:
        CorpusError: mixing with minority clips where the corpus has none, or no clip is left after undersampling.
    """
    from datasets import Dataset

    clips = _Clips.of(rows, label_set)
    if settings.mixing_probability and settings.mixing_mode == "minority" and not clips.is_minority.any():
        raise CorpusError(
            f"Audio mixing needs clips of a minority class, and none of the corpus' {len(rows)} clips has a consensus "
            f"label among {list(label_set.minority)}. Set mixing_probability to 0 or mixing_mode to same_emotion."
        )
    index = Dataset.from_dict({"index": _epoch_subset(clips, settings, seed, epoch)})
    plan = index.with_format("numpy").map(
        _plan_batch,
        batched=True,
        batch_size=_MAP_BATCH,
        fn_kwargs={"clips": clips, "settings": settings, "seed": seed, "epoch": epoch},
        features=plan_features(label_set, clips.teacher is not None),
        keep_in_memory=True,
        num_proc=num_proc,
        desc=f"Planning epoch {epoch}",
    )
    # Row by row, plain values are read five times as fast as numpy ones.
    return plan.with_format(None)


def drop_annotations(
    votes: np.ndarray,
    rate: float,
    majority: np.ndarray,
    rounding: np.ndarray,
    keys: np.ndarray,
    class_weights: np.ndarray | None = None,
) -> np.ndarray:
    """Votes left after annotation dropout; a clip never loses its last annotation.

    Of n annotations, m of them for majority classes, min(rate * n, m, n - 1) are dropped in expectation: that number
    is rounded up or down at random. Fractional votes count as annotations of less weight, of which the last one
    dropped may be dropped in part.

    Args:
        votes: (clips, labels), counts.
        rate: share of the annotations to drop, in [0, 1].
        majority: indices of the classes to drop from.
        rounding: (clips,) uniform in [0, 1): decides the rounding.
        keys: (clips, at least `annotation_slots(votes, majority)`) uniform in [0, 1): decides which annotations go.
        class_weights: (labels,) relative weight of each class's annotations in the draw; equal by default.
    """
    votes = votes.astype(np.float64)
    total, available = votes.sum(axis=1), votes[:, majority].sum(axis=1)
    most = np.maximum(np.minimum(available, total - 1), 0)
    expected = np.minimum(rate * total, most)
    low = np.floor(expected)
    high = np.minimum(low + 1, most)
    to_drop = np.where(rounding * (high - low) < expected - low, high, low)

    # One unit per annotation. They are dropped in the order of independent exponential times with rates
    # equal to their weights, which is weighted sampling without replacement.
    units = np.ceil(votes[:, majority]).astype(np.int64)
    row = np.repeat(np.arange(len(votes)), units.sum(axis=1))
    label = np.repeat(np.tile(majority, len(votes)), units.reshape(-1))
    slot = np.arange(len(row)) - np.repeat(np.cumsum(units.sum(axis=1)) - units.sum(axis=1), units.sum(axis=1))
    nth = np.arange(len(row)) - np.repeat(np.cumsum(units.reshape(-1)) - units.reshape(-1), units.reshape(-1))
    weight = np.ones(len(row)) if class_weights is None else np.asarray(class_weights)[label]
    order = np.lexsort((-np.log1p(-keys[row, slot]) / weight, row))
    row, label = row[order], label[order]
    mass = np.minimum(votes[row, label] - nth[order], 1)
    before = np.cumsum(mass) - mass
    before -= before[np.searchsorted(row, row)]
    np.subtract.at(votes, (row, label), np.clip(to_drop[row] - before, 0, mass))
    return np.maximum(votes, 0).astype(np.float32)


def annotation_slots(votes: np.ndarray, majority: np.ndarray) -> int:
    """How many random keys `drop_annotations` needs for each clip of votes (clips, labels)."""
    return int(np.ceil(votes[:, majority]).sum(axis=1).max(initial=0))


@dataclass
class _Clips:
    """The narrow table as arrays, and where each class's clips are."""

    votes: np.ndarray
    secondary: np.ndarray
    attributes: np.ndarray
    label: np.ndarray
    majority: np.ndarray
    is_majority: np.ndarray
    is_minority: np.ndarray
    prior: np.ndarray
    class_size: np.ndarray
    class_chance: np.ndarray
    by_class: np.ndarray
    class_start: np.ndarray
    place_in_class: np.ndarray
    teacher: np.ndarray | None

    @classmethod
    def of(cls, rows: Dataset, label_set: LabelSet) -> _Clips:
        taught = [TEACHER_COLUMN] if TEACHER_COLUMN in rows.column_names else []
        columns = rows.select_columns([*NARROW_COLUMNS, *taught]).with_format("numpy")[:]
        votes, label = columns["votes"].astype(np.float32), columns["label"].astype(np.int64)
        if not len(label):
            raise CorpusError("There are no training clips to plan an epoch of.")
        targets = distribution(votes)
        known = targets[np.isfinite(targets).all(axis=1)]
        size = np.bincount(label[label >= 0], minlength=len(label_set.labels))
        minority = np.asarray(label_set.indices(label_set.minority), dtype=np.int64)
        chance = np.zeros(len(size))
        chance[minority] = np.where(size[minority] > 0, 1 / np.maximum(size[minority], 1), 0)
        # Clips without a consensus label come first in this order and belong to no class.
        by_class = np.argsort(label, kind="stable")
        start = np.cumsum(size) - size + (label < 0).sum()
        place = np.empty(len(label), dtype=np.int64)
        place[by_class] = np.arange(len(label))
        return cls(
            votes=votes,
            secondary=distribution(columns["secondary_votes"]).astype(np.float32),
            attributes=columns["attributes"].astype(np.float32),
            label=label,
            majority=np.asarray(label_set.indices(label_set.majority), dtype=np.int64),
            is_majority=np.isin(label, label_set.indices(label_set.majority)),
            is_minority=np.isin(label, minority),
            prior=known.mean(axis=0) if len(known) else np.full(len(size), 1 / len(size)),
            class_size=size,
            class_chance=chance,
            by_class=by_class,
            class_start=start,
            place_in_class=place - start[np.maximum(label, 0)],
            teacher=columns[TEACHER_COLUMN].astype(np.float32) if taught else None,
        )


@lru_cache(maxsize=4)
def _uniform(seed: int, epoch: int, stream: int, rows: int, draws: int) -> np.ndarray:
    """Random numbers of a whole epoch, (rows, draws), the same for every process that asks."""
    return np.random.default_rng([seed, epoch, stream]).random((rows, draws))


def _epoch_subset(clips: _Clips, settings: AugmentationSettings, seed: int, epoch: int) -> np.ndarray:
    """Rows of the corpus that an epoch uses: all but a random share of the majority classes' clips."""
    majority = np.flatnonzero(clips.is_majority)
    left_out = round(settings.undersample_majority * len(majority))
    if left_out == len(clips.label):
        raise CorpusError("undersample_majority leaves no training clip: every clip is of a majority class. Lower it.")
    generator = np.random.default_rng([seed, epoch, _SUBSET])
    keep = np.ones(len(clips.label), dtype=bool)
    keep[generator.permutation(majority)[:left_out]] = False
    return np.flatnonzero(keep)


def _plan_batch(
    batch: dict[str, np.ndarray], clips: _Clips, settings: AugmentationSettings, seed: int, epoch: int
) -> dict[str, Any]:
    index = np.asarray(batch["index"], dtype=np.int64)
    draws = _uniform(seed, epoch, _CHOICES, len(clips.label), 8)
    partner = _partners(index, draws[index], clips, settings)
    mixed = partner >= 0
    seconds = draws[index, _SECONDS] * MAXIMUM_GAP_SECONDS
    votes = _kept_votes(index, draws, clips, settings, seed, epoch)
    one_hot = np.eye(len(clips.class_size), dtype=np.float32)

    def mean(own: np.ndarray, others: np.ndarray) -> np.ndarray:
        own = own.astype(np.float32)
        own[mixed] = (own[mixed] + others) / 2
        return own

    def hard(rows: np.ndarray) -> np.ndarray:
        label = clips.label[rows]
        return np.where(label[:, None] >= 0, one_hot[np.maximum(label, 0)], np.float32(np.nan))

    others = partner[mixed]
    taught = {}
    if clips.teacher is not None:
        taught["teacher_target"] = mean(clips.teacher[index], clips.teacher[others])
    return taught | {
        "index": index,
        "partner": partner,
        "partner_first": mixed & (draws[index, _ORDER] < 0.5),
        "gap": np.where(mixed, np.where(draws[index, _COIN] < 0.5, seconds, -seconds), 0),
        "speed": _speeds(index, clips, settings, seed, epoch),
        "votes": votes,
        "target": mean(distribution(votes), distribution(_kept_votes(others, draws, clips, settings, seed, epoch))),
        "hard_target": mean(hard(index), hard(others)),
        "secondary_target": mean(clips.secondary[index], clips.secondary[others]),
        "attribute_target": mean(clips.attributes[index], clips.attributes[others]),
        "drop_text": draws[index, _TEXT] < settings.text_dropout,
    }


def _speeds(index: np.ndarray, clips: _Clips, settings: AugmentationSettings, seed: int, epoch: int) -> np.ndarray:
    if variants := settings.augmentation_variants:
        place = (index + epoch) % variants / max(variants - 1, 1)
    else:
        place = _uniform(seed, epoch, _SPEED, len(clips.label), 1)[index, 0]
    return (1 + settings.speed_perturbation) ** (2 * place - 1)


def _kept_votes(
    index: np.ndarray, draws: np.ndarray, clips: _Clips, settings: AugmentationSettings, seed: int, epoch: int
) -> np.ndarray:
    votes = clips.votes[index]
    if not settings.annotation_dropout:
        return votes
    keys = _uniform(seed, epoch, _ANNOTATIONS, len(clips.label), annotation_slots(clips.votes, clips.majority))
    weights = clips.prior if settings.annotation_dropout_mode == "empirical" else None
    rounding = draws[index, _ROUNDING]
    return drop_annotations(votes, settings.annotation_dropout, clips.majority, rounding, keys[index], weights)


def _partners(index: np.ndarray, draws: np.ndarray, clips: _Clips, settings: AugmentationSettings) -> np.ndarray:
    """Row that each clip is mixed with, or -1."""
    if not settings.mixing_probability:
        return np.full(len(index), -1)
    own_class = np.maximum(clips.label[index], 0)
    if settings.mixing_mode == "same_emotion":
        partner_class = own_class
        choices = clips.class_size[own_class] - 1
        allowed = (clips.label[index] >= 0) & (choices > 0)
    else:
        classes = np.flatnonzero(clips.class_chance)
        edges = np.cumsum(clips.class_chance[classes])
        drawn = np.searchsorted(edges, draws[:, _CLASS] * edges[-1], side="right")
        partner_class = classes[np.minimum(drawn, len(classes) - 1)]
        choices = clips.class_size[partner_class]
        allowed = clips.is_majority[index]
    allowed = allowed & (draws[:, _MIX] < settings.mixing_probability)
    place = np.floor(draws[:, _CLIP] * choices).astype(np.int64)
    if settings.mixing_mode == "same_emotion":
        # Any clip of the class but the clip itself.
        place += place >= clips.place_in_class[index]
    partner = np.full(len(index), -1)
    partner[allowed] = clips.by_class[clips.class_start[partner_class[allowed]] + place[allowed]]
    return partner
