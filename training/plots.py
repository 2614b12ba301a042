"""Labels, decisions and the training log go in, a confusion matrix and a training curve (PNG) come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sailer.data.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What the right panel of the training curve shows, of whatever was measured.
CURVE_METRICS = ("macro_f1", "accuracy", "uar", "min_map")
# Keys of the Trainer's log that are neither losses nor metrics.
NOT_LOSSES = ("epoch", "step", "learning_rate", "grad_norm", "num_input_tokens_seen", "total_flos")


def plot_confusion(labels: Sequence[int], predictions: Sequence[int], names: Sequence[str], path: str | Path) -> Path:
    """Draw a confusion matrix: a row per true class, coloured by its share of the row, with counts.

    Args:
        labels, predictions: (clips,) indices into `names`; clips that are not scored must be left out before.
        names: the classes.
        path: PNG to write.

    Raises:
        ValueError: unequal lengths, or an index outside `names`.
    """
    true, predicted = np.asarray(labels, dtype=int), np.asarray(predictions, dtype=int)
    if true.shape != predicted.shape:
        raise ValueError(f"{true.size} labels but {predicted.size} predictions.")
    both = np.concatenate([true, predicted])
    if both.size and not 0 <= both.min() <= both.max() < len(names):
        raise ValueError(f"A class index is outside 0 to {len(names) - 1}, the classes {list(names)}.")
    counts = np.bincount(true * len(names) + predicted, minlength=len(names) ** 2).reshape(len(names), -1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    figure, (axes,) = new_figure(1, width=2.2 + 0.75 * len(names), height=1.8 + 0.62 * len(names))
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, column in np.ndindex(counts.shape):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(
        range(len(names)), [f"{name} ({total})" for name, total in zip(names, counts.sum(axis=1), strict=True)]
    )
    axes.set(xlabel="predicted", ylabel="true (clips)")
    figure.colorbar(image, label="share of the true class")
    return save_figure(figure, path)


def plot_training(log_history: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """Draw the losses (all parts, training and validation) and the validation metrics over the epochs.

    Args:
        log_history: `Trainer.state.log_history`; training entries hold "loss" and its parts "loss_...", evaluation
            entries "eval_loss" and "eval_..." metrics.
        path: PNG to write.

    Raises:
        ValueError: nothing was logged.
    """
    training = [entry for entry in log_history if "loss" in entry]
    evaluation = [entry for entry in log_history if "eval_loss" in entry]
    if not training and not evaluation:
        raise ValueError("The training log has no loss: log at least once (logging_strategy, logging_steps).")
    figure, (losses, metrics) = new_figure(2, width=11, height=4.2)
    parts = sorted({key for entry in training for key in entry} - {*NOT_LOSSES, "loss"})
    for key in ("loss", *parts):
        label = "training" if key == "loss" else f"its part: {key.removeprefix('loss_')}"
        _curve(losses, training, key, label, width=2.0 if key == "loss" else 1.0)
    _curve(losses, evaluation, "eval_loss", "validation", width=2.0, style="--")
    losses.set(xlabel="epoch", ylabel="loss")
    for key in CURVE_METRICS:
        _curve(metrics, evaluation, f"eval_{key}", key.replace("_", " "))
    metrics.set(xlabel="epoch", ylabel="validation metric", ylim=(0, 1))
    for axes in (losses, metrics):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(
                loc="lower center",
                bbox_to_anchor=(0.5, 1),
                ncols=3 if axes is losses else 4,
                frameon=False,
                fontsize="small",
            )
    return save_figure(figure, path)


def _curve(
    axes: Axes, entries: Sequence[Mapping[str, float]], key: str, label: str, width: float = 1.5, style: str = "-"
) -> None:
    points = [(entry["epoch"], entry[key]) for entry in entries if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, linewidth=width, marker="o", markersize=3)


def new_figure(columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    # Not through pyplot, which would keep the figure and may ask for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save_figure(figure: Figure, path: str | Path) -> Path:
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120, format="png")
    return Path(path)
