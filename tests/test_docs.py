"""The README and the pages of docs/ against the code: their size, links, names and options, and the strict build."""

import argparse
import ast
import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from sailer import cli
from sailer.data.corpora import corpus_names, corpus_options
from sailer.settings import SECRETS, load_recipe, option_descriptions, resolve
from sailer.training.arguments import NOT_IN_THE_MAIN_JOB

from .docs_pages import DOCS, EXTENDING, NAMES, ROOT, Command, code_spans, commands, edited, fences

# What says that it needs something that a test has not, by what it needs.
NOT_RUN = {"the Hub": 10, "PyPI": 3, "a GPU": 1, "RAVDESS": 1}
MADE = ("tabulatedVotes.csv", "encoders_NAME.py", "handler.py", "report.md")  # files that are a user's
LANGUAGES = {"bash", "python", "yaml", "diff"}
ALL_COMMANDS = [command for page in NAMES for fence in fences(page) for command in commands(fence)]


@pytest.fixture(scope="module")
def option_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("option_tables", DOCS / "option_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def options() -> set[str]:
    return {option.name for option in option_descriptions()}


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", NAMES)
def test_every_block_is_of_a_kind_that_is_run(page: str) -> None:
    for fence in fences(page):
        assert fence.language in LANGUAGES, fence.place
        assert fence.title or fence.language != "diff", f"{fence.place}: a diff says of which file"
        if fence.language == "python":
            ast.parse(fence.text)


def test_what_is_not_run_is_counted() -> None:
    assert Counter(command.needs for command in ALL_COMMANDS if command.needs) == NOT_RUN


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "http://")):
            file, _, anchor = target.partition("#")
            path = ((ROOT / page).parent / file) if file else ROOT / page
            assert path.is_file(), f"{page}: {target}"
            there = path.read_text(encoding="utf-8") if anchor else ""
            slugs = [
                re.sub(r"[^\w\s-]", "", name.lower()).replace(" ", "-") for name in re.findall(r"(?m)^#+ (.+)$", there)
            ]
            assert not anchor or anchor in {*slugs, *re.findall(r"(?m)^::: (\S+)$", there)}, f"{page}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/-]+\.md", str(yaml.safe_load((ROOT / "properdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_drawing_names_files_that_are_there() -> None:
    drawing = ElementTree.parse(DOCS / "clip.svg")
    names = [name for text in drawing.iter() if text.get("class") == "file" for name in text.text.split()]
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert {path.name for path in ROOT.glob("*_sailer.py")} - {*names} <= {"audio_sailer.py", "windows_sailer.py"}


@pytest.mark.parametrize("page", NAMES)
def test_names_of_files_are_there(page: str) -> None:
    made = {fence.title for fence in fences(page)}
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`([\w/]+\.(?:py|yaml|md|txt)|(?:data|training|inference|hub|tests|docs)/[\w/]*)`", text):
        found = name in made or (ROOT / name).exists() or list(ROOT.glob(f"data/{name}"))
        assert found or name in ("tabulatedVotes.csv", "encoders_NAME.py", "handler.py", "report.md"), (
            f"{page}: {name}"
        )


def test_the_readmes_figures_are_those_of_the_pages() -> None:
    table = re.search(r"^## Results\n(.+?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    figures = re.findall(r"\d\.\d{3}(?: ± \d\.\d{3})?|\d\d\.\d(?= %)", table)
    assert len(figures) > 6
    assert [figure for figure in figures if figure not in (DOCS / "results.md").read_text()] == []


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=lambda command: command.place)
def test_a_command_and_its_options_are_known(command: Command, options: set[str]) -> None:
    program, *words = command.words
    options = options | made_options(command.page)
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    if program == "sailer":
        check_sailer_words(words, options)
    elif program in ("python", "torchrun"):
        if "sailer.cli" in words:
            check_sailer_words(words[words.index("sailer.cli") + 1 :], options)
            return
        script = next(word for word in words if word.endswith(".py"))
        known = (ROOT / script).read_text()
        assert all(name in options or f'"--{name}"' in known for name in given - {"nproc_per_node"}), command.text
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets, command.text
    else:
        assert program == "pip", f"{command.place}: nobody runs {program!r}"
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = re.findall(r"\[(.+)\]", command.text)
        assert {name for extra in extras for name in extra.split(",")} <= {*setup["options.extras_require"]}


@pytest.mark.parametrize("page", NAMES)
def test_commands_and_options_in_the_text_are_known(page: str, options: set[str]) -> None:
    parser, known = cli._parser(), options | made_options(page)
    subparsers = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for added in subparsers.choices.values():
        known |= {option[2:] for action in added._actions for option in action.option_strings}
    known |= {"output_dir", "transcriber", "options"}  # of `sailer data`
    known |= {"clips", "system"}  # of benchmarks/inference.py
    known |= {"recipes", "allow_missing", "allow_shared_speakers"}  # of benchmarks/emobox.py
    known |= {"device", "tiny", "steps", "only", "profile"}  # of benchmarks/gpu.py
    known |= {"strangers"}  # of benchmarks/page.py
    known |= {"parts", "padded"}  # of benchmarks/ablation.py and benchmarks/training.py
    known |= {"option"}  # any
    for span in code_spans(page):
        if span.startswith("sailer "):
            assert span.split()[1] in subparsers.choices, f"{page}: {span}"
        for name in re.findall(r"(?:^|\s)--([\w.]+)", span):
            assert name.partition(".")[0] in known, f"{page}: {span}"


@pytest.mark.parametrize("page", NAMES)
def test_yaml_blocks_are_recipes(page: str, options: set[str], tmp_path: Path) -> None:
    for number, fence in enumerate(fence for fence in fences(page) if fence.language == "yaml"):
        if fence.title.startswith("tests/"):  # of what the page itself adds
            assert set(yaml.safe_load(fence.text)) <= options | made_options(page), fence.place
            continue
        file = tmp_path / f"{number}.yaml"
        file.write_text(fence.text)
        recipe = {"audio_backbone": "tiny-whisper"} | load_recipe(file)
        data = resolve(recipe, origin=fence.place).data
        assert set(data.corpus_options) <= {*corpus_options(data.corpus), "strict"}, fence.place


@pytest.mark.parametrize("page", EXTENDING)
def test_diffs_fit_the_files_that_they_change(page: str) -> None:
    for fence in fences(page):
        if fence.language == "diff":
            changed = edited((ROOT / fence.title).read_text(encoding="utf-8"), fence.text)
            ast.parse(changed)


def test_every_option_is_on_the_page_of_options(option_tables: ModuleType) -> None:
    described, tables = option_descriptions(), option_tables.option_tables()
    settings = resolve({"audio_backbone": "tiny-whisper"})
    refused = {*NOT_IN_THE_MAIN_JOB, *SECRETS}
    for part in ("model", "data", "augmentation", "objective", "training"):
        names = {name for name, field in getattr(settings, part).__dataclass_fields__.items() if field.init} - refused
        section = tables.split(f"## {part}\n")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        assert {re.match(r"\| `(\w+)` ", row)[1] for row in rows} == names
    assert all(option.help[:20] and option.help[:20].replace("|", r"\|") in tables for option in described)
    assert "<!-- every option -->" in (DOCS / "options.md").read_text()


def made_options(page: str) -> set[str]:
    """Options that a page adds: fields of settings in its diffs."""
    diffs = "".join(fence.text for fence in fences(page) if fence.language == "diff")
    return set(re.findall(r"^\+    (\w+): \w+ = ", diffs, re.MULTILINE))


def check_sailer_words(words: list[str], options: set[str]) -> None:
    given, rest = cli._split(words)
    parsed = cli._parser().parse_args(given)
    names = {word[2:].partition("=")[0] for word in rest if word.startswith("--")}
    if words[0] == "train":
        assert {name.partition(".")[0] for name in names} <= options, words
        recipe = parsed.recipe if parsed.recipe != "my_recipe.yaml" else "demo"
        corpus = rest[rest.index("--corpus") + 1] if "--corpus" in rest else load_recipe(recipe)["corpus"]
        dotted = {name.partition(".")[2] for name in names if "." in name}
        assert not dotted or dotted <= {*corpus_options(corpus)}, words
    if words[0] == "data" and parsed.name in corpus_names():
        assert names <= {*corpus_options(parsed.name), *cli.LABEL_OPTIONS, "output_dir", "transcriber", "audio"}, words


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A copy of what the site is built from, without the pages that take long."""
    pytest.importorskip("properdocs", reason="the site needs the extra docs: pip install -e '.[docs]'")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "site", "outputs", "tests"))
    for page in (DOCS / "api").glob("*.md"):
        (tmp_path / "copy" / "docs" / "api" / page.name).write_text("# API\n")
    (tmp_path / "copy" / "docs" / "options.md").write_text("# Options\n")
    return tmp_path / "copy"


def build(folder: Path, destination: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", str(destination)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_site_builds_strictly_with_every_option_and_class(tmp_path: Path) -> None:
    pytest.importorskip("properdocs", reason="the site needs the extra docs: pip install -e '.[docs]'")
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    options = (tmp_path / "site" / "options" / "index.html").read_text()
    assert "annotation_dropout" in options and "gradient_accumulation_steps" in options
    assert 'id="sailer.data.corpora.load_corpus"' in (tmp_path / "site" / "api" / "data" / "index.html").read_text()
    assert not list((tmp_path / "site").rglob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "link", "anchor", "missing page", "page not listed", "unknown class"])
def test_a_fault_stops_the_strict_build(fault: str, site: Path, tmp_path: Path) -> None:
    page = site / "docs" / "speed.md"
    if fault == "missing page":
        page.unlink()
    elif fault == "page not listed":
        (site / "docs" / "stray.md").write_text("# Stray\n")
    elif fault != "none":
        added = {"link": "[a](nowhere.md)", "anchor": "[a](use.md#nowhere)", "unknown class": "::: sailer.cli.Nothing"}
        page.write_text(f"{page.read_text()}\n{added[fault]}\n")
    done = build(site, tmp_path / "site")
    assert (done.returncode == 0) == (fault == "none"), done.stderr
