"""Going on with a run: from the last whole checkpoint of the same run, after SIGTERM, SIGKILL and a full disk.

Runs are started through the command line, in a process of their own where they are killed.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sailer.cli import main
from sailer.training.checkpoints import damage_of

pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs espeakng-loader (the demo extra)")

SCRIPT = Path(__file__).resolve().parents[1] / "train.py"
OPTIONS = {
    "corpus_options": '"{train_clips: 48, validation_clips: 12, test_clips_per_class: 1, speakers: 6}"',
    "audio_backbone": "tiny-whisper",
    "text_backbone": "tiny-text",
    "hidden_size": 16,
    "freeze_audio": "true",
    "freeze_text": "true",
    "frame_norm": "true",
    "heads": "[primary]",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "dataloader_num_workers": 0,
    "shuffled_label_baseline": "false",
    "use_cpu": "true",
    "disable_tqdm": "true",
}


def arguments(folder: Path, **options: object) -> list[str]:
    given = OPTIONS | {"output_dir": folder} | options
    return ["demo", *(f"--{name}={str(value).strip(chr(34))}" for name, value in given.items())]


def start(folder: Path, processes: int = 1, **options: object) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *arguments(folder, **options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def finish(folder: Path, processes: int = 1, **options: object) -> str:
    run = start(folder, processes, **options)
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 0, printed[-3000:]
    return printed


def wait_for(run: subprocess.Popen, folder: Path, step: int) -> Path:
    """The checkpoint of a step, once it is there."""
    checkpoint, end = folder / "checkpoints" / f"checkpoint-{step}", time.monotonic() + 240
    while not (checkpoint / "optimizer.pt").exists():
        assert run.poll() is None and time.monotonic() < end, run.communicate()[0][-3000:]
        time.sleep(0.01)
    return checkpoint


def signal_after(run: subprocess.Popen, folder: Path, step: int, number: int) -> str:
    """Send a signal once the checkpoint of a step is there; what the run printed."""
    wait_for(run, folder, step)
    run.send_signal(number)
    return run.communicate(timeout=240)[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_systems(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# Saved and evaluated every other step of six an epoch, so that a run can be cut in mid-epoch.
STEPS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
EPOCHS = {"num_train_epochs": 12}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(folder, **STEPS)
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed by SIGKILL in mid-epoch, with two whole checkpoints at least."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    run = start(folder, **STEPS, save_total_limit=10)
    signal_after(run, folder, 8, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL and not (folder / "model.safetensors").exists()
    return folder


@pytest.fixture
def interrupted(cut: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(cut, tmp_path / "run")
    for path in sorted(cut.glob("checkpoints/checkpoint-*"), key=lambda path: path.stat().st_mtime_ns):
        os.utime(folder / "checkpoints" / path.name, ns=(path.stat().st_mtime_ns,) * 2)
    return folder


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.slow
def test_a_run_that_was_killed_in_mid_epoch_goes_on_to_the_same_weights(whole: Path, interrupted: Path) -> None:
    finish(interrupted, **STEPS, save_total_limit=10, resume_from_checkpoint="true")
    assert_equal_systems(interrupted, whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_exits_and_a_requeued_run_ends_with_the_same_weights(tmp_path: Path, processes: int) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    options = EPOCHS | {"per_device_train_batch_size": 8 // processes, "metric_for_best_model": "kl"}
    finish(whole, processes, **options)
    run = start(folder, processes, **options, resume_from_checkpoint="true")
    printed = signal_after(run, folder, 6, signal.SIGTERM)
    assert run.returncode == (143 if processes == 1 else 1), printed[-2000:]  # torchrun's own
    assert "starts afresh" in printed and printed.count("SIGTERM: the state after step") == 1
    assert not (folder / "model.safetensors").exists() and newest(folder).name != "checkpoint-72"
    # Where it stopped is what the machine's load makes of it, perhaps at the best epoch, whose weights are kept.
    stopped = json.loads((newest(folder) / "trainer_state.json").read_text())["global_step"]
    finish(folder, processes, **options, resume_from_checkpoint="true")
    assert_equal_systems(folder, whole)
    assert [entry["step"] for entry in json.loads((folder / "training_log.json").read_text())][-1] == 72 > stopped


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated weights", "no state", "no manifest"])
def test_a_damaged_newest_checkpoint_is_left_for_the_one_before_it(
    damage: str, whole: Path, interrupted: Path
) -> None:
    broken = newest(interrupted)
    if damage == "truncated weights":
        path = broken / "trained.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    else:
        (broken / {"no state": "trainer_state.json", "no manifest": "sailer_checkpoint.json"}[damage]).unlink()
    printed = finish(interrupted, **STEPS, save_total_limit=10, resume_from_checkpoint="true")
    assert f"{broken.name} is half-written" in printed and "going back to the one before it" in printed
    assert_equal_systems(interrupted, whole)


@pytest.mark.slow
def test_another_run_is_refused_with_what_differs(interrupted: Path, capsys: pytest.CaptureFixture) -> None:
    def error(**options: object) -> str:
        given = STEPS | {"resume_from_checkpoint": "true"} | options
        assert main(["train", *arguments(interrupted, **given)]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "what differs: seed (0 there, 7 here)." in error(seed=7)
    assert "what differs: learning_rate" in error(learning_rate=0.1)
    assert "corpus_options" in error(corpus_options="{train_clips: 50, validation_clips: 12, speakers: 6}")
    path = newest(interrupted)
    assert f"{path} is half-written" not in error(seed=7, resume_from_checkpoint=path)
    assert "is not there" in error(resume_from_checkpoint=path.with_name("checkpoint-999"))
    (path / "optimizer.pt").unlink()
    assert "has no optimizer.pt" in error()


@pytest.mark.slow
def test_what_is_logged_may_change_and_the_weights_do_not(interrupted: Path, whole: Path) -> None:
    last = int(newest(interrupted).name.rpartition("-")[2])
    changed = {"logging_strategy": "steps", "logging_steps": 1, "save_steps": 4}
    printed = finish(interrupted, **STEPS | changed, save_total_limit=10, resume_from_checkpoint="true")
    assert_equal_systems(interrupted, whole)
    log = json.loads((interrupted / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry and entry["step"] > last] == [*range(last + 1, 19)]
    assert printed.count(": loss ") >= 18 - last


@pytest.mark.slow
def test_a_checkpoint_has_no_frozen_weights_and_the_result_has_all(interrupted: Path, whole: Path) -> None:
    kept = load_file(newest(interrupted) / "trained.safetensors")
    everything = weights(whole)
    trained = {name for name in everything if "_encoder." not in name and "speaker_reference" not in name}
    assert trained <= set(kept) < set(everything)  # the mean voice is learned at the end
    assert [name for name in kept if "running_var" in name]
    assert not (newest(interrupted) / "model.safetensors").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """In mid-run no file may be as large as the optimizer's state: the system refuses to write, as on a full disk."""
    folder = tmp_path / "run"
    options = STEPS | {"num_train_epochs": 12}
    run = start(folder, **options)
    largest = wait_for(run, folder, 4).joinpath("optimizer.pt").stat().st_size
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (largest - 1, resource.RLIM_INFINITY))
    printed = run.communicate(timeout=240)[0]
    assert run.returncode == 2, printed[-2000:]
    assert "could not be written" in printed and "The last whole one is kept" in printed
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert newest(folder).name in names and ".partial" not in names and damage_of(newest(folder)) is None
    finish(folder, **options, resume_from_checkpoint="true")
    assert json.loads((folder / "metrics.json").read_text())["validation"]["clips"] == 12
