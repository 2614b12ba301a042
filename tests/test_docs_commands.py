"""Every command and block of Python of the README and docs/ is run on tiny data, each page in a checkout of its own.

A page on extending the package is done as it says: its files and changes go into a copy of the package first. A
command that says "# needs the Hub" (or PyPI) is not run; tests/test_docs.py counts them.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sailer import SailerForAudioClassification
from sailer.layers_sailer import set_reference
from sailer.settings import load_recipe

from .docs_pages import EXTENDING, NAMES, ROOT, commands, edited, fences

# What a command of a page is given instead, and on top, so that it takes seconds and no network.
STAND_INS = {
    "openai/whisper-base": "tiny-whisper",
    "../shared/models/whisper-base-encoder": "tiny-whisper",
    "../shared/corpora/ravdess": "RAVDESS_FOLDER",
}
ONE_EPOCH = {"num_train_epochs": "1"}
FEW_CLIPS = {
    f"corpus_options.{name}": number
    for name, number in {"train_clips": "32", "validation_clips": "16", "test_clips_per_class": "1"}.items()
}
SCRIPTS = {
    "benchmarks/ablation.py": {
        **{
            "audio_backbone": "tiny-whisper",
            "epochs": "1",
            "corpora": "synthetic",
            "parts": "objective",
            "seeds": "0",
        },
        "synthetic": json.dumps({"train_clips": 24, "validation_clips": 12, "test_clips_per_class": 1, "speakers": 6}),
    },
    "docs/run_onnx.py": {},
    "benchmarks/emobox.py": {"recipes": "ravdess_whisper_base", "audio_backbone": "tiny-whisper"},
    "benchmarks/linear.py": {"rounds": "1"},
    "benchmarks/loader.py": {"clips": "64"},
    "benchmarks/page.py": {"visitors": "2", "requests": "4", "keep_minutes": "0.05"},
    "benchmarks/streaming.py": {"seconds": "1"},
    "examples/fine_tune_with_trainer.py": {"epochs": "1"},
}


def steps(page: str) -> Iterator[dict]:
    """What a page's reader does, in order: {"place", "kind", ...} for RUNNER."""
    for fence in fences(page):
        if fence.language == "python" and not fence.title:
            yield {"place": fence.place, "kind": "python", "code": fence.text}
        for command in commands(fence):
            if not command.needs:
                kind, words = tiny(command.words)
                yield {"place": f"{fence.place} {command.text}", "kind": kind, "words": words}


def tiny(words: list[str]) -> tuple[str, list[str]]:
    """How a command is run, and its words on tiny data."""
    program, *words = [STAND_INS.get(word, word) for word in words]
    if program == "sailer" and words[0] == "train":
        recipe = {} if words[1] == "my_recipe.yaml" else load_recipe(words[1])
        changes = {"audio_backbone": "tiny-whisper"} if "/" in (recipe.get("audio_backbone") or "") else {}
        changes |= {"trainable_audio_layers": "1"} if "trainable_audio_layers" in recipe else {}
        changes |= FEW_CLIPS if recipe.get("corpus") == "synthetic" and "--corpus" not in words else {}
        given = {word[2:] for word in words if word.startswith("--")}
        changes = {name: value for name, value in changes.items() if name not in given}
        return "sailer", with_options(words, {**ONE_EPOCH, **changes})
    if program == "sailer" and words[0] == "evaluate" and "synthetic" in words:
        few = {name.partition(".")[2]: int(number) for name, number in FEW_CLIPS.items()}
        given = {"synthetic": few} if "--corpora" in words else few
        return "sailer", with_options(words, {"corpus_options": json.dumps(given)})
    if program == "sailer":
        return ("page" if words[0] == "page" else "sailer"), words
    if program == "torchrun":
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return "process", launch + with_options(words, {} if "predict" in words else {**ONE_EPOCH, **FEW_CLIPS})
    if program == "python":
        return "process", [sys.executable, *with_options(words, SCRIPTS[words[0]])]
    if program == "pip":
        offline = ["--dry-run", "--no-deps", "--no-build-isolation", "--no-index"]
        return "process", [sys.executable, "-m", "pip", *words, *offline]
    # What make would run: a few tests are run indeed, whole suites are not.
    assert program == "make", f"nobody runs {program!r}"
    # Under another make, as in CI, it would tell of its folder too.
    dry_run = [program, "--dry-run", "--no-print-directory", *words]
    return ("tests" if any("TESTS=" in word for word in words) else "process"), dry_run


def with_options(words: list[str], changes: dict[str, str]) -> list[str]:
    words = list(words)
    for name, value in changes.items():
        if f"--{name}" in words:
            words[words.index(f"--{name}") + 1] = value
        else:
            words += [f"--{name}", value]
    return words


# Runs in a process of its own: the steps of pages, each page in its folder; what failed is told at the end.
RUNNER = """
import json, os, signal, subprocess, sys, time, traceback
import sailer.cli

failed = []
for page in json.load(open(sys.argv[1])):
    os.chdir(page["folder"])
    names = {}
    for step in page["steps"]:
        print(f"\\n+ {time.process_time():.0f} s", step["place"], *step.get("words", ()), flush=True)
        try:
            if step["kind"] == "python":
                exec(compile(step["code"], step["place"], "exec"), names)
            elif step["kind"] == "sailer":
                status = sailer.cli.main(step["words"])
                assert status == 0, f"exit status {status}"
            elif step["kind"] == "page":  # until it is there, then Ctrl+C
                command = [sys.executable, "-m", "sailer.cli", *step["words"], "--port", "0"]
                served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                line = served.stdout.readline()
                served.send_signal(signal.SIGINT)
                assert line.startswith("The page is at http://127.0.0.1:"), line
                assert served.wait(timeout=60) == 130
            else:
                done = subprocess.run(step["words"], capture_output=True, text=True)
                print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
                assert done.returncode == 0, f"exit status {done.returncode}"
                if step["kind"] == "tests":
                    line = done.stdout.strip().splitlines()[-1].replace(".venv/bin/python", sys.executable)
                    subprocess.run(line, shell=True, check=True)
        except (Exception, SystemExit):
            traceback.print_exc(file=sys.stdout)
            failed.append([page["page"], step["place"]])
json.dump(failed, open(sys.argv[2], "w"))
"""


def write_noise(path: Path, seconds: float = 0.4, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.1, 0.1, round(seconds * 16000)), 16000)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_sailer: Path, tiny_speech_sailer: Path) -> Path:
    """A copy of the repository called sailer, with the data and systems that the pages speak of, all tiny."""
    folder = tmp_path_factory.mktemp("reader") / "sailer"
    left_out = shutil.ignore_patterns(".git", ".*_cache", ".venv*", "build", "dist", "site", "outputs", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left_out)
    (folder / ".venv").mkdir()
    for name in ("installed", "installed-all", "installed-browser", "installed-docs", "installed-page"):
        (folder / ".venv" / name).touch()
    shutil.copytree(tiny_sailer, folder / "outputs" / "demo")
    settings = json.loads((folder / "outputs" / "demo" / "config.json").read_text())
    kept = {"clips": 3, "scores": {"balanced": [0.2, 0.5, 0.8]}, "class_clips": {}, "class_scores": {"balanced": {}}}
    (folder / "outputs" / "demo" / "config.json").write_text(json.dumps(settings | {"conformal": kept}))
    for name in ("outputs/ravdess_whisper_base", "MODEL1", "MODEL2"):
        shutil.copytree(tiny_speech_sailer, folder / name)
    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    set_reference(model, torch.eye(4, model.config.audio_config.hidden_size), None, ["ann", "bob", "cy", "di"])
    model.save_pretrained(folder / "outputs" / "ravdess_whisper_base")
    for number in range(24 * 8):
        actor, emotion = number // 8 + 1, number % 8 + 1
        name = f"Actor_{actor:02d}/03-01-{emotion:02d}-01-02-01-{actor:02d}.wav"
        write_noise(folder / "RAVDESS_FOLDER" / name, seed=number)
    write_noise(folder / "clip.wav", seconds=1)
    write_noise(folder / "long.wav", seconds=7)
    for number in range(3):
        write_noise(folder / "recordings" / f"{number}.flac", seed=number)
        write_noise(folder / f"{number}.flac", seed=10 + number)
    rows = ["file,emotion,who"]
    for number in range(40):
        rows.append(f"clips/{number}.wav,{('hap', 'sad', 'ang', 'neu')[number % 4]},speaker{number // 4}")
        write_noise(folder / "clips" / f"{number}.wav", seed=number)
        write_noise(folder / "CLASSES_FOLDER" / ("calm", "tense")[number % 2] / f"{number}.wav", seed=number)
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    for who in ("anna", "ben", "cleo", "dan"):
        for number, emotion in enumerate(("happy", "plain", "happy", "plain")):
            write_noise(folder / "STUDIO_FOLDER" / f"{who}_{emotion}_{number}.wav", seed=number + len(who))
    return folder


@pytest.fixture(scope="module")
def run_pages(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[list[str]]]:
    """Runs pages in a process, each in its own copy of the checkout; gives the [page, step] that failed."""

    def run(pages: list[str], as_package: bool = False) -> list[list[str]]:
        folder, plan = tmp_path_factory.mktemp("pages"), []
        for number, page in enumerate(pages):
            copy = folder / str(number) / "sailer"
            shutil.copytree(checkout, copy)
            recipe = next(fence for fence in fences("docs/data.md") if fence.title == "my_recipe.yaml")
            (copy / "my_recipe.yaml").write_text(recipe.text.replace("openai/whisper-base", "tiny-whisper"))
            for fence in fences(page):
                if fence.language == "diff":
                    (copy / fence.title).write_text(edited((copy / fence.title).read_text(), fence.text))
                elif fence.title and page in EXTENDING:
                    (copy / fence.title).write_text(fence.text)
            plan.append({"page": page, "folder": str(copy), "steps": list(steps(page))})
        (folder / "plan.json").write_text(json.dumps(plan))
        environment = os.environ | {"SAILER_DEBUG": "1", "HF_MODULES_CACHE": str(folder / "modules")}
        if as_package:
            environment["PYTHONPATH"] = str(copy.parent)
        command = [sys.executable, "-c", RUNNER, str(folder / "plan.json"), str(folder / "failed.json")]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
        print(done.stdout[-20000:], done.stderr[-5000:])
        assert done.returncode == 0, "the runner itself failed"
        return json.loads((folder / "failed.json").read_text())

    return run


@pytest.mark.slow
def test_every_command_of_the_guides_runs(run_pages: Callable[..., list[list[str]]]) -> None:
    pages = [page for page in NAMES if page not in EXTENDING and list(steps(page))]
    assert len(pages) >= 6
    assert run_pages(pages) == []


@pytest.mark.slow
@pytest.mark.parametrize("page", EXTENDING)
def test_a_page_on_extending_does_what_it_says(page: str, run_pages: Callable[..., list[list[str]]]) -> None:
    """The page's files and changes go into a copy of the package, whose tests and commands are then the page's."""
    assert run_pages([page], as_package=True) == []
