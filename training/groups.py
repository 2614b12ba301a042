"""What a system said of a split goes in; its figures by groups of clips, and the gaps between groups, come out.

They show for whom a system is worse, so that it is not relied on there. They say nothing about people, and no decision
about anyone is to be drawn from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.special import entr, softmax

from sailer.data.schema import LabelSet
from sailer.training.bootstrap import (
    Resampling,
    decision_figures,
    distribution_figures,
    reliability_parts,
)
from sailer.training.metrics import CALIBRATION_BINS, decisions

KINDS = ("sex", "age", "duration", "agreement")
FIGURES = ("macro_f1", "accuracy", "kl")
AGES = ((0, 30), (30, 45), (45, 60), (60, 150))
DURATIONS = ((0, 2), (2, 4), (4, 8), (8, float("inf")))
AGREEMENTS = ((0, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0), (1.0, 1.1))
# Nats of the annotators' distribution: five of them who are 4 to 1 have 0.50, 3 to 2 0.67, 3-1-1 0.95, 2-2-1 1.05.
ENTROPIES = (0.0, 0.6, 1.0)
UNKNOWN = "unknown"
FEWEST = 10  # scored clips of a group whose figures are compared with another's


class View:
    """One system's outputs on a split, looked at by groups of clips.

    Args:
        logits: (clips, labels).
        targets: "consensus" (clips,) and "labels" (clips, labels), NaN rows where unknown.
        rows: the split's canonical rows, in the same order.
        label_set: the primary emotions.
        natural: (clips, labels) probabilities of the natural prior, if they are known.
        repeats, seed: of the bootstrap over speakers.
    """

    def __init__(
        self,
        logits: np.ndarray,
        targets: Mapping[str, np.ndarray],
        rows: Dataset,
        label_set: LabelSet,
        natural: np.ndarray | None = None,
        repeats: int = 1000,
        seed: int = 0,
    ) -> None:
        self.rows, self.label_set, self.natural, self.repeats, self.seed = rows, label_set, natural, repeats, seed
        self.labels, self.distributions = targets["consensus"].astype(int), targets["labels"]
        self.probabilities = softmax(logits.astype(np.float64), axis=1)
        self.decided = decisions(logits, label_set)
        self.scored = np.isin(self.labels, label_set.indices(label_set.scored))
        self.speakers = np.array(rows["speaker"], dtype=object)

    def groups(self, kind: str) -> list[dict[str, Any]]:
        """Rows of figures for each group of clips of a kind, unknown ones too; none where all are unknown.

        Args:
            kind: "speaker", "sex", "age", "duration", or "agreement": the share of annotators who chose the commonest
                class.

        Returns:
            By row `group`, `clips`, `scored`, `speakers`, `macro_f1`, `accuracy` and `kl`, each a (value, interval):
            over the group's speakers, or of a single speaker over the clips. Where there is but one of these the
            interval is None and `note` says so.
        """
        # Within a speaker it is the clips that are drawn.
        return [self._figures(name, mask, kind == "speaker") for name, mask in self._masks(kind).items()]

    def gaps(self, kinds: Iterable[str] = (*KINDS, "speaker")) -> list[dict[str, Any]]:
        """The difference between the best and the worst group of each kind, of those with `FEWEST` scored clips and
        two speakers (a speaker of course has one).

        Returns:
            By row `kind`, `figure` (macro_f1 or accuracy), `low` and `high` (groups), `values` (theirs), `clips` and
            `speakers` (theirs), and `difference`, `interval` and `p` as `Resampling.compare` has them: both groups are
            judged on the same draws of the speakers. As the two were chosen for their difference, it is somewhat too
            large.
        """
        return [gap for kind in kinds for gap in self._gaps(kind)]

    def agreement(self) -> list[dict[str, Any]]:
        """Rows of error and divergence by the share of annotators who chose the commonest class."""
        found = []
        for row in self.groups("agreement"):
            value, interval = row.pop("accuracy")
            row["error"] = (1 - value, interval and [1 - end for end in reversed(interval)])
            found += [row] if row["group"] != UNKNOWN else []
        return found

    def strata(self) -> list[dict[str, Any]]:
        """KL, JS and calibration error by the entropy of the annotators' distribution, of both priors.

        Returns:
            By row `group`, `clips`, `speakers`, and `kl`, `js`, `ece` and their `natural_` ones where these are known,
            each a (value, interval over speakers).
        """
        entropy = entr(self.distributions).sum(axis=1)  # NaN without votes
        bands = {"all agree": entropy <= ENTROPIES[0]}
        for low, high in pairwise(ENTROPIES):
            bands[f"up to {high:g} nats"] = (entropy > low) & (entropy <= high)
        bands["above"] = entropy > ENTROPIES[-1]
        found = []
        for name, mask in bands.items():
            if not mask.any():
                continue
            resampling = Resampling(self.speakers[mask], self.repeats, self.seed)
            row: dict[str, Any] = {"group": name, "clips": int(mask.sum()), "speakers": self._people(mask)}
            for prefix, said in (("", self.probabilities), ("natural_", self.natural)):
                if said is not None:
                    figures = distribution_figures(resampling, said[mask].astype(np.float64), self.distributions[mask])
                    row |= {
                        f"{prefix}{key}": (float(values[0]), resampling.interval(values))
                        for key, values in figures.items()
                    }
            found.append(row | _note(resampling, row["clips"]))
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

    def _masks(self, kind: str) -> dict[str, np.ndarray]:
        """The clips of each group that has some; none where nothing is known."""
        if kind in ("speaker", "sex"):
            values = np.array(self.rows[kind], dtype=object)
            chosen = {str(name) or UNKNOWN: values == name for name in sorted(set(values))}
        elif kind == "agreement":
            shares = self.distributions.max(axis=1)  # NaN without votes
            chosen = {
                "all" if low == 1 else f"{low:.1f}-{high:.1f}": (shares >= low) & (shares < high)
                for low, high in AGREEMENTS
            }
            chosen[UNKNOWN] = np.isnan(shares)
        else:
            numbers = np.array(self.rows[kind], dtype=float)
            bands = AGES if kind == "age" else DURATIONS
            chosen = {_band(low, high, kind): (numbers >= low) & (numbers < high) for low, high in bands}
            chosen[UNKNOWN] = np.isnan(numbers)
        there = {name: mask for name, mask in chosen.items() if mask.any()}
        return {} if set(there) == {UNKNOWN} else there

    def _figures(self, name: str, mask: np.ndarray, by_clip: bool) -> dict[str, Any]:
        speakers = [""] * int(mask.sum()) if by_clip else self.speakers[mask]
        resampling = Resampling(speakers, self.repeats, self.seed)
        found = decision_figures(resampling, self.decided[mask], self.labels[mask], self.label_set)
        found |= distribution_figures(resampling, self.probabilities[mask], self.distributions[mask])
        counts = {"clips": int(mask.sum()), "scored": int(self.scored[mask].sum()), "speakers": self._people(mask)}
        figures = {key: (float(found[key][0]), resampling.interval(found[key])) for key in FIGURES}
        return {"group": name, **counts, **figures, **_note(resampling, counts["clips"])}

    def _gaps(self, kind: str) -> list[dict[str, Any]]:
        masks = {
            name: mask & self.scored
            for name, mask in self._masks(kind).items()
            if name != UNKNOWN
            and (mask & self.scored).sum() >= FEWEST
            and (kind == "speaker" or self._people(mask & self.scored) > 1)
        }
        if len(masks) < 2:
            return []
        drawn_by = [""] * len(self.labels) if kind == "speaker" else list(map(str, self.speakers))
        resampling = Resampling(drawn_by, self.repeats, self.seed)
        drawn = {
            # What is not of the group counts as not scored, in draws that are the same for all groups.
            name: decision_figures(resampling, self.decided, np.where(mask, self.labels, -1), self.label_set)
            for name, mask in masks.items()
        }
        found = []
        for figure in ("macro_f1", "accuracy"):
            ordered = sorted(drawn, key=lambda name: float(drawn[name][figure][0]))
            low, high = ordered[0], ordered[-1]
            gap: dict[str, Any] = {"kind": kind, "figure": figure, "low": low, "high": high}
            gap["values"] = [float(drawn[name][figure][0]) for name in (low, high)]
            gap["clips"] = [int(masks[name].sum()) for name in (low, high)]
            gap["speakers"] = [self._people(masks[name]) for name in (low, high)]
            found.append(gap | resampling.compare(drawn[high][figure], drawn[low][figure]))
        return found

    def _people(self, mask: np.ndarray) -> int:
        return len(set(self.speakers[mask]) - {""})


def group_report(view: View) -> dict[str, Any]:
    """What metrics.json has of a split: `groups` (kind -> rows of `View.groups`) and `gaps` (of `View.gaps`)."""
    groups = {kind: view.groups(kind) for kind in (*KINDS, "speaker")}
    return {"groups": {kind: rows for kind, rows in groups.items() if rows}, "gaps": view.gaps()}


def by_kind(groups: Mapping[str, Any]) -> dict[str, Any]:
    """The kinds of groups that have several speakers in a group: all but the speakers themselves."""
    return {kind: rows for kind, rows in groups.items() if kind != "speaker"}


def largest_gap(gaps: Sequence[Mapping[str, Any]], figure: str = "macro_f1") -> str:
    """A sentence that names the largest gap between groups, and the one between speakers; what to make of it.

    Args:
        gaps: of `View.gaps`.
        figure: "macro_f1" or "accuracy".
    """
    title = {"macro_f1": "macro-F1", "accuracy": "accuracy"}[figure]
    groups = [gap for gap in gaps if gap["figure"] == figure and gap["kind"] != "speaker"]
    if groups:
        gap = max(groups, key=lambda gap: gap["difference"])
        (low, high), (few, many) = gap["values"], gap["speakers"]
        told = f"The largest gap is by {gap['kind']}: {gap['high']} {high:.3f}, {gap['low']} {low:.3f} ({title}; "
        told += f"difference {_with_interval(gap)}, {many} and {few} speakers)."
    else:
        told = f"No two groups have {FEWEST} scored clips and two speakers each: none are compared."
    for gap in gaps:
        if gap["kind"] == "speaker" and gap["figure"] == figure:
            told += f" Between speakers it is from {gap['values'][0]:.3f} ({gap['low']}) to {gap['values'][1]:.3f} "
            told += f"({gap['high']})."
    return told


def group_section(found: Mapping[str, Any]) -> str:
    """The groups' figures and the largest gap of a split in Markdown, for the model card; empty without groups.

    Args:
        found: of `group_report`.
    """
    lines = ["| | clips | speakers | macro-F1 | accuracy |", "|---|---:|---:|---:|---:|"]
    for kind, rows in by_kind(found["groups"]).items():
        for row in rows:
            cells = [
                f"{value:.3f}" + (" [{:.3f}, {:.3f}]".format(*ends) if ends else "") if np.isfinite(value) else "-"
                for value, ends in (row["macro_f1"], row["accuracy"])
            ]
            note = f" ({row['note']})" if "note" in row else ""
            lines.append(f"| {' | '.join([kind + ': ' + row['group'] + note, *_counts(row), *cells])} |")
    return "\n".join([*lines, "", largest_gap(found["gaps"])]) if len(lines) > 2 else ""


def _counts(row: Mapping[str, Any]) -> list[str]:
    return [str(row[name]) for name in ("clips", "speakers")]


def _with_interval(gap: Mapping[str, Any]) -> str:
    ends = "" if gap["interval"] is None else " [{:.3f}, {:.3f}]".format(*gap["interval"])
    return f"{gap['difference']:.3f}{ends}"


def _note(resampling: Resampling, clips: int) -> dict[str, str]:
    if resampling.clusters > 1:
        return {}
    return {"note": f"no interval: {'one clip' if clips == 1 else 'one speaker'}"}


def _band(low: float, high: float, kind: str) -> str:
    unit = "years" if kind == "age" else "s"
    if high in (AGES[-1][1], DURATIONS[-1][1]):
        return f"{low} {unit} or more"
    return f"under {high} {unit}" if low == 0 else f"{low} to {high} {unit}"
