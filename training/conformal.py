"""Calibration clips go in, scores for prediction sets come out; and what such sets are worth on other clips.

Split conformal prediction (Vovk et al. 2005; https://arxiv.org/abs/2107.07511); the formula is that of
`windows_sailer.prediction_set`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sailer.data.schema import LabelSet
from sailer.training.bootstrap import Resampling
from sailer.windows_sailer import COVERAGE, check_conformal, kept_scores, score_threshold

PRIORS = ("balanced", "natural")
COVERAGES = (0.8, 0.9, 0.95)  # that an evaluation looks at


def fit_conformal(
    probabilities: Mapping[str, np.ndarray], labels: np.ndarray, label_set: LabelSet
) -> dict[str, Any] | None:
    """What `SailerConfig.conformal` holds: calibration scores, of all clips together and of each class.

    The score of a clip is 1 - p(its consensus), of probabilities that are scaled to sum to 1 over the scored classes.

    Args:
        probabilities: prior -> (clips, labels).
        labels: (clips,) consensus; clips whose consensus is not a scored class are left out.
        label_set: the primary emotions.

    Returns:
        `clips`, `scores` (prior -> ascending), `class_clips` (label -> clips) and `class_scores` (prior -> label ->
        ascending), kept as `windows_sailer.kept_scores` says; None if no clip has a scored class.
    """
    scored = np.asarray(label_set.indices(label_set.scored))
    known = np.isin(labels, scored)
    if not known.any():
        return None
    own = np.asarray(labels)[known].astype(int)
    classes = {label_set.labels[index]: own == index for index in scored if (own == index).any()}
    found: dict[str, Any] = {"clips": int(known.sum()), "scores": {}}
    found |= {"class_clips": {label: int(rows.sum()) for label, rows in classes.items()}, "class_scores": {}}
    column = np.argmax(own[:, None] == scored, axis=1)
    for prior, values in probabilities.items():
        scores = 1 - among_scored(values[known], label_set)[np.arange(len(own)), column]
        found["scores"][prior] = kept_scores(scores)
        found["class_scores"][prior] = {label: kept_scores(scores[rows]) for label, rows in classes.items()}
    return check_conformal(found, label_set.labels)


def known_probabilities(model: Any, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Prior -> probabilities (clips, labels) of a system or ensemble; no natural ones where its weights are unknown.

    Args:
        model: with `probabilities`.
        outputs: `logits`, and of an ensemble `member_logits`.
    """
    logits = torch.from_numpy(outputs.get("member_logits", outputs["logits"]))
    found = {}
    for prior in PRIORS:
        try:
            found[prior] = model.probabilities(logits, prior).double().numpy()
        except ValueError:
            if prior == "balanced":
                raise
    return found


def among_scored(probabilities: np.ndarray, label_set: LabelSet) -> np.ndarray:
    """(clips, labels) -> (clips, scored), scaled to sum to 1."""
    chosen = np.asarray(probabilities, dtype=np.float64)[:, label_set.indices(label_set.scored)]
    total = chosen.sum(axis=1, keepdims=True)
    return chosen / np.where(total > 0, total, 1)


def set_members(
    probabilities: np.ndarray,
    label_set: LabelSet,
    conformal: Mapping[str, Any],
    prior: str = "balanced",
    coverage: float = COVERAGE,
    by_class: bool = False,
) -> np.ndarray:
    """(clips, scored): whether each scored class is in each clip's set, as `windows_sailer.prediction_set` says."""
    if by_class:
        own = [
            (conformal["class_scores"][prior].get(label, ()), conformal["class_clips"].get(label, 0))
            for label in label_set.scored
        ]
        threshold = np.array([score_threshold(kept, clips, coverage) for kept, clips in own])
    else:
        threshold = np.array(score_threshold(conformal["scores"][prior], conformal["clips"], coverage))
    return 1 - among_scored(probabilities, label_set) <= threshold


def set_report(
    resampling: Resampling,
    probabilities: Mapping[str, np.ndarray],
    labels: np.ndarray,
    label_set: LabelSet,
    conformal: Mapping[str, Any],
    speakers: Sequence[str] = (),
    coverages: Sequence[float] = COVERAGES,
) -> list[dict[str, Any]]:
    """How sets do on clips of other speakers than they were fitted on: what is promised is not promised there.

    Args:
        resampling: of these clips.
        probabilities: prior -> (clips, labels).
        labels: (clips,) consensus; only clips of a scored class count.
        label_set: the primary emotions.
        conformal: of the system's configuration.
        speakers: (clips,) names, "" where unknown; none for no figures by speaker.
        coverages: that are asked for.

    Returns:
        A row per prior, kind of threshold and coverage asked for: `prior`, `by_class`, `asked`; `covered` (the share
        of clips whose consensus is in their set), `size` (classes in a set), `single` and `empty` (shares of the
        sets), each a (value, interval); and `classes` and `speakers`, the coverage of each. Empty where no clip has a
        scored class.
    """
    scored = np.asarray(label_set.indices(label_set.scored))
    known = np.isin(labels, scored)
    if not known.any():
        return []
    true = np.asarray(labels)[:, None] == scored
    names = np.array(speakers, dtype=object)
    people = {name: known & (names == name) for name in sorted(set(names[known]) - {""})} if len(names) else {}
    count = resampling.sums(known)
    rows = []
    for prior in (prior for prior in conformal["scores"] if prior in probabilities):
        for by_class in (False, True):
            for asked in coverages:
                members = set_members(probabilities[prior], label_set, conformal, prior, asked, by_class)
                sizes = members.sum(axis=1)
                hits = (members & true).any(axis=1)
                measured = {"covered": hits, "size": sizes, "single": sizes == 1, "empty": sizes == 0}
                row: dict[str, Any] = {"prior": prior, "by_class": by_class, "asked": asked}
                for name, values in measured.items():
                    with np.errstate(invalid="ignore"):
                        drawn = resampling.sums(np.where(known, values, 0)) / count
                    row[name] = (float(drawn[0]), resampling.interval(drawn))
                row["classes"] = {
                    label: float(hits[true[:, place]].mean())
                    for place, label in enumerate(label_set.scored)
                    if true[:, place].any()
                }
                row["speakers"] = {name: float(hits[mask].mean()) for name, mask in people.items()}
                rows.append(row)
    return rows


def set_figures(
    probabilities: np.ndarray, labels: np.ndarray, label_set: LabelSet, conformal: Mapping[str, Any]
) -> dict[str, float]:
    """The figures of a split in a line: coverage and size of sets of 90 % by the balanced prior, both kinds."""
    alone = Resampling([""] * len(labels), 1)  # without intervals
    rows = set_report(alone, {"balanced": probabilities}, labels, label_set, conformal, coverages=[0.9])
    return {
        f"set90{'_by_class' if row['by_class'] else ''}_{name}": row[key][0]
        for row in rows
        for name, key in (("coverage", "covered"), ("size", "size"))
    }
