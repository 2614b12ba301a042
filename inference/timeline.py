"""A recording's emotions and attributes over time, as a picture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from sailer.configuration_sailer import ATTRIBUTES
from sailer.data.atomic import replacing
from sailer.data.colours import ATTRIBUTE_COLOURS, colour_of
from sailer.inference.outputs import by_label

STEM_BYTES = 100  # of a recording's name in that of its picture; a file system takes some 250


def picture_name(file: str) -> str:
    """Name of a recording's picture; stems repeat across folders and may be longer than a name can be."""
    stem = Path(file).stem.encode()[:STEM_BYTES].decode(errors="ignore")
    return f"{stem}-{hashlib.sha256(file.encode()).hexdigest()[:8]}.png"


def plot_timeline(
    name: str, timestamps: Sequence[tuple[float, float]], results: Sequence[Mapping], path: Path
) -> Path:
    """Draw emotions (shares of the height) and attributes over time.

    Args:
        name: title.
        timestamps: (start, end) of each window, in seconds.
        results: of each window, as the pipeline's `return_all=True` gives them.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in ("primary", "attributes") if panel in results[0]]
    figure = Figure(figsize=(10, 1 + 2.6 * len(panels)), layout="constrained")
    start, end = timestamps[0][0], timestamps[-1][1]
    # A window's result stands at its middle; the first and last also hold out to the ends.
    times = [start, *((left + right) / 2 for left, right in timestamps), end]
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        series = [by_label(result[panel]) for result in (results[0], *results, results[-1])]
        labels = sorted(series[0]) if panel == "primary" else list(ATTRIBUTES)
        values = [[row[label] for row in series] for label in labels]
        if panel == "primary":
            axes.stackplot(times, values, labels=labels, colors=[colour_of(label) for label in labels])
            axes.set_ylabel("probability")
        else:
            for label, line in zip(labels, values, strict=True):
                axes.plot(times, line, label=label, linewidth=2, color=ATTRIBUTE_COLOURS[label])
            axes.grid(alpha=0.3)
            axes.set_ylabel("attribute, 0 to 1")
        axes.set(xlim=(start, end), ylim=(0, 1))
        legend = axes.legend(
            loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small", reverse=panel == "primary"
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    axes.set_xlabel("seconds")
    figure.suptitle(name, fontsize="medium", parse_math=False)  # a name such as $_$x^^ is no formula
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    return path
