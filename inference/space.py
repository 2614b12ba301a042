"""`sailer space`: a system goes in, a Space for the Hub comes out, the page of that system with all that it needs."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sailer.data.atomic import replacing_folder
from sailer.hub.publishing import check_system
from sailer.inference.page import import_gradio
from sailer.inference.page_parts.examples import make_examples
from sailer.inference.page_parts.judging import PageError
from sailer.inference.recordings import find_recordings

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
# Of a checkout; what is not the package's would only make the copy slow.
NOT_BUILT = (".*", "build", "dist", "outputs", "site", "*.egg-info", "__pycache__", "tests", "docs", "benchmarks")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
INSTALLERS_OWN = ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json", "uv_cache.json")

APP = '''"""The page of a SAILER system; `python app.py` shows it on this machine, a Space to everyone."""

import os
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

# A Space installs requirements.txt before it has the other files, so that the wheel cannot stand there.
unpacked = tempfile.TemporaryDirectory(prefix="sailer-")
with zipfile.ZipFile(next(HERE.glob("sailer-*.whl"))) as wheel:
    wheel.extractall(unpacked.name)
sys.path.insert(0, unpacked.name)

from sailer.inference.page import PageSettings, served  # noqa: E402

settings = PageSettings(
    models=[{model}],
    host=os.environ.get("GRADIO_SERVER_NAME") or ("0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
    examples={examples},
    max_minutes=5,
    max_megabytes=50,
    max_files=20,
)
with served(settings) as address:
    print(f"The page is at {{address}}", flush=True)
    threading.Event().wait()
'''

README = """---
{header}---

# {title}

The page of [a SAILER system](https://arxiv.org/abs/2505.22133): what it hears in a recording, how that moves, and how
sure it is. {card}

It judges how speech sounds to others and is often wrong. It is not for decisions about people. Recordings are heard
on the machine that runs this Space and are kept for half an hour.

`pip install -r requirements.txt && python app.py` shows it on a machine of your own.
"""


def write_space(
    model: str | os.PathLike, folder: str | os.PathLike, examples: str | os.PathLike | None = None
) -> Path:
    """Write a Space: app.py, requirements.txt, README.md with the header that Spaces want, example clips, sailer's
    wheel, and the system where it is a folder.

    Args:
        model: folder, which is copied, or Hub id, which the Space loads when it starts.
        folder: folder to write; it must be new or empty.
        examples: folder of clips; by default synthetic ones are made.

    Raises:
        PageError: the folder holds something, or the wheel cannot be built.
        PushError: the model's folder is not a complete system, or holds a pickle.
        ImportError: Gradio is not installed, or eSpeak NG where examples are to be made.
    """
    gradio = import_gradio()
    folder, source = Path(folder), Path(model)
    if folder.is_dir() and any(folder.iterdir()):
        raise PageError(f"{folder} is not empty: name a new folder for the Space.")
    is_local = source.is_dir()
    if not is_local and len(source.parts) != 2:
        raise PageError(f"{model} is neither a folder nor a Hub id. `make demo` makes a system in outputs/demo.")
    files = check_system(source) if is_local else []
    title = source.resolve().name if is_local else source.name
    with replacing_folder(folder) as beside:
        for file in files:
            target = beside / "model" / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        _write_examples(examples, beside / "examples")
        wheel = build_wheel(beside)
        app = APP.format(model='str(HERE / "model")' if is_local else repr(str(model)), examples='HERE / "examples"')
        (beside / "app.py").write_text(app, encoding="utf-8")
        (beside / "requirements.txt").write_text("\n".join([*requirements(wheel), ""]), encoding="utf-8")
        header = space_header(title, gradio.__version__, None if is_local else str(model))
        card = f"The system is {model}." if not is_local else "The system is in `model/`, with its card."
        (beside / "README.md").write_text(README.format(header=header, title=title, card=card), encoding="utf-8")
    logger.info("Try it with: python %s; publish it with: sailer push %s --space USER/NAME", folder / "app.py", folder)
    return folder


def space_header(title: str, gradio_version: str, model: str | None = None) -> str:
    """The YAML at the head of a Space's README (https://huggingface.co/docs/hub/spaces-config-reference)."""
    header: dict[str, Any] = {
        "title": f"Emotions in speech: {title}",
        "emoji": "🎙️",
        "colorFrom": "blue",
        "colorTo": "red",
        "sdk": "gradio",
        "sdk_version": gradio_version,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "license": "apache-2.0",
        "tags": ["speech-emotion-recognition", "sailer"],
    }
    if model is not None:
        header["models"] = [model]
    text = io.StringIO()
    YAML(typ="rt").dump(header, text)
    return text.getvalue()


def requirements(wheel: Path) -> list[str]:
    """What the page needs besides the wheel: the package's own requirements, and those of its extra `page`."""
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        lines = packed.read(name).decode("utf-8").partition("\n\n")[0].splitlines()
    wanted = []
    for line in lines:
        if line.startswith("Requires-Dist: "):
            requirement = Requirement(line.removeprefix("Requires-Dist: "))
            if requirement.marker is None or requirement.marker.evaluate({"extra": "page"}):
                requirement.marker = None
                wanted.append(str(requirement))
    return sorted(wanted, key=str.lower)


def build_wheel(folder: Path) -> Path:
    """Sailer's wheel, without network: built from the checkout by setuptools, or packed from what is installed.

    Raises:
        PageError: setuptools cannot build it.
    """
    if not (ROOT / "pyproject.toml").is_file():
        return pack_installed(distribution("sailer"), folder)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "sailer")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_BUILT))
        command = [sys.executable, "-c", BUILD, str(folder.resolve())]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    built = list(folder.glob("sailer-*.whl"))
    if done.returncode or not built:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PageError(f"Sailer's wheel could not be built ({reason}): pip install 'setuptools>=77' and try again.")
    return built[0]


def pack_installed(installed: Distribution, folder: Path) -> Path:
    """A wheel (https://packaging.python.org/specifications/binary-distribution-format) of a package as installed."""
    path = folder / f"{installed.metadata['Name']}-{installed.version}-py3-none-any.whl"
    record, name = [], f"{installed.metadata['Name']}-{installed.version}.dist-info/RECORD"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in installed.files or ():
            if file.parts[0] == ".." or file.name in INSTALLERS_OWN or "__pycache__" in file.parts:
                continue
            content = file.read_binary()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append([file.as_posix(), f"sha256={digest}", str(len(content))])
            wheel.writestr(file.as_posix(), content)
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([*record, [name, "", ""]])
        wheel.writestr(name, lines.getvalue())
    return path


def _write_examples(source: str | os.PathLike | None, folder: Path) -> None:
    if source is None:
        for file, said in make_examples(folder).items():
            file.with_suffix(".txt").write_text(f"{said}\n", encoding="utf-8")
        return
    folder.mkdir()
    for name in find_recordings([str(source)]):
        for file in (Path(name), Path(name).with_suffix(".txt")):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
