"""What the site gets while it is built: the options' tables, the package's sources for the API, colours for code."""

from __future__ import annotations

import configparser
import tempfile
from pathlib import Path
from typing import Any

from option_tables import option_tables
from properdocs.plugins import event_priority
from properdocs.structure.files import File
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parents[1]
OPTIONS_MARK = "<!-- every option -->"
# Pygments' styles, and where each holds: the theme has a light and a dark side.
STYLES = {"default": ".highlight", "github-dark": "[data-bs-theme=dark] .highlight"}
_SOURCES = tempfile.TemporaryDirectory(prefix="sailer-docs-")


@event_priority(100)  # before mkdocstrings, which reads its paths once
def on_config(config: Any) -> Any:
    """Show the API's reader the sources as a package called sailer, whatever the checkout is called."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    package = Path(_SOURCES.name) / "sailer"
    if not package.is_dir():
        package.mkdir()
        rooms = {name.split(".")[1] for name in setup["options"]["packages"].split() if "." in name}
        for path in (*ROOT.glob("*.py"), *(ROOT / room for room in rooms)):
            (package / path.name).symlink_to(path)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_SOURCES.name]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the style sheet of highlighted code."""
    css = "\n".join(HtmlFormatter(style=style).get_style_defs(scope) for style, scope in STYLES.items())
    files.append(File.generated(config, "highlight.css", content=css))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write the options where a page asks for them."""
    return markdown.replace(OPTIONS_MARK, option_tables()) if OPTIONS_MARK in markdown else markdown
