"""Processes that keep states together: half the work each, one copy, no time limit, and news of whoever ends early."""

import multiprocessing
import os
import pickle
import re
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.data import team as team_module
from sailer.data.team import Team, TeamError
from sailer.training import shelf as shelf_module
from sailer.training.features import FeatureStore

from .test_features import clips, collator, count_calls, planned


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return clips(folder, 12, "train", 0), clips(folder, 5, "test", 1)


@pytest.fixture(scope="module")
def system(tiny_sailer):
    return SailerForAudioClassification.from_pretrained(tiny_sailer), SailerProcessor.from_pretrained(tiny_sailer)


def together(work, size=2):
    """What each of several processes returns of `work(index)`, or the error that it fails with."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run(index):
        torch.set_num_threads(1)
        try:
            queue.put((index, work(index)))
        except Exception as error:
            queue.put((index, error))

    processes = [context.Process(target=run, args=(index,)) for index in range(size)]
    for process in processes:
        process.start()
    return processes, queue


@pytest.mark.parametrize("on_disk", [False, True])
def test_two_processes_encode_half_each(system, corpus, tmp_path, monkeypatch, on_disk):
    model, processor = system
    monkeypatch.setattr(shelf_module, "SHARED_MEMORY", tmp_path / "memory")
    train, folder = planned(corpus[0]), tmp_path / "disk" if on_disk else None
    wanted = len(train.renderings()) + 5

    def work(index):
        seen = count_calls(monkeypatch, model)
        team = Team(index, 2, "run")
        store = FeatureStore.build(model, collator(processor), [train, corpus[1]], folder=folder, team=team)
        batch = collator(processor, store)([train[0], train[7], *corpus[1]])
        return seen, {name: value.numpy() for name, value in batch.items()}

    processes, queue = together(work)
    results = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert sorted(results[index][0]["audio"] for index in range(2)) == [wanted // 2, wanted - wanted // 2]
    alone = FeatureStore.build(model, collator(processor), [train, corpus[1]])
    expected = collator(processor, alone)([train[0], train[7], *corpus[1]])
    for _, batch in results.values():
        for name, value in expected.items():
            np.testing.assert_allclose(batch[name], value, atol=1e-5)
    # In memory it is held once, and gone with the processes; on disk no file is left that they waited by.
    left = [path.name for path in (tmp_path / ("disk" if on_disk else "memory")).iterdir()]
    assert all(name.startswith("states-") for name in left) and bool(left) == on_disk


@pytest.mark.parametrize(
    ("end", "message"), [("dies", "Process 1 .* died in the middle"), ("fails", "KeyError: 'why'")]
)
def test_a_process_that_ends_early_is_told_of(system, corpus, tmp_path, monkeypatch, end, message):
    model, processor = system

    def work(index):
        def stop(*inputs):
            if end == "dies":
                os._exit(9)
            raise KeyError("why")

        if index == 1:
            monkeypatch.setattr(model.sailer, "audio_hidden_states", stop)
        FeatureStore.build(model, collator(processor), [corpus[1]], folder=tmp_path, team=Team(index, 2, "run"))

    processes, queue = together(work)
    results = dict(queue.get(timeout=60) for _ in range(2 if end == "fails" else 1))
    for process in processes:
        process.join()
    assert isinstance(results[0], TeamError) and re.search(message, str(results[0]))


def test_machines_that_share_no_folder_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(team_module, "UNSEEN_SECONDS", 0.3)
    team = Team(0, 2, "run")
    shared = r"Process 1 gave no sign in .*that must be a folder that all of them share"
    with pytest.raises(TeamError, match=shared), team.at_work(tmp_path):
        team.tell(tmp_path, "filled")
        team.wait(tmp_path, "filled")


@pytest.mark.slow
def test_waiting_has_no_limit_where_there_are_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(team_module, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(team_module, "BEAT_SECONDS", 0.05)
    teams = [Team(index, 2, "run") for index in range(2)]

    def slow():
        with teams[1].at_work(tmp_path):
            time.sleep(1.5)
            teams[1].tell(tmp_path, "filled")

    thread = threading.Thread(target=slow)
    thread.start()
    started = time.monotonic()
    with teams[0].at_work(tmp_path):
        teams[0].tell(tmp_path, "filled")
        teams[0].wait(tmp_path, "filled")
    assert time.monotonic() - started > 1
    thread.join()


def test_the_memory_of_runs_that_were_killed_is_freed(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf_module, "SHARED_MEMORY", tmp_path)
    for name, pid in (("dead", 2**22 + 1), ("alive", os.getpid())):
        (tmp_path / f"sailer-{name}" / ".run").mkdir(parents=True)
        (tmp_path / f"sailer-{name}" / ".run" / "0.alive").write_text(f"host {pid}")
    shelf_module.Shelf(None, torch.float32, Team(0, 2, "new"))
    assert {path.name for path in tmp_path.iterdir()} == {"sailer-alive", "sailer-new"}


@pytest.mark.parametrize("sign", ["half-written", "just removed"])
def test_a_run_that_begins_or_ends_meanwhile_keeps_its_memory_and_stops_no_other(tmp_path, monkeypatch, sign):
    monkeypatch.setattr(shelf_module, "SHARED_MEMORY", tmp_path)
    alive = tmp_path / "sailer-other" / ".token" / "0.alive"
    alive.parent.mkdir(parents=True)
    if sign == "half-written":
        alive.touch()
    else:  # seen, and gone when it is read
        alive.symlink_to("nowhere")
    shelf_module.Shelf(None, torch.float16, Team(0, 2, "own"))
    assert alive.parent.is_dir()


def test_a_sign_of_life_is_there_whole(tmp_path):
    team, path, seen = Team(0, 2, "token"), tmp_path / ".token" / "0.alive", set()
    stopped = threading.Event()

    def look() -> None:
        while not stopped.is_set():
            if path.exists():
                seen.add(path.read_text())

    looking = threading.Thread(target=look)
    looking.start()
    for _ in range(100):
        with team.at_work(tmp_path):
            pass
    stopped.set()
    looking.join()
    assert len(seen) == 1 and seen.pop().endswith(f" {os.getpid()}")


def test_shared_memory_is_not_sent_to_spawned_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf_module, "SHARED_MEMORY", tmp_path)
    with pytest.raises(ValueError, match="set cache_features to disk"):
        pickle.dumps(shelf_module.Shelf(None, torch.float32, Team(0, 2, "run")))


@pytest.mark.parametrize("version", [1, 2])
def test_memory_is_what_the_container_may_use(tmp_path, monkeypatch, version):
    class Free:
        available = 8000

    monkeypatch.setattr(psutil, "virtual_memory", Free)
    monkeypatch.setattr(shelf_module, "CGROUPS", tmp_path)
    assert shelf_module.available_memory() == 8000
    group = tmp_path / "memory" if version == 1 else tmp_path
    group.mkdir(exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for name, value in zip(names, ("5000", "3000"), strict=True):
        (group / name).write_text(value)
    (group / "memory.stat").write_text("anon 1\ninactive_file 500\ntotal_inactive_file 500\n")
    assert shelf_module.available_memory() == 2500  # what of files is only cached is free
    (group / names[0]).write_text("max" if version == 2 else "9223372036854771712")
    assert shelf_module.available_memory() == 8000
