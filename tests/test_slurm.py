"""examples/accelerate/slurm.sh with stand-ins for srun and scontrol: Slurm itself was not to be had."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .test_sharding import OPTIONS, largest_difference

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "accelerate" / "slurm.sh"
SRUN = 'shift\nexec "$@"\n'  # its first word is an option
SCONTROL = """
if [ "$1" = show ]; then echo localhost; echo node2; fi
if [ "$1" = requeue ]; then echo "requeue $2, saved: $(ls {place} | grep -c saved)" >> {place}/asked; fi
"""
# Ends with the given status 1 s after SIGTERM, when it has saved, or by itself.
TORCHRUN = """
echo "$@" > {place}/arguments
trap 'sleep 1; touch {place}/saved; exit {on_signal}' TERM
touch {place}/started
for _ in $(seq {tenths}); do sleep 0.1; done
exit {at_end}
"""


def start(place: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    place.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL.format(place=place)}.items():
        (place / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (place / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    path = {"PATH": f"{place}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        cwd=SCRIPT.parents[2],
        env=os.environ | slurm | path | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, seconds: float, process: subprocess.Popen) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-3000:]
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("is_signalled", "on_signal", "at_end", "status", "asked"),
    [
        (True, 1, 0, 143, "requeue 7, saved: 1\n"),  # queued again, and not before its state is saved
        (True, 0, 0, 0, None),  # it was through when the signal came
        (False, 1, 0, 0, None),
        (False, 1, 3, 3, None),  # a run that fails is not tried for ever
    ],
)
def test_a_job_is_queued_again_when_the_signal_stopped_it(
    is_signalled: bool, on_signal: int, at_end: int, status: int, asked: str | None, tmp_path: Path
) -> None:
    text = TORCHRUN.format(place=tmp_path, on_signal=on_signal, at_end=at_end, tenths=300 if is_signalled else 1)
    (tmp_path / "torchrun").write_text(f"#!/usr/bin/env bash\n{text}")
    (tmp_path / "torchrun").chmod(0o755)
    job = start(tmp_path, "my_recipe", "--seed", "3")
    if is_signalled:
        wait_for(tmp_path / "started", 30, job)
        job.send_signal(signal.SIGTERM)  # to this script alone, as B:TERM does
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == status, printed
    assert ((tmp_path / "asked").read_text() if asked else None) == asked
    assert (tmp_path / "asked").exists() == bool(asked)
    nodes = "--nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_id 7 --rdzv_endpoint localhost:29500"
    expected = f"{nodes} train.py my_recipe --seed 3 --resume_from_checkpoint true"
    assert (tmp_path / "arguments").read_text().strip() == expected
    assert "#SBATCH --signal=B:TERM@120" in SCRIPT.read_text(), "without B: Slurm signals the steps alone"


@pytest.mark.slow
def test_a_job_that_was_queued_again_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs espeakng-loader (the demo extra)")
    given = OPTIONS | {"per_device_train_batch_size": 4, "num_train_epochs": 4}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "OMP_NUM_THREADS": "1", "MASTER_PORT": port}

    def run(name: str) -> subprocess.Popen:
        options = [f"--{key}={value}" for key, value in (given | {"output_dir": tmp_path / name}).items()]
        return start(tmp_path / "bin", "demo", *options, **environment)

    job = run("cut")
    checkpoints = tmp_path / "cut" / "checkpoints"
    while not list(checkpoints.glob("checkpoint-*")):
        wait_for(checkpoints, 200, job)
        time.sleep(0.05)
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=120)
    assert "is saved in" in printed and job.returncode == 143, printed[-3000:]
    assert (tmp_path / "bin" / "asked").read_text() == "requeue 7, saved: 0\n"
    for name in ("cut", "whole"):
        job = run(name)
        printed, _ = job.communicate(timeout=400)
        assert job.returncode == 0, printed[-3000:]
    assert largest_difference(tmp_path / "cut", tmp_path / "whole") < 1e-6
