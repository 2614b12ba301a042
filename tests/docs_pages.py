"""The README and the pages of docs/ as what they hold: blocks of code, commands, and changes to files."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NAMES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))]
EXTENDING = [name for name in NAMES if name.startswith("docs/extend/")]


@dataclass(frozen=True)
class Fence:
    """A block of code on a page; `title` is the file that it belongs to."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a bash block; `needs` is what it says that it cannot do without."""

    page: str
    place: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def needs(self) -> str:
        found = re.search(r"# needs (the Hub|PyPI|a GPU|RAVDESS)", self.text)
        return found[1] if found else ""


def tokens(page: str) -> list[Token]:
    """What a page, named by its path in the repository, holds."""
    return MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8"))


def fences(page: str) -> list[Fence]:
    found = []
    for token in tokens(page):
        if token.type == "fence":
            language, _, rest = token.info.partition(" ")
            title = re.fullmatch(r'title="(.+)"', rest)
            assert title or not rest, f"{page}:{token.map[0] + 1}: {token.info!r} is a language, or one and a title"
            found.append(Fence(page, token.map[0] + 2, language, title[1] if title else "", token.content))
    return found


def commands(fence: Fence) -> list[Command]:
    lines = fence.text.replace("\\\n", " ").splitlines() if fence.language == "bash" else []
    return [
        Command(fence.page, fence.place, line) for line in lines if line.strip() and not line.lstrip().startswith("#")
    ]


def code_spans(page: str) -> list[str]:
    """The `code` within a page's text, tables' too (which plain CommonMark sees as text)."""
    return [child.content for token in tokens(page) for child in token.children or () if child.type == "code_inline"]


def edited(source: str, diff: str) -> str:
    """`source` with the changes of a page's diff, whose parts are divided by lines of @@ and stand for whole lines."""
    for part in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        old = "".join(f"{line[1:]}\n" for line in part.splitlines() if line[:1] != "+")
        new = "".join(f"{line[1:]}\n" for line in part.splitlines() if line[:1] != "-")
        assert f"\n{source}".count(f"\n{old}") == 1, f"not there, or not once:\n{old}"
        source = f"\n{source}".replace(f"\n{old}", f"\n{new}").removeprefix("\n")
    return source
