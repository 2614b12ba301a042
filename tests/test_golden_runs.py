"""Short runs through the command line give the losses, gradient norms and metrics that tests/golden keeps of them.

`make golden` (the option `--rewrite-golden`) writes them anew where they changed; tests/golden/README.md says when.
"""

import csv
import json
import platform
import re
import sys
import wave
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import yaml

from sailer.cli import main
from sailer.data.schema import PRIMARY_LABELS

GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted(GOLDEN.glob("*.yaml"))
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
# What the numbers come from: at other versions than those of constraints.txt they may differ and mean nothing.
NUMERICS = (
    *("torch", "transformers", "tokenizers", "numpy", "accelerate", "datasets", "librosa", "soundfile"),
    *("scipy", "scikit-learn"),
)
TOLERANCE = 1e-3
# Values nearer to 0 than this are compared as if they were as large; a learning rate is exact however small.
FLOOR, FLOORS = 1e-2, {"learning_rate": 1e-9}
OPTIONS = {
    "corpus": "manifest",
    "data_dir": "clips.csv",
    "num_train_epochs": 6,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "use_cpu": "true",
    "disable_tqdm": "true",
    "seed": 1,
}
NOT_KEPT = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")

Figures = dict[str, dict[str, float | None]]
Difference = tuple[str, str, str, float | None, float | None, float]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, golden_maker: ModuleType) -> Path:
    """A folder to run in, with `backbones/`, a system to start from in `base`, and a corpus in `clips.csv`.

    The corpus is made by numpy alone, as a speech synthesizer may sound otherwise elsewhere: 52 clips of 0.4 to 1.2 s,
    a class a pitch, five annotators who mostly agree, and everything that may be unknown is so somewhere.
    """
    folder = tmp_path_factory.mktemp("golden")
    golden_maker.make_backbones(folder / "backbones")
    (folder / "base").symlink_to(GOLDEN / "checkpoint_0.1.0" / "multimodal")
    random = np.random.default_rng(7)
    words = ("so", "happy", "leave", "me", "alone", "what", "a", "day", "home", "now")
    secondary = ("Amused", "Excited", "Frustrated", "Concerned", "Disappointed", "Annoyed")
    common = ("Neutral", "Happy", "Neutral", "Sad", "Neutral", "Angry")
    rows = []
    for split, clips in (("train", 24), ("validation", 12), ("test", 16)):
        for clip in range(clips):
            name = f"{split}-{clip:02d}"
            label = common[clip // 2 % 6] if clip % 2 else PRIMARY_LABELS[clip // 2 % 9]
            seconds = 0.4 + 0.8 * random.random()
            write_clip(folder / f"{name}.wav", seconds, 90.0 + 25 * PRIMARY_LABELS.index(label), random)
            others = [random.choice([*common, *PRIMARY_LABELS]) for _ in range(2)]
            row = {
                "audio": f"{name}.wav",
                "split": split,
                "transcript": "" if clip % 6 == 5 else " ".join(words[i] for i in random.integers(0, 10, 4)),
                "label": "no agreement" if clip % 8 == 7 else label,
                "votes": ";".join([label] * 3 + others),
                "secondary": "" if clip % 9 == 8 else ";".join(secondary[i] for i in random.integers(0, 6, 2)),
                "speaker": f"{split}-{clip % 4}",
                "sex": ("female", "male", "female", "")[clip % 4],
                "age": "" if clip % 5 == 4 else 20 + int(random.integers(50)),
            }
            ratings = np.round(1 + 6 * random.random(3), 2)
            row |= {
                name: "" if clip % 7 == 6 else value
                for name, value in zip(("arousal", "valence", "dominance"), ratings, strict=True)
            }
            rows.append(row)
    with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder


def write_clip(path: Path, seconds: float, pitch: float, random: np.random.Generator) -> None:
    time = np.arange(round(16000 * seconds)) / 16000
    tone = sum(np.sin(2 * np.pi * harmonic * pitch * time) / harmonic for harmonic in range(1, 6))
    sound = 0.15 * tone * (1 + 0.5 * np.sin(2 * np.pi * 3 * time)) + 0.02 * (2 * random.random(len(time)) - 1)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.round(32000 * sound).astype("<i2").tobytes())


def run(recipe: Path, folder: Path) -> Figures:
    """Figures of one run of the command: by step what the Trainer logged, by split the metrics."""
    given = OPTIONS | {"output_dir": folder}
    assert main(["train", str(recipe), *(f"--{name}={value}" for name, value in given.items())]) == 0
    log = json.loads((folder / "training_log.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    figures = {f"step {entry['step']}": entry for entry in log if "loss" in entry}
    figures |= {name: values for name, values in metrics.items() if isinstance(values, dict)}
    return {
        where: {
            name: None if value is None else float(f"{value:.7g}")
            for name, value in values.items()
            if name not in (*NOT_KEPT, "step")
        }
        for where, values in figures.items()
    }


def differences(run: str, old: Figures, new: Figures) -> list[Difference]:
    """What differs by more than the tolerance, or is in one of the two alone (NaN): run, step, name, old, new, by."""
    found = []
    for where in dict.fromkeys((*old, *new)):
        before, after = old.get(where, {}), new.get(where, {})
        for name in dict.fromkeys((*before, *after)):
            values = before.get(name), after.get(name)
            if values == (None, None) and name in before and name in after:
                continue
            relative = float("nan")
            if None not in values:
                size = max(*map(abs, values), FLOORS.get(name, FLOOR))
                relative = abs(values[1] - values[0]) / size
            if not relative <= TOLERANCE:
                found.append((run, where, name, *values, relative))
    return found


def as_table(found: list[Difference]) -> str:
    """Differences as text, a line each."""
    cells = [("run", "step", "name", "old", "new", "relative difference")]
    for *names, old, new, relative in found:
        shown = ["-" if value is None else f"{value:.6g}" for value in (old, new)]
        cells.append((*names, *shown, "-" if relative != relative else f"{relative:.2g}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def elsewhere() -> str:
    """What is here that the numbers are not kept for; "" if nothing."""
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", CONSTRAINTS.read_text(), flags=re.MULTILINE))
    here = {name: version(name).partition("+")[0] for name in NUMERICS}
    others = [f"{name} {here[name]} (not {pinned[name]})" for name in NUMERICS if here[name] != pinned[name]]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        others.append(f"processor {platform.machine()} (not x86-64)")
    return ", ".join(others)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_run_gives_the_numbers_that_are_kept(
    recipe: Path,
    place: Path,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    rewriting, reason = pytestconfig.getoption("rewrite_golden"), elsewhere()
    if reason:
        (pytest.fail if rewriting else pytest.skip)(f"the numbers are kept for constraints.txt; here is {reason}")
    file = recipe.with_suffix(".json")
    old = json.loads(file.read_text()) if file.exists() else {}
    monkeypatch.chdir(place)
    new = run(recipe, tmp_path / recipe.stem)
    found = differences(recipe.stem, old, new)
    if rewriting:
        if found:
            file.write_text(json.dumps(new, indent=1) + "\n")
        with capsys.disabled():
            print(f"\n{as_table(found)}" if found else f"\n{recipe.stem}: nothing changed")
    elif found:
        message = f"{len(found)} numbers of {recipe.stem} changed; if they are meant to, run: make golden"
        pytest.fail(f"{message}\n{as_table(found)}", pytrace=False)


def test_every_choice_is_made_in_some_run() -> None:
    """A new loss, mode or head shall have a golden run too."""
    from sailer.data.augmentation import AugmentationSettings, DropoutMode, MixingMode
    from sailer.settings import HEADS, DataSettings, ModelSettings
    from sailer.training.losses import AttributeLoss, Objective, TargetWeighting

    recipes = [yaml.safe_load(path.read_text()) for path in RECIPES]
    choices: dict[str, Any] = {
        "objective": get_args(Objective),
        "target_weighting": get_args(TargetWeighting),
        "attribute_loss": get_args(AttributeLoss),
        "annotation_dropout_mode": get_args(DropoutMode),
        "mixing_mode": get_args(MixingMode),
        "audio_layers": ("last", "weighted", "weighted_norm", "concat_norm"),
        "cache_features": ("off", "memory", "disk"),
        "audio_backbone": ("backbones/whisper", "backbones/wavlm"),
    }
    defaults = {
        name: field.default
        for settings in (ModelSettings, DataSettings, AugmentationSettings)
        for name, field in settings.__dataclass_fields__.items()
    } | {"objective": "kl", "target_weighting": "product", "attribute_loss": "mse"}
    for option, values in choices.items():
        assert {recipe.get(option, defaults[option]) for recipe in recipes} >= set(values), option
    assert {head for recipe in recipes for head in recipe.get("heads", [])} == set(HEADS)
    augmentations = {name: default for name, default in vars(AugmentationSettings()).items() if not default}
    assert [name for name in augmentations if not any(recipe.get(name) for recipe in recipes)] == []


def test_a_difference_is_told_and_the_rest_is_not() -> None:
    old = {"step 1": {"loss": 2.0, "learning_rate": 1e-6, "grad_norm": 5e-6}, "test": {"kl": 1.0, "ccc": None}}
    assert differences("a", old, json.loads(json.dumps(old))) == []
    near = {"step 1": {"loss": 2.0015, "learning_rate": 1e-6, "grad_norm": 9e-6}, "test": {"kl": 1.0, "ccc": None}}
    assert differences("a", old, near) == []
    far = {"step 1": {"loss": 2.003, "learning_rate": 1.01e-6, "grad_norm": 5e-5}, "test": {"kl": -1.0, "ece": 0.5}}
    found = differences("a", old, far)
    assert [row[:3] for row in found] == [
        *(("a", "step 1", name) for name in ("loss", "learning_rate", "grad_norm")),
        *(("a", "test", name) for name in ("kl", "ccc", "ece")),
    ]
    lines = as_table(found).splitlines()
    assert len(lines) == 7 and lines[1].split() == ["a", "step", "1", "loss", "2", "2.003", "0.0015"]
    assert lines[-1].split() == ["a", "test", "ece", "-", "0.5", "-"]


def test_what_the_numbers_are_not_kept_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = {name: version(name).partition("+")[0] for name in NUMERICS} | {"numpy": "1.0"}
    (tmp_path / "constraints.txt").write_text("".join(f"{name}=={value}\n" for name, value in pinned.items()))
    monkeypatch.setattr(sys.modules[__name__], "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert elsewhere() == f"numpy {version('numpy')} (not 1.0)"
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "processor aarch64" in elsewhere()
