"""A recording as it was judged goes in, the page's panels (HTML) come out; each says its values in words too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sailer.configuration_sailer import ATTRIBUTES
from sailer.data.colours import ATTRIBUTE_COLOURS, colour_of
from sailer.inference.outputs import by_label
from sailer.inference.page_parts import pictures
from sailer.inference.page_parts.judging import Judged, Opinion, difference, disagreements
from sailer.windows_sailer import COVERAGE

# What the bars mean.
PRIOR_TITLES = {
    "natural": ("How annotators would vote", "Estimated shares of listeners who would choose each emotion."),
    "balanced": ("Balanced scores", "As if every emotion were equally common: what the system decides on."),
}
UNSURE_FROM = 3  # emotions in a prediction set


def results(judged: Judged, prior: str) -> str:
    """All panels: each system's, side by side where there are two, and then where they differ."""
    systems = "".join(
        f'<section class="sailer-system" aria-label="{escape(opinion.system)}">'
        + (f'<p class="sailer-system-name">{escape(opinion.system)}</p>' if len(judged.opinions) > 1 else "")
        + _opinion(judged, opinion, prior)
        + "</section>"
        for opinion in judged.opinions
    )
    warning = f'<p class="sailer-warning" role="status">{escape(judged.warning)}</p>' if judged.warning else ""
    both = _difference(judged, prior) if len(judged.opinions) == 2 else ""
    return f'<div class="sailer-results">{warning}<div class="sailer-systems">{systems}</div>{both}</div>'


def player(address: str) -> str:
    """The recording to listen to; the pictures' cursors follow it."""
    return (
        f'<audio class="sailer-player" controls preload="metadata" src="{escape(address)}" '
        'aria-label="The recording"></audio>'
    )


def error(message: str) -> str:
    return f'<p class="sailer-error" role="alert">{escape(message)}</p>'


def note(message: str) -> str:
    return f'<p class="sailer-note" role="status">{escape(message)}</p>'


def bars(scores: Mapping[str, float], colours: Mapping[str, str] | None = None) -> str:
    """A bar per label, with its value in words."""
    rows = ""
    for label, score in scores.items():
        style = f"width:{100 * min(max(score, 0), 1):.1f}%;background:{(colours or {}).get(label) or colour_of(label)}"
        rows += (
            f'<li><span class="sailer-name">{escape(label)}</span><span class="sailer-track">'
            f'<span class="sailer-bar" style="{style}"></span></span>'
            f'<span class="sailer-value">{score:.2f}</span></li>'
        )
    return f'<ul class="sailer-bars">{rows}</ul>'


def decision(whole: Mapping[str, Any]) -> str:
    """The decided emotion and its score; "unsure" where the prediction set is wide."""
    if "label" not in whole:
        return ""
    label, score = whole["label"], by_label(whole["primary"])[whole["label"]]
    unsure = ""
    if len(whole.get("set", ())) >= UNSURE_FROM:
        unsure = ' <span class="sailer-unsure">unsure</span>'
    return (
        f'<p class="sailer-decision"><span class="sailer-swatch" style="background:{colour_of(label)}"></span>'
        f"<strong>{escape(label)}</strong> {score:.2f}{unsure}</p>"
    )


def timeline(
    windows: Sequence[Mapping[str, Any]],
    timestamps: Sequence[tuple[float, float]],
    peaks: Sequence[tuple[float, float]] = (),
) -> str:
    """The waveform, and under it the emotions and attributes over time; a click plays a window."""
    start, end = timestamps[0][0], timestamps[-1][1]
    # A window's result stands at its middle; the first and last also hold out to the ends.
    times = [start, *((left + right) / 2 for left, right in timestamps), end]
    held = [windows[0], *windows, windows[-1]]
    tracks, legend = [pictures.waveform(peaks)] if peaks else [], ""
    if "primary" in windows[0]:
        rows = [by_label(window["primary"]) for window in held]
        series = {label: [row[label] for row in rows] for label in sorted(rows[0])}
        about = f"Emotions over time: {_course(windows, timestamps)}."
        tracks.append(pictures.stacked(times, series, start, end, about))
        legend = _legend({label: colour_of(label) for label in reversed(series)})
    if "attributes" in windows[0]:
        series = {name: [row["attributes"][name] for row in held] for name in ATTRIBUTES}
        tracks.append(pictures.lines(times, series, start, end, "Arousal, valence and dominance over time"))
        legend += _legend(ATTRIBUTE_COLOURS)
    ticks = "".join(f"<span>{start + share * (end - start):.1f} s</span>" for share in (0, 0.25, 0.5, 0.75, 1))
    table = _windows_table(windows, timestamps)
    return (
        f'<div class="sailer-timeline" data-start="{start:.4f}" data-end="{end:.4f}" '
        f"data-windows='{json.dumps([[round(a, 3), round(b, 3)] for a, b in timestamps])}'>"
        f'<div class="sailer-tracks">{"".join(tracks)}<div class="sailer-played"></div>'
        f'<div class="sailer-cursor"></div></div><div class="sailer-ticks">{ticks}</div>{legend}</div>{table}'
    )


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], caption: str) -> str:
    """Rows as a table that scrolls in its own frame."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row.get(column))}</td>" for column in columns) + "</tr>" for row in rows
    )
    return (
        f'<div class="sailer-scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def comparison(before: Mapping[str, float], after: Mapping[str, float], names: tuple[str, str], caption: str) -> str:
    """Scores of two results beside each other, the largest change first."""
    labels = sorted(before.keys() & after.keys(), key=lambda label: -abs(after[label] - before[label]))
    first, second = names
    rows = [
        # Rounded first, and a zero added: so that no change is "-0.00".
        {"label": label, first: before[label], second: after[label], "change": f"{round(change, 2) + 0.0:+.2f}"}
        for label in labels
        for change in [after[label] - before[label]]
    ]
    return table(rows, ["label", first, second, "change"], caption)


def adapted(
    before: Mapping[str, Any], after: Mapping[str, Any], prior: str, recordings: Sequence[Mapping[str, Any]]
) -> str:
    """A clip as it was judged before and after the system adapted to its speaker, beside each other.

    Args:
        before, after: the pipeline's `return_all`.
        prior: of the scores.
        recordings: a row per recording of the speaker: file, seconds, and why it was left out ("" if it was not).
    """
    heads = [head for head in ("primary", "attributes") if head in before]
    sides = ""
    for title, whole in (("Before", before), ("After", after)):
        parts = decision(whole)
        for head in heads:
            # In the same order on both sides: that of the scores before.
            scores = {name: by_label(whole[head])[name] for name in by_label(before[head])}
            heading = PRIOR_TITLES[prior][0] if head == "primary" else "Arousal, valence and dominance"
            parts += _panel(head, heading, bars(scores, ATTRIBUTE_COLOURS if head == "attributes" else None))
        sides += (
            f'<section class="sailer-system" aria-label="{title}"><p class="sailer-system-name">{title}</p>'
            f"{parts}</section>"
        )
    left_out = sum(bool(row["left out"]) for row in recordings)
    count = len(recordings) - left_out
    used = f"Adapted to {count} recording{'s' if count != 1 else ''} of the speaker"
    told = f"{used}; {left_out} could not be used, see below." if left_out else f"{used}."
    changes = "".join(
        comparison(by_label(before[head]), by_label(after[head]), ("before", "after"), caption)
        for head, caption in (("primary", "What the voice changes"), ("attributes", "And of the attributes"))
        if head in heads
    )
    if "label" in before:
        same = before["label"] == after["label"]
        changes = f"<p>The decision {'stays' if same else 'becomes'} {escape(after['label'])}.</p>{changes}"
    columns = ["file", "seconds", *(["left out"] if left_out else [])]
    listed = table(recordings, columns, "Recordings of the speaker")
    return (
        f'<div class="sailer-results">{note(told)}<div class="sailer-systems">{sides}</div>'
        f"{_panel('changes', 'What changes', changes)}{_panel('recordings', 'The recordings', listed)}</div>"
    )


def _opinion(judged: Judged, opinion: Opinion, prior: str) -> str:
    whole = opinion.whole[prior]
    parts = [decision(whole)]
    if {"primary", "attributes"} & whole.keys():
        over_time = timeline(opinion.windows[prior], opinion.timestamps, judged.peaks)
        hint = "Click on the picture, or a row of its values, to hear that window."
        parts.append(_panel("timeline", "Over time", over_time, hint))
    if "primary" in whole:
        title, about = PRIOR_TITLES[prior]
        parts.append(_panel("distribution", title, bars(by_label(whole["primary"])), about))
    if "set" in whole:
        parts.append(_panel("set", "Prediction set", _set(whole)))
    if "attributes" in whole:
        parts.append(_panel("plane", "Arousal, valence and dominance", _plane(opinion, prior)))
    if "secondary" in whole:
        parts.append(_panel("secondary", "Secondary emotions", bars(by_label(whole["secondary"]))))
    if "transcript" in whole or opinion.without_text:
        parts.append(_panel("transcript", "What is said", _transcript(opinion, prior)))
    if "sex" in whole or "age" in whole:
        parts.append(_panel("speaker", "The voice", _voice(whole)))
    return "".join(parts)


def _panel(kind: str, title: str, content: str, about: str = "") -> str:
    told = f'<p class="sailer-about">{escape(about)}</p>' if about else ""
    return f'<div class="sailer-panel" data-panel="{kind}"><h2>{escape(title)}</h2>{told}{content}</div>'


def _set(whole: Mapping[str, Any]) -> str:
    names = list(whole["set"])
    told = f"They hold what annotators agree on for {100 * COVERAGE:.0f} of 100 recordings like the calibration's."
    if len(names) >= UNSURE_FROM:
        told = f"Unsure: {len(names)} emotions are possible. {told}"
    return (
        _legend({name: colour_of(name) for name in names}) if names else "<p>No emotion is likely enough.</p>"
    ) + f"<p>{escape(told)}</p>"


def _plane(opinion: Opinion, prior: str) -> str:
    path = [window["attributes"] for window in opinion.windows[prior]]
    whole = opinion.whole[prior]["attributes"]
    about = "Path of valence and arousal from {0[valence]:.2f}, {0[arousal]:.2f} to {1[valence]:.2f}, {1[arousal]:.2f}"
    picture = pictures.plane(path, about.format(path[0], path[-1]))
    return (
        f'<div class="sailer-plane"><span class="sailer-up">arousal</span>{picture}'
        '<span class="sailer-right">valence</span></div>'
        '<p class="sailer-about">From pale to strong over time; a larger point is more dominance.</p>'
        f"{bars(whole, ATTRIBUTE_COLOURS)}"
    )


def _transcript(opinion: Opinion, prior: str) -> str:
    whole = opinion.whole[prior]
    said = f"<blockquote>{escape(whole.get('transcript', ''))}</blockquote>"
    if not opinion.without_text:
        return said
    without = opinion.without_text[prior]
    if "label" in whole:
        same = without["label"] == whole["label"]
        told = f"Without the transcript the decision {'stays' if same else 'would be'} {without['label']}."
        if opinion.needs_text:
            told += " It was never trained on speech alone, so that this tells little of the voice."
        said += f"<p>{escape(told)}</p>"
    names = ("speech alone", "with transcript")
    head = "primary" if "primary" in whole else "attributes"
    if head not in whole:
        return said
    return said + comparison(by_label(without[head]), by_label(whole[head]), names, "What the transcript changes")


def _voice(whole: Mapping[str, Any]) -> str:
    told = bars(by_label(whole["sex"]), dict.fromkeys(by_label(whole["sex"]), "#6b7280")) if "sex" in whole else ""
    return told + (f"<p>Age as heard: {whole['age']:.0f} years</p>" if "age" in whole else "")


def _difference(judged: Judged, prior: str) -> str:
    one, other = judged.opinions
    distance, scores = difference(one, other, prior)
    if not scores:
        return ""
    apart = disagreements(one, other, prior)
    start, end = one.timestamps[0][0], one.timestamps[-1][1]
    told = f"{100 * distance:.0f} % of the probability lies elsewhere; the decisions differ in {len(apart)} of "
    told += f"{len(one.timestamps)} windows."
    strip = pictures.strips([(left, right) for left, right, _, _ in apart], start, end, "Where the decisions differ")
    names = (one.system, other.system)
    values = comparison(
        {label: first for label, first, _ in scores},
        {label: second for label, _, second in scores},
        names,
        "Scores of both systems",
    )
    windows = [
        {"from": f"{left:.1f} s", "to": f"{right:.1f} s", names[0]: first, names[1]: second}
        for left, right, first, second in apart
    ]
    listed = table(windows, ["from", "to", *names], "Windows on which they decide differently") if windows else ""
    return f'<div class="sailer-both">{_panel("difference", "Where they differ", strip + values + listed, told)}</div>'


def _course(windows: Sequence[Mapping[str, Any]], timestamps: Sequence[tuple[float, float]]) -> str:
    """The decisions over time in words: "Happy from 0.0 s, Sad from 3.5 s"."""
    told: list[str] = []
    last = None
    for window, (start, _) in zip(windows, timestamps, strict=True):
        label = window.get("label") or window["primary"][0]["label"]
        if label != last:
            told.append(f"{label} from {start:.1f} s")
            last = label
    return ", ".join(told[:20]) + (", and so on" if len(told) > 20 else "")


def _windows_table(windows: Sequence[Mapping[str, Any]], timestamps: Sequence[tuple[float, float]]) -> str:
    labels = sorted(by_label(windows[0].get("primary", [])))
    names = [*labels, *(ATTRIBUTES if "attributes" in windows[0] else ())]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("window", *names))
    rows = ""
    for place, (window, (start, end)) in enumerate(zip(windows, timestamps, strict=True)):
        values = by_label(window.get("primary", [])) | window.get("attributes", {})
        cells = "".join(f"<td>{values[name]:.2f}</td>" for name in names)
        button = (
            f'<button type="button" class="sailer-play" data-window="{place}" '
            f'aria-label="Play {start:.1f} to {end:.1f} seconds">{start:.1f} to {end:.1f} s</button>'
        )
        rows += f"<tr><th scope='row'>{button}</th>{cells}</tr>"
    return (
        '<details class="sailer-details"><summary>Values over time</summary><div class="sailer-scroll" tabindex="0" '
        f'role="region" aria-label="Values over time"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div></details>"
    )


def _legend(colours: Mapping[str, str]) -> str:
    entries = "".join(
        f'<li><span class="sailer-swatch" style="background:{colour}"></span>{escape(name)}</li>'
        for name, colour in colours.items()
    )
    return f'<ul class="sailer-legend">{entries}</ul>'


def _cell(value: Any) -> str:
    return escape(f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value))
