"""The root is the package: what is installed, what it costs to import, and what make says on a bare machine."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
# Every .py file in the root enters the wheel: a new one is a module of the package and listed here, or out of place.
ROOT_MODULES = {
    "__init__",
    "adapters_sailer",
    "audio_sailer",
    "cli",
    "configuration_sailer",
    "discriminant_sailer",
    "encoders_emotion2vec",
    "encoders_sailer",
    "ensemble_sailer",
    "layers_sailer",
    "linear_sailer",
    "modeling_sailer",
    "pipeline_sailer",
    "processing_sailer",
    "settings",
    "train",
    "windows_sailer",
}
# What continuous integration calls, in this order.
SUITES = ("test", "slow", "demo", "browser")
ROOMS = ("data", "hub", "inference", "training")
WANTED = re.compile(
    rf"""sailer/({"|".join(sorted(ROOT_MODULES))})\.py
    | sailer/(data/(corpora/|synthetic/)?|hub/|inference/(backends/|page_parts/)?|training/)\w+\.py
    | sailer/inference/page_parts/page\.(css|js)
    | sailer/py\.typed
    | sailer/recipes/\w+\.yaml
    | sailer/backbone_configs/[\w.-]+\.json
    | sailer/model_cards/\w+\.(md|html)\.jinja
    | sailer-[\d.]+\.dist-info/(METADATA|RECORD|WHEEL|entry_points\.txt|top_level\.txt|licenses/LICENSE)
    """,
    re.VERBOSE,
)


def unwanted(names: list[str]) -> list[str]:
    """What a wheel holds and should not."""
    return [name for name in names if not WANTED.fullmatch(name)]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean copy, built with what is installed."""
    pytest.importorskip("setuptools", reason="building the wheel needs setuptools: pip install -e .[dev]")
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(folder / "copy")], check=True, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_its_recipes_and_its_card_templates_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert unwanted(names) == []
    sources = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    sources += [Path(f"{name}.py") for name in ROOT_MODULES if (ROOT / f"{name}.py").exists()]
    sources += [
        path.relative_to(ROOT) for path in (*ROOT.glob("recipes/*.yaml"), *ROOT.glob("backbone_configs/*.json"))
    ]
    sources += [Path("inference/page_parts", name) for name in ("page.css", "page.js")]
    sources += [path.relative_to(ROOT) for path in ROOT.glob("model_cards/*.jinja")] + [Path("py.typed")]
    assert sorted(f"sailer/{path.as_posix()}" for path in sources) == sorted(
        n for n in names if n.startswith("sailer/")
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize(
    "name",
    [
        *("sailer/conftest.py", "sailer/setup.py", "sailer/tests/test_cli.py", "tests/test_cli.py", "train.py"),
        *("sailer/benchmarks/labels.py", "sailer/model_cards/demo.md", "sailer/setup.cfg", "sailer/data/clip.wav"),
        *("sailer/docs/index.md", "sailer/docs/hooks.py", "sailer/properdocs.yml"),
    ],
)
def test_what_does_not_belong_into_a_wheel_is_noticed(name: str) -> None:
    assert unwanted(["sailer/cli.py", name]) == [name]


def test_the_wheel_works_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    code = (
        "import sailer, sailer.cli, sailer.hub.templates; print(sailer.__file__);"
        "assert (sailer.hub.templates.TEMPLATES / 'template.md.jinja').is_file(); sailer.cli.main(['recipes'])"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    file, *recipes = done.stdout.splitlines()
    assert Path(file).is_relative_to(target)
    assert [line.split()[0] for line in recipes] == sorted(path.stem for path in ROOT.glob("recipes/*.yaml"))
    assert "sailer = sailer.cli:main" in next(target.glob("*.dist-info/entry_points.txt")).read_text()


def test_import_is_quick_and_brings_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import sailer; print(time.perf_counter() - start);"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    # The best of three: the machine may be busy.
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for _ in range(3)
    ]
    assert {run[1] for run in runs} == {"[]"}
    assert min(float(run[0]) for run in runs) < 0.3


def test_public_names_are_all_there() -> None:
    import sailer

    assert [name for name in sailer.__all__ if getattr(sailer, name, None) is None] == []
    assert set(sailer.__all__) <= set(dir(sailer))
    with pytest.raises(AttributeError, match="no attribute 'SailerModle'"):
        sailer.SailerModle  # noqa: B018


def test_type_checkers_see_the_names_that_load_on_first_use() -> None:
    import sailer

    (block,) = (node for node in ast.parse((ROOT / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {name.name: found.module for found in block.body for name in found.names}
    assert seen == {name: f"sailer.{module}" for name, module in sailer._PUBLIC.items()}
    assert {*seen, "__version__"} == set(sailer.__all__)


def test_no_root_module_hides_another_package() -> None:
    names = {path.stem for path in ROOT.glob("*.py")} | {*ROOMS, "recipes"}
    assert names & (set(packages_distributions()) | sys.stdlib_module_names) - {"__init__"} == set()


def requirements() -> list[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return [Requirement(line) for group in groups for line in group.split("\n") if line]


def test_constraints_pin_every_requirement_within_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines), "a plain release each: no path, no +cpu"
    pins = {name.lower().replace("_", "-"): Version(version) for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    for requirement in requirements():
        if requirement.name == "sailer":  # an extra that gathers others
            continue
        assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier, str(requirement)


@pytest.fixture
def make(tmp_path: Path):
    """Runs make on the Makefile in an empty checkout; the output of both streams and the status."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def run(*arguments: str) -> tuple[str, int]:
        done = subprocess.run(["make", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr, done.returncode

    return run


@pytest.mark.parametrize("target", ["demo", "test", "style", "bench", "docs", "mutants"])
def test_each_target_sets_itself_up_from_constraints_first(target: str, make) -> None:
    output, status = make("--dry-run", target, "BENCHMARKS=a.py")
    assert status == 0
    assert output.index("-m venv") < output.index("pip install") < output.index("-c constraints.txt -e '.[dev]'")


def test_set_up_is_not_repeated_until_its_files_change(make, tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    assert "pip install" not in make("--dry-run", "test")[0]
    later = (tmp_path / ".venv" / "installed").stat().st_mtime + 60
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert "pip install" in make("--dry-run", "test")[0]


def test_make_says_which_python_it_needs(make, tmp_path: Path) -> None:
    output, status = make("test", "PYTHON=no-such-python")
    assert status and "no 'no-such-python' here; install Python 3.11 or later" in output
    old = tmp_path / "old-python"
    patched = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (old)'; exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{patched}" "$2"\n')
    old.chmod(0o755)
    output, status = make("demo", f"PYTHON={old}")
    assert status and "sailer needs Python 3.11 or later, this is 3.9.2" in output
    assert not (tmp_path / ".venv").exists()


def test_continuous_integration_runs_both_suites_and_the_demo_and_ends_with_the_counts(tmp_path: Path) -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    (tmp_path / ".ci").mkdir()
    shutil.copy(script, tmp_path / ".ci")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "make").write_text(
        '#!/bin/sh\necho "make $1, CI=$CI"\n'
        '[ "$1" = test ] && echo "===== 3 passed, 1 skipped, 2 deselected in 2.10s ====="\n'
        '[ "$1" = slow ] && echo "===== 2 passed, 4 deselected in 20.10s ====="\n'
        '[ "$1" = browser ] && echo "===== 1 passed, 5 deselected in 30.10s ====="\n'
        '[ "$1" != "$FAIL" ]\n'
    )
    for name, status in (("chromium", 0), ("apt-get", 1)):
        (tools / name).write_text(f"#!/bin/sh\nexit {status}\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def run(**extra: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"} | extra
        return subprocess.run([tmp_path / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60)

    lines = run().stdout.splitlines()
    assert [line for line in lines if line.startswith("make")] == [f"make {name}, CI=true" for name in SUITES]
    assert lines[-3:] == [
        "===== 3 passed, 1 skipped, 2 deselected in 2.10s =====",
        "===== 2 passed, 4 deselected in 20.10s =====",
        "===== 1 passed, 5 deselected in 30.10s =====",
    ]
    for position, name in enumerate(SUITES):
        failed = run(FAIL=name)
        assert failed.returncode
        assert not [later for later in SUITES[position + 1 :] if f"make {later}" in failed.stdout]


def test_continuous_integration_says_that_there_is_no_browser(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "make").write_text('#!/bin/sh\necho "make $1"; echo "== 1 passed in 1.00s =="\n')
    (tools / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    for name in ("bash", "cat", "dirname", "grep", "mktemp", "rm", "sh", "tee"):
        (tools / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [tmp_path / ".ci" / "run"], env={"PATH": str(tools)}, capture_output=True, text=True, check=True, timeout=60
    )
    assert "make browser is left out: there is no chromium here" in done.stdout
    assert "make browser\n" not in done.stdout
