"""Processes that work together and wait for each other by files, however long it takes; one that dies is named."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil

from sailer.data.atomic import replacing

# A process of another machine is taken for dead when it has given no sign for so many seconds (it gives one every
# BEAT_SECONDS); where it never gave any, the machines share no folder.
BEAT_SECONDS, SILENCE_SECONDS, UNSEEN_SECONDS, POLL_SECONDS = 5.0, 45.0, 300.0, 0.2
# How long processes that are started together may take until all of them run.
START_SECONDS = 1800


class TeamError(ConnectionError, RuntimeError):
    """Another process of the team failed or died; the message says which, and why."""


@dataclass(frozen=True)
class Team:
    """Processes that work together and wait for each other by files in a folder that they share.

    Args:
        index: this process, from 0.
        size: how many there are.
        token: a name for this run, the same in all of them and new every time.
    """

    index: int = 0
    size: int = 1
    token: str = ""

    @classmethod
    def of_this_run(cls, per_machine: bool) -> Team:
        """The training processes, or those of each machine; they call this together."""
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        state = PartialState()
        if state.num_processes == 1:
            return cls()
        token = broadcast_object_list([uuid.uuid4().hex])[0]
        if per_machine:
            size = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
            return cls(state.local_process_index, size, token)
        return cls(state.process_index, state.num_processes, token)

    @classmethod
    def of_this_launch(cls) -> Team:
        """The processes that torchrun or `accelerate launch` started, which need not train; they call this together.

        Raises:
            TeamError: they do not find each other.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from torch.distributed import rendezvous

        try:
            limit = timedelta(seconds=START_SECONDS)
            store, rank, size = next(rendezvous("env://", timeout=limit))
            if rank == 0:
                store.set("sailer-token", uuid.uuid4().hex)
            token = store.get("sailer-token").decode()
            store.add("sailer-token-read", 1)
            while rank == 0 and store.add("sailer-token-read", 0) < size:  # it may hold the store, which ends with it
                time.sleep(POLL_SECONDS)
        except (RuntimeError, ValueError) as error:
            raise TeamError(
                f"The {os.environ['WORLD_SIZE']} processes that were started together do not find each other "
                f"({str(error).splitlines()[0]}): start them with torchrun or accelerate launch."
            ) from error
        return cls(rank, size, token)

    @contextmanager
    def at_work(self, folder: Path) -> Iterator[None]:
        """Gives signs of life while the block runs, and tells the others if it fails."""
        if self.size == 1:
            yield
            return
        room = self._room(folder)
        room.mkdir(parents=True, exist_ok=True)
        own, stopped = room / f"{self.index}.alive", threading.Event()
        self._write(own, f"{socket.gethostname()} {os.getpid()}")  # whole at once: others read it

        def beat() -> None:
            while not stopped.wait(BEAT_SECONDS):
                try:
                    os.utime(own)
                except FileNotFoundError:  # all are through, and the first has cleared up
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            self._write(room / f"{self.index}.failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            stopped.set()
            thread.join()

    def tell(self, folder: Path, stage: str) -> None:
        """Say that this process is through with a stage."""
        if self.size > 1:
            self._write(self._room(folder) / f"{self.index}.{stage}", "")

    def wait(self, folder: Path, stage: str, only: int | None = None) -> None:
        """Wait until every process, or `only` that one, is through with a stage.

        Raises:
            TeamError: one of them failed or is dead; the message says which, and why.
        """
        room, started = self._room(folder), time.monotonic()
        waited_for = range(self.size) if only is None else [only]
        for index in waited_for if self.size > 1 else ():
            while not (room / f"{index}.{stage}").exists():
                self._check(room, index, time.monotonic() - started)
                time.sleep(POLL_SECONDS)

    def close(self, folder: Path) -> None:
        """Remove the files by which the processes waited; for the first process, when none waits any more."""
        shutil.rmtree(self._room(folder), ignore_errors=True)

    def _room(self, folder: Path) -> Path:
        return folder / f".{self.token}"

    def _write(self, path: Path, text: str) -> None:
        with replacing(path) as beside:
            beside.write_text(text)

    def _check(self, room: Path, index: int, waited: float) -> None:
        failed, alive = room / f"{index}.failed", room / f"{index}.alive"
        if failed.exists():
            raise TeamError(f"Process {index} failed: {failed.read_text()}")
        try:
            host, _, pid = alive.read_text().partition(" ")
            # By the folder's own clock, which may be another machine's.
            silent = (room / f"{self.index}.alive").stat().st_mtime - alive.stat().st_mtime
        except FileNotFoundError:
            if waited > UNSEEN_SECONDS:
                raise TeamError(
                    f"Process {index} gave no sign in {room.parent} for {waited:.0f} s: with several machines that "
                    "must be a folder that all of them share (feature_cache_dir, or where --output goes)."
                ) from None
            return
        here = host == socket.gethostname()
        if (here and not runs(pid)) or (not here and silent > SILENCE_SECONDS):
            raise TeamError(
                f"Process {index} ({host}, pid {pid}) died in the middle of its share of the work. What is finished "
                f"is kept in {room.parent}: start the run again, and it goes on from there."
            )


def runs(pid: str) -> bool:
    """Whether a process of this machine runs; one that has ended and whose parent has not looked does not."""
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return False
