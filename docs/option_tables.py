"""The settings' docstrings in, Markdown out: a table of every recipe option for each part of a recipe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

PARTS = {
    "model": "The system to build: backbones, pooling and heads.",
    "data": "The corpus, its labels and splits, and how frozen features are kept.",
    "augmentation": "How training clips are augmented; everything is off by default.",
    "objective": "What a system is trained on.",
    "training": "How it is trained: transformers' `TrainingArguments`, with our defaults and additions.",
}
TITLES = ("option", "type", "default", "what it does")


@dataclass(frozen=True)
class Option:
    """One option of a recipe, as text."""

    part: str
    name: str
    type: str
    default: str
    help: str


def option_tables() -> str:
    """Markdown: for each part its heading and a table of its options."""
    described = descriptions()
    text = []
    for part, summary in PARTS.items():
        lines = [f"## {part}", "", summary, "", _row(TITLES), _row(["---"] * len(TITLES))]
        for option in described:
            if option.part == part:
                code = [f"`{value}`" if str(value) else "" for value in (option.name, option.type, option.default)]
                lines.append(_row([*code, option.help]))
        text.append("\n".join(lines))
    return "\n\n".join(text) + "\n"


def descriptions() -> list[Any]:
    """Every option, with part, name, type, default and help."""
    from sailer.settings import _describe, _in_yaml, _options, _parts

    found = []
    for part, settings in _parts().items():
        hints, told = _options(settings), _arguments(settings.__doc__ or "")
        for item in dataclasses.fields(settings):
            if item.name in hints:
                default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
                summary = told.get(item.name) or item.metadata.get("help", "")
                found.append(Option(part, item.name, _describe(hints[item.name]), _in_yaml(default), summary))
    return found


def _arguments(docstring: str) -> dict[str, str]:
    """Name -> text of a docstring's Args section, whose lines may name several: "freeze_audio, freeze_text: ..."."""
    section = re.split(r"^ +(?:Args|Raises):\n", docstring, flags=re.MULTILINE)
    found = {}
    for names, text in re.findall(r"^ {8}([\w, ]+): (.+(?:\n {12}.+)*)", "".join(section[1:2]), re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def _row(cells: Iterable[str]) -> str:
    # A bar divides cells, but within code it is text.
    plain = (" ".join(cell.split()) for cell in cells)
    return "| " + " | ".join(cell if cell[:1] == "`" else cell.replace("|", r"\|") for cell in plain) + " |"
