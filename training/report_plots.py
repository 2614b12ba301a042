"""A report's tables go in, its pictures (PNG) come out: reliability, risk, agreement and error, groups, speakers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sailer.training.plots import new_figure, save_figure

COLOURS = ("#1b6ca8", "#d1802c", "#4d9a57")
GREY = "#777777"


def plot_reliability(curves: Mapping[str, Mapping[str, np.ndarray]], path: Path) -> Path:
    """Draw the annotators' agreement against the system's confidence, and how many clips each bin has.

    Args:
        curves: name of a prior -> `confidence`, `agreement`, `low`, `high` and `clips` (bins,), NaN in empty bins.
        path: PNG to write.
    """
    figure, panels = new_figure(len(curves), width=4.6 * len(curves), height=4.4)
    for axes, colour, (name, curve) in zip(panels, COLOURS, curves.items(), strict=False):
        axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        shares = curve["clips"] / curve["clips"].sum()
        axes.bar((np.arange(len(shares)) + 0.5) / len(shares), shares, 0.9 / len(shares), color=colour, alpha=0.2)
        _with_intervals(axes, curve["confidence"], curve["agreement"], curve["low"], curve["high"], colour)
        axes.set(title=name, xlabel="confidence of the likeliest class", ylim=(0, 1), xlim=(0, 1))
        axes.set_ylabel("share of annotators who chose it\n(bars: share of the clips)")
        axes.grid(alpha=0.3)
    return save_figure(figure, path)


def plot_agreement(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the error and the divergence against how much the annotators agree.

    Args:
        rows: of bins of agreement: `group`, `clips`, and `error` and `kl` as (value, interval).
        path: PNG to write.
    """
    figure, panels = new_figure(2, width=9.4, height=4.2)
    titles = {"error": "share of scored clips decided wrongly", "kl": "KL from the annotators (nats)"}
    for axes, colour, (name, title) in zip(panels, COLOURS, titles.items(), strict=False):
        values, low, high = _columns([row[name] for row in rows])
        _with_intervals(axes, np.arange(len(rows)), values, low, high, colour)
        axes.set_xticks(range(len(rows)), [f"{row['group']}\n({row['clips']})" for row in rows], fontsize="small")
        axes.set(xlabel="share of annotators who chose the commonest class\n(clips)", ylabel=title)
        axes.set_ylim(0, 1.1 * max(1e-3, np.nan_to_num(np.maximum(values, high)).max()))
        axes.grid(alpha=0.3)
    return save_figure(figure, path)


def plot_risk(coverage: np.ndarray, risk: np.ndarray, bands: Sequence[tuple[float, float, float]], path: Path) -> Path:
    """Draw the error among the clips of which the system is surest, against their share of all.

    Args:
        coverage, risk: (distinct confidences,), as `risk_coverage` gives them.
        bands: (share, low, high): intervals, NaN where there is none.
        path: PNG to write.
    """
    figure, (axes,) = new_figure(1, width=5.6, height=4.4)
    whole = risk[-1]
    axes.axhline(whole, linestyle="--", color=GREY, linewidth=1, label="an order by chance")
    # The best order has all errors at the end.
    best = np.clip(1 - (1 - whole) / np.maximum(coverage, 1e-9), 0, None)
    axes.plot(coverage, best, ":", color=GREY, linewidth=1.2, label="the best order")
    axes.plot(coverage, risk, color=COLOURS[0], linewidth=1.8, label="the surest first")
    shares, low, high = np.array(bands, dtype=float).T
    if np.isfinite(low).any():
        axes.fill_between(shares, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.set(xlabel="share of the clips answered", ylabel="share of those decided wrongly", xlim=(0, 1))
    axes.set_ylim(0, 1.1 * max(1e-3, risk.max(), np.nan_to_num(high).max()))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return save_figure(figure, path)


def plot_groups(groups: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, caption: str = "") -> Path:
    """Draw macro-F1 and accuracy of each group of clips, with intervals.

    Args:
        groups: kind (sex, age, duration, agreement) -> rows with `group`, `clips`, and `macro_f1` and `accuracy` as
            (value, interval).
        path: PNG to write.
        caption: stands below.
    """
    rows = [(kind, row) for kind, members in groups.items() for row in members]
    figure, (axes,) = new_figure(1, width=7.6, height=1.4 + 0.42 * len(rows))
    for offset, colour, (name, title) in zip(
        (-0.13, 0.13), COLOURS, (("macro_f1", "Macro-F1"), ("accuracy", "Accuracy")), strict=False
    ):
        values, low, high = _columns([row[name] for _, row in rows])
        places = np.arange(len(rows)) + offset
        axes.errorbar(values, places, xerr=_reach(values, low, high), fmt="o", color=colour, label=title, capsize=2)
    axes.set_yticks(range(len(rows)), [f"{kind}: {row['group']} ({row['clips']})" for kind, row in rows])
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel(textwrap.fill(caption, 90), fontsize="small", loc="left")
    return save_figure(figure, path)


def plot_matrix(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], chance: float, path: Path
) -> Path:
    """Draw the unweighted average recall of every system (row) on every corpus (column).

    Args:
        values: (rows, columns).
        rows, columns: names.
        chance: where the colours begin.
        path: PNG to write.
    """
    figure, (axes,) = new_figure(1, width=3.4 + 1.3 * len(columns), height=1.6 + 0.55 * len(rows))
    image = axes.imshow(values, vmin=chance, vmax=1, cmap="Blues", aspect="auto")
    for (row, column), value in np.ndenumerate(np.asarray(values, dtype=float)):
        colour = "white" if value > (1 + chance) / 2 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="judged on", ylabel="system")
    axes.set_title(f"unweighted average recall (chance {chance:.2f})", fontsize="medium")
    figure.colorbar(image)
    return save_figure(figure, path)


def plot_speakers(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw each speaker's accuracy with its interval over their clips, from the worst to the best.

    Args:
        rows: `group`, `clips` and `accuracy` as (value, interval).
        path: PNG to write.
    """
    rows = sorted(rows, key=lambda row: row["accuracy"][0])
    figure, (axes,) = new_figure(1, width=7.6, height=4)
    values, low, high = _columns([row["accuracy"] for row in rows])
    places = np.arange(len(rows))
    axes.errorbar(places, values, yerr=_reach(values, low, high), fmt="o", color=COLOURS[0], markersize=4, linewidth=1)
    names = [row["group"] for row in rows] if len(rows) <= 30 else []
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="small")
    axes.set(xlabel="speakers, from the worst to the best", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3, axis="y")
    return save_figure(figure, path)


def _with_intervals(axes: Any, x: Any, y: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str) -> None:
    known = np.isfinite(y)
    reach = _reach(y, low, high)[:, known]
    axes.errorbar(np.asarray(x)[known], y[known], yerr=reach, fmt="o-", color=colour, capsize=2, markersize=4)


def _columns(figures: Sequence[tuple[float, Sequence[float] | None]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ends = [(value, *(interval or (value, value))) for value, interval in figures]
    values, low, high = np.array(ends, dtype=float).T
    return values, low, high


def _reach(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How far an interval's ends are from the value, which may lie outside of it."""
    return np.nan_to_num(np.stack([values - low, high - values]).clip(min=0))
