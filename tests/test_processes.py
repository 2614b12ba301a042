"""Training by several processes: one system, one reading of the corpus, and news of whoever dies.

The processes are those of torchrun, or started by hand as Slurm starts them: nobody else then ends the survivor.
"""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

from sailer.data.schema import CorpusError
from sailer.data.sharing import read_once
from sailer.data.team import Team, TeamError
from sailer.training import watch as watch_module
from sailer.training.checks import check_same_corpus
from sailer.training.throughput import Throughput
from sailer.training.trainer import has_parts_left_out
from sailer.training.watch import Watch

from .test_features import clips

OPTIONS = {
    "corpus_options": "{train_clips: 32, validation_clips: 10, test_clips_per_class: 1, speakers: 6}",
    "audio_backbone": "tiny-whisper",
    "text_backbone": "tiny-text",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "shuffled_label_baseline": "false",
    "disable_tqdm": "true",
}
KEPT = {"freeze_audio": "true", "freeze_text": "true", "augmentation_variants": 1, "cache_features": "disk"}

# Runs `sailer train` in a process that counts what it reads and makes and, as process 1, kills itself in a method.
TRAIN = """
import os, signal, sys, time
from pathlib import Path
import sailer.modeling_sailer, sailer.train, sailer.training.tiny_backbones, sailer.training.trainer
from sailer.cli import main

place, where = Path(sys.argv[1]), sys.argv[2]
read = sailer.train.read_corpus

def counted(*arguments):
    (place / f"read-{os.getpid()}").touch()
    return read(*arguments)

def die(*arguments, **options):
    (place / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)

TINY = sailer.training.tiny_backbones.TINY
make = TINY["tiny-whisper"]

def made(folder, **options):
    time.sleep(2)  # long enough for one that does not wait
    (place / f"made-{os.environ['RANK']}-{len(list(place.glob('made-*')))}").touch()
    return make(folder, **options)

sailer.train.read_corpus, TINY["tiny-whisper"] = counted, made
if where != "nowhere" and os.environ["RANK"] == "1":
    owner, name = {
        "keeping": (sailer.modeling_sailer.SailerModel, "audio_hidden_states"),
        "training": (sailer.training.trainer.SailerTrainer, "compute_loss"),
    }[where]
    setattr(owner, name, die)
sys.exit(main(["train", "demo", *sys.argv[3:]]))
"""


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(rank: int, port: str, command: list[str], **more: str) -> subprocess.Popen:
    """One of two processes on one machine, as a scheduler starts it, with more in its environment."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
    environment = os.environ | {name: str(value) for name, value in place.items()} | more
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def train_command(folder: Path, where: str, **options: object) -> list[str]:
    given = OPTIONS | {"output_dir": folder / "out"} | options
    return ["-c", TRAIN, str(folder), where, *(f"--{name}={value}" for name, value in given.items())]


@pytest.mark.slow
def test_torchrun_without_a_gpu_trains_one_system_and_reads_the_corpus_once(tmp_path: Path) -> None:
    script = tmp_path / "count.py"
    script.write_text(TRAIN)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(script), *train_command(tmp_path, "nowhere", shuffled_label_baseline="true")[2:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("read-*"))) == 1
    # The system's backbone and its baseline's.
    assert sorted(path.name for path in tmp_path.glob("made-*")) == ["made-0-0", "made-0-1"]
    assert "find_unused_parameters" not in done.stderr and "parallel_mode" not in done.stderr
    assert done.stdout.count("The system, its card and its figures are in") == 1
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["validation"]["clips"] == 10
    told = re.search(r"Trained on 32 clips in .* clips/s; peak memory of each of 2 processes at most", done.stdout)
    assert told and done.stdout.count("Trained on") == 2  # and the baseline
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "launcher"),
    [("keeping", {}), ("training", {}), ("training", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})],
)
def test_when_a_process_is_killed_the_other_ends_within_a_minute_and_names_it(
    tmp_path: Path, where: str, launcher: dict[str, str]
) -> None:
    port, kept = free_port(), KEPT if where == "keeping" else {}
    processes = [start(rank, port, train_command(tmp_path, where, **kept), **launcher) for rank in range(2)]
    end = time.monotonic() + 300
    while not (tmp_path / "died").exists():
        assert time.monotonic() < end and processes[0].poll() is None, processes[0].communicate()[0][-3000:]
        time.sleep(0.1)
    printed, _ = processes[0].communicate(timeout=60)
    assert processes[1].wait() == -signal.SIGKILL
    assert processes[0].returncode in (1, 2)
    assert re.search(rf"error: Process 1 \(\S+, pid {processes[1].pid}\) died", printed), printed[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "last", "status", "told"),
    [
        ("dies", 60, 1, r"error: Process 1 \(.*\) died"),
        ("fails", 60, 1, r"error: Process 1 \(.*\) failed: ValueError: no such clip"),
        ("ends", 0, 0, "through"),
    ],
)
def test_a_process_that_waits_for_ever_is_ended_when_another_dies_or_fails(
    event: str, last: int, status: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(watch_module, "GRACE_SECONDS", 1.0)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    def work(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        sys.stdout = sys.stderr = (tmp_path / str(rank)).open("w")
        with Watch(rank, 2) as watch:
            print(watch.agree("said", "ab"[rank]), flush=True)
            time.sleep(rank)
            print(watch.agree("said", "cd"[rank]), flush=True)
            if rank == 1 and event == "dies":
                os._exit(9)
            if rank == 1 and event == "fails":
                raise ValueError("no such clip")
            time.sleep(last)
        print("through", flush=True)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    started = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    printed = (tmp_path / "0").read_text()
    assert processes[0].exitcode == status and re.search(told, printed), printed
    assert "['a', 'b']\n['c', 'd']" in printed and time.monotonic() - started < 59


class Others:
    """What other processes say."""

    size, index = 2, 0

    def __init__(self, change: dict) -> None:
        self.change = change

    def agree(self, name: str, value: str) -> list[str]:
        return [value, json.dumps(json.loads(value) | self.change)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"host": "b", "digest": "x", "clips": {"train": 5}},
            r"Process 1 \(b\) .* sees \{'train': 5\} clips, and p",
        ),
        ({"host": "b", "digest": "x"}, r"Process 1 \(b\) .* as many clips as process 0, but"),
    ],
)
def test_processes_that_see_other_files_are_told_of(tmp_path: Path, change: dict, told: str) -> None:
    corpus = {"train": clips(tmp_path, 4, "train", 0)}
    check_same_corpus(corpus, Others({"host": "b"}))
    check_same_corpus(corpus, Watch())
    with pytest.raises(CorpusError, match=told):
        check_same_corpus(corpus, Others(change))


def test_a_corpus_that_cannot_be_read_is_told_to_those_who_wait(tmp_path: Path) -> None:
    def fail() -> None:
        raise CorpusError("no such folder")

    with pytest.raises(CorpusError, match="no such folder"):
        read_once(fail, tmp_path, Team(0, 2, "run"))
    with pytest.raises(TeamError, match="Process 0 failed: CorpusError: no such folder"):
        read_once(fail, tmp_path, Team(1, 2, "run"))


def test_a_process_that_is_there_before_the_one_that_reads_is_waited_for(tmp_path: Path) -> None:
    rows = DatasetDict({"train": Dataset.from_dict({"id": ["a", "b"]})})
    (tmp_path / f"{socket.gethostname()}-killed").mkdir()
    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(read_once, lambda: None, tmp_path, Team(1, 2, "run"))
        while not list(tmp_path.glob("*-run/.run/1.alive")):
            time.sleep(0.01)
        there: list[Path] = []
        read = lambda: there.extend(tmp_path.glob("*-run/.run/1.alive")) or rows  # noqa: E731
        first = pool.submit(read_once, read, tmp_path, Team(0, 2, "run"))
        for corpus, _ in (first.result(60), second.result(60)):
            assert corpus["train"]["id"][:] == ["a", "b"]
    assert there, "what it had begun was deleted with the rest of a run that was killed"
    assert [path.name for path in tmp_path.iterdir()] == [f"{socket.gethostname()}-run"]


def test_a_process_that_is_alone_writes_no_copy(tmp_path: Path) -> None:
    corpus = {"train": clips(tmp_path, 4, "train", 0)}
    assert read_once(lambda: corpus, tmp_path / "rows", Team()) == (corpus, None)
    assert not (tmp_path / "rows").exists()


def test_weights_that_a_step_leaves_out_are_looked_for_only_where_there_can_be_some(
    tiny_sailer: Path, tiny_wavlm: Path
) -> None:
    from sailer import SailerForAudioClassification

    assert not has_parts_left_out(SailerForAudioClassification.from_pretrained(tiny_sailer))
    for changed, left_out in (({}, False), ({"layerdrop": 0.1}, True), ({"mask_time_prob": 0.0}, True)):
        for freeze in (True, False):
            model = SailerForAudioClassification.from_audio_text_pretrained(tiny_wavlm, freeze_audio=freeze)
            for name, value in changed.items():
                setattr(model.sailer.audio_encoder.config, name, value)
            assert has_parts_left_out(model) == (left_out and not freeze), (changed, freeze)


def test_clips_a_second_leave_evaluations_out() -> None:
    throughput = Throughput(torch.device("cpu"))
    with throughput.paused():
        time.sleep(1.5)
    throughput.clips = 10

    class Alone:
        num_processes = 1

    told = throughput.told(Alone())
    rate = float(re.search(r"Trained on 10 clips in [\d.]+ s .* ([\d.]+) clips/s; peak memory [\d.]+ [MG]B", told)[1])
    assert rate > 7, "a second and a half of waiting would make it less"
    assert throughput.peak_bytes() > 1e8
