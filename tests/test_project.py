"""What goes stale beside the code: the citation, the changelog, the workflows, the hooks and what git leaves out."""

import configparser
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import sailer

ROOT = Path(__file__).resolve().parents[1]
RELEASE_FILES = (".ci/release.py", "__init__.py", "CITATION.cff", "CHANGELOG.md")


def load(name: str) -> dict:
    # The base loader keeps every value as it is written: "3.11" is no number and `on:` no truth value.
    return yaml.load((ROOT / name).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = load("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert citation["version"] == sailer.__version__
    assert f"\n## [{sailer.__version__}] - {citation['date-released']}\n" in (ROOT / "CHANGELOG.md").read_text()
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Feng", "Lertpetchpun", "Byrd", "Narayanan"]
    assert paper["identifiers"][0]["value"] == "arXiv:2505.22133" and paper["title"] and paper["year"] == "2025"


def test_the_changelog_has_the_known_headings_newest_first() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    first, *released = [line for line in lines if line.startswith("## ")]
    assert first == "## [Unreleased]"
    found = [re.fullmatch(r"## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", line) for line in released]
    assert found and all(found)
    order = [(Version(match[1]), match[2]) for match in found if match]
    assert order == sorted(order, reverse=True)
    groups = {line for line in lines if line.startswith("### ")}
    assert groups <= {f"### {name}" for name in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")}


@pytest.fixture
def release(tmp_path: Path):
    """Runs the check of a release in a copy of the files that it compares; its message and status."""
    for name in RELEASE_FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def run(tag: str, **changes: tuple[str, str]) -> tuple[str, int]:
        for name, (old, new) in changes.items():
            path = next(tmp_path / file for file in RELEASE_FILES if Path(file).stem.strip("_").lower() == name)
            text = path.read_text(encoding="utf-8")
            assert old in text
            path.write_text(text.replace(old, new), encoding="utf-8")
        script = tmp_path / ".ci" / "release.py"
        done = subprocess.run([sys.executable, script, tag], capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr, done.returncode

    return run


def test_the_right_tag_may_be_released(release) -> None:
    assert release(f"v{sailer.__version__}")[1] == 0


@pytest.mark.parametrize("tag", ["v99.0.0", sailer.__version__, f"v{sailer.__version__}.1", "latest"])
def test_a_wrong_tag_is_refused_beside_the_version(tag: str, release) -> None:
    output, status = release(tag)
    assert status and f"The tag is {tag}, but __init__.py says {sailer.__version__}" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": (f'"{sailer.__version__}"', '"99.0.0"')}, "CITATION.cff says"),
        ({"init": (f'"{sailer.__version__}"', '"99.0.0"')}, r"CHANGELOG.md has no heading '## \[99.0.0\]"),
        ({"citation": (f"version: {sailer.__version__}", "version: 99.0.0")}, "CITATION.cff says 99.0.0, but"),
        ({"changelog": (f"## [{sailer.__version__}] - ", f"## [{sailer.__version__}] soon ")}, "has no heading"),
    ],
)
def test_a_version_that_does_not_stand_everywhere_is_not_released(changes: dict, message: str, release) -> None:
    tag = "v99.0.0" if "init" in changes else f"v{sailer.__version__}"
    output, status = release(tag, **changes)
    assert status and re.search(message, output)
    assert "The tag is" not in output


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_the_workflow_runs_continuous_integration_on_every_python_that_is_named() -> None:
    workflow = load(".github/workflows/tests.yml")
    assert {"push", "pull_request", "workflow_call"} <= set(workflow["on"])
    named = re.findall(r"Python :: (3\.\d+)$", setup()["metadata"]["classifiers"], re.MULTILINE)
    suites = workflow["jobs"]["suites"]
    assert suites["strategy"]["matrix"]["python"] == named != []
    assert commands(suites) == [".ci/run"]
    (python,) = (step["with"] for step in suites["steps"] if step.get("uses", "").startswith("actions/setup-python"))
    assert python["python-version"] == "${{ matrix.python }}"


def test_a_release_follows_the_tests_and_the_check_of_its_tag_and_needs_no_password() -> None:
    workflow = load(".github/workflows/release.yml")
    assert workflow["on"] == {"push": {"tags": ["v*"]}}
    jobs = workflow["jobs"]
    assert jobs["tests"]["uses"] == "./.github/workflows/tests.yml"
    steps = commands(jobs["build"])
    assert steps[0] == 'python .ci/release.py "$GITHUB_REF_NAME"'
    assert steps.index("python -m build") < steps.index("python -m twine check --strict dist/*")
    publish = jobs["publish"]
    assert set(publish["needs"]) == {"tests", "build"}
    assert publish["environment"] and publish["permissions"] == {"id-token": "write"}
    assert publish["steps"][-1] == {"uses": "pypa/gh-action-pypi-publish@release/v1"}


@pytest.mark.parametrize("name", ["tests", "release"])
def test_a_workflow_gets_no_more_than_it_needs(name: str) -> None:
    workflow = load(f".github/workflows/{name}.yml")
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job.get("steps", ())]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(release/)?v\d+", action) for action in actions)
    checkouts = [step for step in steps if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts and all(step["with"]["persist-credentials"] == "false" for step in checkouts)
    assert {job["timeout-minutes"] for job in workflow["jobs"].values() if "steps" in job} <= {"15", "60", "90"}


# By hook: a file with a fault that this hook finds, and one that all hooks pass.
FAULTS = {
    "ruff-check": ("check.py", "import os\n", "a = 1\n"),
    "ruff-format": ("format.py", "a = {  'b':1 }\n", 'a = {"b": 1}\n'),
    "end-of-file": ("end.md", "no newline", "a newline\n"),
    "trailing-whitespace": ("spaces.md", "a line \n", "a line\n"),
    "yaml": ("a.yaml", "a: [b\n", "a: !!python/name:b.c\n"),
    "toml": ("a.toml", "a = \n", "a = 1\n"),
    "large-files": ("large.txt", "0123456789\n" * 100_000, "0123456789\n" * 90_000),
}


@pytest.mark.slow
def test_each_hook_finds_its_fault_and_passes_what_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (local,) = load(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local" and all(hook["entry"].startswith(".venv/bin/") for hook in local["hooks"])
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / "home"))
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    git(folder, "init", "--quiet")

    def run(column: int) -> tuple[set[str], int]:
        """The hooks that fail, and the status."""
        for name, *texts in FAULTS.values():
            (folder / name).write_text(texts[column], encoding="utf-8")
        git(folder, "add", ".")
        (folder / ".venv").symlink_to(sys.prefix)
        command = [sys.executable, "-m", "pre_commit", "run", "--all-files"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        (folder / ".venv").unlink()
        return set(re.findall(r"^- hook id: (.+)$", done.stdout, re.MULTILINE)), done.returncode

    assert run(0) == ({hook["id"] for hook in local["hooks"]}, 1)
    assert run(1) == (set(), 0)


def test_git_leaves_out_what_the_targets_make(tmp_path: Path) -> None:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    dry_run = ["make", "--no-print-directory", "--dry-run", "clean"]
    clean = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    made = clean.split()[2:]
    assert clean.startswith("rm -rf ") and {".venv", ".venv-lowest", "build", "dist"} <= set(made)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    git(tmp_path, "init", "--quiet")
    for name in (*made, "outputs", "tests/__pycache__"):
        path = tmp_path / name.replace("*", "sailer")
        path.mkdir(parents=True)
        (path / "file").touch()
    assert git(tmp_path, "status", "--porcelain").stdout == "?? .gitignore\n"


def test_lowest_resolves_for_its_own_environment_and_holds_torch(tmp_path: Path) -> None:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    dry_run = ["make", "--dry-run", "lowest"]
    plan = subprocess.run(dry_run, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout
    expected = (
        *("-m venv --clear .venv-lowest\n", "grep '^torch==' constraints.txt > .venv-lowest/torch.txt\n"),
        *("--resolution lowest-direct --extra dev --constraint .venv-lowest/torch.txt", "--output-file .venv-lowest/"),
        *(
            "-c .venv-lowest/versions.txt -e '.[dev]'\n",
            '.venv-lowest/bin/python -m pytest -m "not slow and not browser"',
        ),
    )
    positions = [plan.index(part) for part in expected]
    assert positions == sorted(positions)


@pytest.mark.skipif(Path(sys.prefix).name != ".venv-lowest", reason="for make lowest")
def test_the_lowest_versions_are_those_that_setup_cfg_names() -> None:
    groups = setup()["options"]["install_requires"], setup()["options.extras_require"]["dev"]
    wanted = [Requirement(line) for group in groups for line in group.split("\n") if line]
    floors = {one.name: part.version for one in wanted for part in one.specifier if part.operator == ">="}
    del floors["torch"]  # held at the tested version
    higher = {name: version(name) for name in floors if version(name) not in SpecifierSet(f"=={floors[name]}.*")}
    assert higher == {}
