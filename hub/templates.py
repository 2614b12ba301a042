"""A template of model_cards/ and facts in, a file out; a fact that is missing is an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sailer.data.atomic import replacing

TEMPLATES = Path(__file__).parents[1] / "model_cards"


def render(template: str, facts: Mapping[str, Any], path: str | Path) -> Path:
    """Write a file from a template, whole or not at all.

    Args:
        template: name of a file in model_cards/; in one of HTML what the facts hold is escaped.
        facts: what it names.
        path: to write.

    Returns:
        The path.

    Raises:
        jinja2.UndefinedError: it names something else too.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=template.endswith("html.jinja"),
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    environment.filters["number"] = number
    text = environment.get_template(template).render(facts)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return Path(path)


def number(value: float | None) -> str:
    """Counts as they are, other numbers with three decimals, a dash for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    is_count = float(value).is_integer() and (isinstance(value, int) or abs(value) > 1)
    return f"{value:,.0f}" if is_count else f"{value:.3f}"
