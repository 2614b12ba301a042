"""Results go in, pictures (SVG without words, which stretch with the page) come out; the panels have the words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from sailer.data.colours import ATTRIBUTE_COLOURS, colour_of

WIDTH = 1000  # of a picture over time, in its own units
PLANE = 200  # of the plane's side


def waveform(peaks: Sequence[tuple[float, float]]) -> str:
    """The outline of a waveform.

    Args:
        peaks: (lowest, highest) of each piece, of full scale 1; quiet recordings are drawn larger.
    """
    scale = 48 / max(max(-low, high) for low, high in [*peaks, (-0.05, 0.05)])
    step = WIDTH / len(peaks)
    above = [f"{(place + 0.5) * step:.1f},{50 - scale * high:.1f}" for place, (_, high) in enumerate(peaks)]
    below = [f"{(place + 0.5) * step:.1f},{50 - scale * low:.1f}" for place, (low, _) in enumerate(peaks)]
    points = " ".join([*above, *reversed(below)])
    shape = f'<polygon points="{points}" class="sailer-wave"/>'
    return _svg(shape, 100, "The recording's waveform", "sailer-wave-picture")


def stacked(
    times: Sequence[float], series: Mapping[str, Sequence[float]], start: float, end: float, about: str
) -> str:
    """Shares of the height over time, one above the other, the first at the bottom.

    Args:
        times: of each value, in seconds, rising.
        series: label -> its shares, (times,) each; they sum to 1.
        start, end: of the picture, in seconds.
        about: what the picture says, for those who do not see it.
    """
    places = [_place(time, start, end) for time in times]
    floor = [0.0] * len(places)
    shapes = []
    for label, values in series.items():
        top = [low + value for low, value in zip(floor, values, strict=True)]
        upper = [f"{x:.1f},{100 - 100 * y:.2f}" for x, y in zip(places, top, strict=True)]
        lower = [f"{x:.1f},{100 - 100 * y:.2f}" for x, y in zip(places, floor, strict=True)]
        points = " ".join([*upper, *reversed(lower)])
        shapes.append(
            f'<polygon points="{points}" fill="{colour_of(label)}" class="sailer-area" data-label="{escape(label)}"/>'
        )
        floor = top
    return _svg("".join(shapes), 100, about, "sailer-stack-picture")


def lines(times: Sequence[float], series: Mapping[str, Sequence[float]], start: float, end: float, about: str) -> str:
    """Attributes in [0, 1] over time."""
    shapes = ['<path d="M0 50H1000" class="sailer-grid"/>']
    for label, values in series.items():
        points = " ".join(
            f"{_place(time, start, end):.1f},{100 - 100 * value:.2f}"
            for time, value in zip(times, values, strict=True)
        )
        shapes.append(f'<polyline points="{points}" stroke="{ATTRIBUTE_COLOURS[label]}" class="sailer-line"/>')
    return _svg("".join(shapes), 100, about, "sailer-line-picture")


def plane(path: Sequence[Mapping[str, float]], about: str) -> str:
    """Valence (to the right) and arousal (upwards) as a path; a point's size is dominance, the last is ringed."""
    points = [
        (PLANE * row["valence"], PLANE * (1 - row["arousal"]), 2 + 6 * min(max(row["dominance"], 0), 1))
        for row in path
    ]
    shapes = [f'<path d="M0 {PLANE / 2:g}H{PLANE}M{PLANE / 2:g} 0V{PLANE}" class="sailer-grid"/>']
    if len(points) > 1:
        shapes.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)}" class="sailer-path"/>')
    for place, (x, y, size) in enumerate(points):
        strength = 0.25 + 0.75 * (place + 1) / len(points)
        kind = "sailer-point sailer-last" if place == len(points) - 1 else "sailer-point"
        shapes.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" opacity="{strength:.2f}" class="{kind}" '
            f'data-window="{place}"/>'
        )
    return (
        f'<svg viewBox="-10 -10 {PLANE + 20} {PLANE + 20}" role="img" aria-label="{escape(about)}" '
        f'class="sailer-plane-picture">{"".join(shapes)}</svg>'
    )


def strips(pieces: Sequence[tuple[float, float]], start: float, end: float, about: str) -> str:
    """Where something holds: pieces of time, in seconds."""
    shapes = "".join(
        f'<rect x="{_place(left, start, end):.1f}" y="0" '
        f'width="{_place(right, start, end) - _place(left, start, end):.1f}" height="20" class="sailer-strip"/>'
        for left, right in pieces
    )
    return _svg(shapes, 20, about, "sailer-strip-picture")


def _svg(shapes: str, height: int, about: str, kind: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" role="img" aria-label="{escape(about)}" '
        f'class="{kind}">{shapes}</svg>'
    )


def _place(time: float, start: float, end: float) -> float:
    return WIDTH * (time - start) / max(end - start, 1e-9)
