"""Two training processes do what one does: the same clips at each step, every figure, the same weights after a kill.

Runs are started as a user starts them, with `torchrun` or `accelerate launch`.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from .recorded_training import write_corpus

pytestmark = pytest.mark.slow

RECORDED = Path(__file__).with_name("recorded_training.py")
OPTIONS = {
    "corpus": "manifest",
    "corpus_options": "{}",
    "hidden_size": 16,
    "conv_dropout": 0,  # each process draws its own
    "freeze_audio": "true",
    "freeze_text": "true",
    "num_train_epochs": 2,
    "dataloader_num_workers": 0,
    "shuffled_label_baseline": "false",
    "metric_for_best_model": "kl",
    "use_cpu": "true",
    "disable_tqdm": "true",
}
# Of a step's eight clips each process takes its share.
CLIPS_PER_STEP = 8
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}
# What differs from run to run.
TIMES = ("runtime", "samples_per_second", "steps_per_second", "wall_seconds", "epoch", "total_flos")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of training clips; of 9 validation and 15 test clips one process has one more than the other."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=6 * CLIPS_PER_STEP, validation=9, test=15)


def start(corpus: Path, folder: Path, launcher: str | None = None, **options: Any) -> subprocess.Popen:
    """A run whose record is left beside its folder."""
    given = OPTIONS | {"data_dir": corpus, "output_dir": folder} | options
    given["per_device_train_batch_size"] = CLIPS_PER_STEP // (2 if launcher else 1)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    launched = ["-m", *LAUNCHERS[launcher]] if launcher else []
    arguments = ["train", "demo", *(f"--{name}={value}" for name, value in given.items())]
    return subprocess.Popen(
        [sys.executable, *launched, str(RECORDED), str(folder.parent), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


def finish(corpus: Path, folder: Path, launcher: str | None = None, **options: Any) -> Path:
    run = start(corpus, folder, launcher, **options)
    printed, _ = run.communicate(timeout=500)
    assert run.returncode == 0, printed[-3000:]
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=False) for path in sorted(folder.parent.glob("record-*.pt"))]


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(corpus, tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module", params=LAUNCHERS)
def two(corpus: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return finish(corpus, tmp_path_factory.mktemp("two") / "run", request.param)


def test_two_processes_share_the_clips_of_each_step(one: Path, two: Path) -> None:
    (alone,), both = records(one), records(two)
    assert len(both) == 2 and {len(record["batches"]) for record in (alone, *both)} == {12}

    def heard(batches: list[dict[str, Any]]) -> list[str]:
        return sorted(
            str((*item["clips"], item["gap"], *target))
            for batch in batches
            for item, target in zip(batch["items"], batch["labels"].tolist(), strict=True)
        )

    for step in range(12):
        together = heard([record["batches"][step] for record in both])
        assert together == heard([alone["batches"][step]]) and len(together) == CLIPS_PER_STEP


def figures(values: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on the number of processes; a figure that is not defined is None."""
    kept = {name: value for name, value in values.items() if not name.endswith(TIMES)}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in kept.items()}


def test_two_processes_give_every_figure_that_one_gives(one: Path, two: Path) -> None:
    first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    assert first.keys() == second.keys() >= {"validation", "test"}
    for split in ("validation", "test"):
        assert figures(second[split]) == pytest.approx(figures(first[split]), rel=2e-4, abs=2e-5), split
        assert {"loss", "loss_age", "macro_f1", "kl", "ccc", "natural_ece"} <= figures(first[split]).keys()
    first, second = (json.loads((folder / "training_log.json").read_text()) for folder in (one, two))
    trained = [entry for entry in first if "loss" in entry]
    assert len(trained) == 2 and {"loss_primary", "loss_age", "grad_norm"} <= figures(trained[0]).keys()
    for alone, both in zip(first, second, strict=True):
        assert figures(both) == pytest.approx(figures(alone), rel=2e-4, abs=2e-5)


STEPS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 3}


def reached(checkpoints: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*")), default=0)


@pytest.mark.parametrize("launcher", [None, "torchrun"], ids=["one", "two"])
def test_a_run_that_was_killed_in_mid_epoch_ends_with_the_weights_of_one_that_was_not(
    corpus: Path, tmp_path: Path, launcher: str | None
) -> None:
    whole = finish(corpus, tmp_path / "whole" / "run", launcher, **STEPS)
    folder = tmp_path / "cut" / "run"
    run = start(corpus, folder, launcher, **STEPS)
    checkpoints, end = folder / "checkpoints", time.monotonic() + 400
    while reached(checkpoints) < 8:  # the second of an epoch's six
        assert run.poll() is None and time.monotonic() < end, run.communicate()[0][-3000:]
        time.sleep(0.005)
    started = psutil.Process(run.pid)
    for process in (*started.children(recursive=True), started):
        process.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    last = reached(checkpoints)
    assert run.returncode == -signal.SIGKILL and not (folder / "model.safetensors").exists()
    assert 8 <= last < 12, "it was killed too late to tell"
    finish(corpus, folder, launcher, **STEPS, resume_from_checkpoint="true")
    steps = [len(record["batches"]) for record in records(folder)]
    assert set(steps) == {18 - last}, "it went on, and did not start afresh"
    first, second = (load_file(path / "model.safetensors") for path in (whole, folder))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
