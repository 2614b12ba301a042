"""The settings' docstrings in, Markdown out: a table of every recipe option for each part of a recipe."""

from __future__ import annotations

from collections.abc import Iterable

PARTS = {
    "model": "The system to build: backbones, pooling and heads.",
    "data": "The corpus, its labels and splits, and how frozen features are kept.",
    "augmentation": "How training clips are augmented; everything is off by default.",
    "objective": "What a system is trained on.",
    "training": "How it is trained: transformers' `TrainingArguments`, with our defaults and additions. What is not "
    "listed is refused, with the reason.",
}
TITLES = ("option", "type", "default", "what it does")


def option_tables() -> str:
    """Markdown: for each part its heading and a table of its options."""
    from sailer.settings import option_descriptions

    described = option_descriptions()
    text = []
    for part, summary in PARTS.items():
        lines = [f"## {part}", "", summary, "", _row(TITLES), _row(["---"] * len(TITLES))]
        for option in described:
            if option.part == part:
                lines.append(
                    _row([*(f"`{cell}`" for cell in (option.name, option.type, option.default)), option.help])
                )
        text.append("\n".join(lines))
    return "\n\n".join(text) + "\n"


def _row(cells: Iterable[str]) -> str:
    # A bar divides cells, but within code it is text.
    plain = (" ".join(cell.split()) for cell in cells)
    return "| " + " | ".join(cell if cell[:1] == "`" else cell.replace("|", r"\|") for cell in plain) + " |"
