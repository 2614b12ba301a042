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

from sailer.cli import main
from sailer.inference.space import pack_installed

from .sounds import RATE, noise

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


def test_it_runs_with_the_wheel_that_it_brings(space: Path, tmp_path: Path) -> None:
    """In an environment that has the requirements and no sailer: site packages without the editable install."""
    packages = next(path for path in map(Path, sys.path) if (path / "gradio").is_dir())
    script = (
        f"import sys, runpy; sys.path.append({str(packages)!r}); sys.argv = ['app.py'];"
        "import importlib.util; assert importlib.util.find_spec('sailer') is None; runpy.run_path('app.py')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": "0", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-S", "-c", script]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=space, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        line = process.stdout.readline()
        try:
            assert line.startswith("The page is at http://127.0.0.1:"), (tmp_path / "log").read_text()[-2000:]
            from gradio_client import Client, handle_file

            client = Client(line.split()[-1], verbose=False)
            result = client.predict(handle_file(space / "examples" / "one.wav"), "balanced", api_name="/analyse")
            assert any("sailer-results" in str(part) for part in result)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
            process.stdout.close()


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
