"""Whether a tag may be released: `python .ci/release.py v0.1.0` compares it with the version and the changelog."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def disagreements(tag: str, root: Path) -> list[str]:
    """What speaks against releasing `root` as `tag` ("v" and a version), a sentence each."""
    version = find(r'^__version__ = "(.+)"$', root / "__init__.py")
    cited = find(r'^version: "?([^"\n]+)"?$', root / "CITATION.cff")
    found = []
    if tag != f"v{version}":
        found.append(f"The tag is {tag}, but __init__.py says {version}: tag v{version}, or change __version__.")
    if cited != version:
        found.append(f"CITATION.cff says {cited}, but __init__.py says {version}: change `version` there.")
    if find(rf"^## \[({re.escape(version or '')})\] - \d{{4}}-\d{{2}}-\d{{2}}$", root / "CHANGELOG.md") is None:
        found.append(f"CHANGELOG.md has no heading '## [{version}] - YYYY-MM-DD': name what is under Unreleased so.")
    return found


def find(pattern: str, path: Path) -> str | None:
    """The group of the first line that matches, or None."""
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    return match and match[1]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python .ci/release.py TAG")
    tag = sys.argv[1]
    if found := disagreements(tag, ROOT):
        sys.exit("\n".join(found))
    print(f"{tag}: __init__.py, CITATION.cff and CHANGELOG.md agree.")


if __name__ == "__main__":
    main()
