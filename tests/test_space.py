"""A Space: what it holds, that it runs by `python app.py` with the wheel that it brings, and that it is pushed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
import yaml

import sailer
from sailer.cli import main
from sailer.inference.space import pack_installed

from .sounds import RATE, noise

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def space(tiny_speech_sailer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import soundfile

    pytest.importorskip("gradio", reason="the extra page is not installed")
    folder = tmp_path_factory.mktemp("space")
    system = folder / "my system"
    shutil.copytree(tiny_speech_sailer, system)
    (system / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "clips").mkdir()
    soundfile.write(folder / "clips" / "one.wav", noise(2.0), RATE)
    assert main(["space", str(system), str(folder / "out"), "--examples", str(folder / "clips")]) == 0
    return folder / "out"


def test_a_space_has_what_the_hub_wants(space: Path) -> None:
    _, header, _ = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(header)
    assert settings["sdk"] == "gradio" and settings["app_file"] == "app.py" and settings["title"].endswith("my system")
    assert re.fullmatch(r"6\.\d+\.\d+", settings["sdk_version"])
    needs = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch") for line in needs) and any(line.startswith("gradio") for line in needs)
    assert not any(line.startswith(("pytest", "onnx")) for line in needs)
    assert (space / "examples" / "one.wav").is_file() and (space / "model" / "model.safetensors").is_file()
    names = zipfile.ZipFile(next(space.glob("sailer-*.whl"))).namelist()
    assert {"sailer/inference/page.py", "sailer/inference/page_parts/page.js"} <= {*names}


@pytest.fixture(scope="module")
def fresh(space: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the Space's requirements, under our constraints, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh")
    made = subprocess.run([sys.executable, "-m", "venv", folder / "venv"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this Python makes no virtual environments: {(made.stderr or made.stdout).strip()[-200:]}")
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    constrained = ["--constraint", ROOT / "constraints.txt"]
    # Only whether there is an index: whatever fails after that is the Space's fault.
    probe = subprocess.run(
        [*pip, "download", "--no-deps", "--retries", "0", "--dest", folder / "probe", *constrained, "packaging"],
        **{"env": environment(folder), "capture_output": True, "text": True},
    )
    if probe.returncode:
        pytest.skip(f"pip reaches no index here: {probe.stderr.strip()[-200:]}")
    command = [*pip, "install", "--quiet", "--no-compile", *constrained, "--requirement", space / "requirements.txt"]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return python


def environment(temporary: Path) -> dict[str, str]:
    """That of a process which runs a Space: nothing of this one's packages."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"GRADIO_SERVER_PORT": "0", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}


def judged_by(command: list[str | Path], space: Path, temporary: Path) -> str:
    """What a Space's page, started by the command, says of its example; Ctrl+C ends it."""
    from gradio_client import Client, handle_file

    with (temporary / "log").open("w") as log:
        options = {"env": environment(temporary), "stdout": subprocess.PIPE, "stderr": log, "text": True}
        process = subprocess.Popen(command, cwd=space, **options)
        try:
            line = process.stdout.readline()
            assert line.startswith("The page is at http://127.0.0.1:"), (temporary / "log").read_text()[-2000:]
            client = Client(line.split()[-1], verbose=False, httpx_kwargs={"timeout": 120})
            result = client.predict(handle_file(space / "examples" / "one.wav"), "balanced", api_name="/analyse")
            return next(str(part) for part in result if "sailer-results" in str(part))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
            process.stdout.close()


def expected_of(space: Path) -> str:
    classifier = sailer.load(space / "model")
    return f"<strong>{classifier(str(space / 'examples' / 'one.wav'), return_all=True)['label']}</strong>"


def test_it_runs_in_a_fresh_environment(space: Path, fresh: Path, tmp_path: Path) -> None:
    """`pip install -r requirements.txt && python app.py`, as its README says: Gradio 6.31 wants pillow below 13."""
    checked = subprocess.run([fresh, "-m", "pip", "check"], env=environment(tmp_path), capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    absent = "import sys, importlib.util; sys.exit(importlib.util.find_spec('sailer') is not None)"
    assert subprocess.run([fresh, "-c", absent], cwd=space, env=environment(tmp_path)).returncode == 0
    assert expected_of(space) in judged_by([fresh, "app.py"], space, tmp_path)


def test_it_runs_with_the_wheel_that_it_brings(space: Path, tmp_path: Path) -> None:
    """Where there is no index too: with the packages at hand, but without the editable install."""
    packages = next(path for path in map(Path, sys.path) if (path / "gradio").is_dir())
    script = (
        f"import sys, runpy; sys.path.append({str(packages)!r}); sys.argv = ['app.py'];"
        "import importlib.util; assert importlib.util.find_spec('sailer') is None; runpy.run_path('app.py')"
    )
    assert expected_of(space) in judged_by([sys.executable, "-S", "-c", script], space, tmp_path)


def test_a_space_is_pushed_as_one(space: Path, hub, capsys: pytest.CaptureFixture) -> None:
    assert main(["push", str(space), "--space", "me/page"]) == 0
    assert set(hub.files) == {"me/page"} and hub.created["me/page"]["type"] == "space"
    files = {path.relative_to(space).as_posix(): path.read_bytes() for path in space.rglob("*") if path.is_file()}
    assert hub.files["me/page"] == files
    assert main(["push", str(space), "me/page", "--space", "me/page"]) == 2
    (space / "requirements.txt").rename(space / "kept")
    assert main(["push", str(space), "--space", "me/page"]) == 2
    (space / "kept").rename(space / "requirements.txt")
    assert "lacks requirements.txt" in capsys.readouterr().err


def test_a_folder_with_something_in_it_stays(space: Path, tiny_speech_sailer: Path, capsys) -> None:
    assert main(["space", str(tiny_speech_sailer), str(space)]) == 2
    assert "is not empty" in capsys.readouterr().err and (space / "app.py").is_file()


def test_an_installed_package_is_packed_as_it_is(space: Path, tmp_path: Path) -> None:
    (wheel,) = space.glob("sailer-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (info,) = (tmp_path / "site").glob("*.dist-info")
    packed = pack_installed(Distribution.at(info), tmp_path)
    ours, theirs = zipfile.ZipFile(packed), zipfile.ZipFile(wheel)
    assert sorted(ours.namelist()) == sorted(theirs.namelist())
    assert all(ours.read(name) == theirs.read(name) for name in ours.namelist() if not name.endswith("RECORD"))
