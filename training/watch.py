"""Training processes that watch each other: when one dies the others end at once, and say which it was."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch.distributed import PrefixStore, rendezvous

from sailer.data.team import SILENCE_SECONDS, TeamError, runs

BEAT_SECONDS = 1.0
# After one has died: so long the others may take to fail by themselves, before they are ended where they wait for it.
GRACE_SECONDS = 5.0


class Watch:
    """Signs of life of the training processes in their store (the one that torchrun or the first of them holds).

    As a context it ends this process when another has died, failed or fallen silent: with a `TeamError` where an
    operation that they share fails, or with exit status 1 where it would wait for ever, as it does on GPUs.

    Args:
        index: this process, from 0.
        size: how many there are; 1 watches nothing.
    """

    _started: ClassVar[int] = 0

    def __init__(self, index: int = 0, size: int = 1) -> None:
        self.index, self.size = index, size
        self.verdict: str | None = None
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._hosts: set[str] = set()
        self._said: Counter[str] = Counter()

    @classmethod
    def of_this_run(cls) -> Watch:
        """The processes that train together; they call this together."""
        state = PartialState()
        return cls(state.process_index, state.num_processes)

    def __enter__(self) -> Watch:
        if self.size > 1:
            Watch._started += 1  # a process may train several systems, one after the other
            store, _, _ = next(rendezvous("env://"))
            self._store: Any = PrefixStore(f"sailer-watch-{Watch._started}", store)
            self._beat(0)
            self._threads = [threading.Thread(target=self._work, daemon=True)]
            self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        if error is not None and _may_be_anothers(error):
            # Another's death is told within a beat of this machine's processes, and after a silence of others.
            limit = GRACE_SECONDS + (SILENCE_SECONDS if len(self._hosts) > 1 else 0)
            end = time.monotonic() + limit
            while self.verdict is None and time.monotonic() < end:
                time.sleep(0.05)
        self._stopped.set()
        self._threads[0].join()
        if self.verdict is not None:
            raise TeamError(self.verdict) from error
        failed = isinstance(error, Exception)
        try:
            self._store.set(f"{self.index}.{'failed' if failed else 'ended'}", f"{type(error).__name__}: {error}")
            while self.index == 0 and not failed and not self._have_ended():  # the store may end with this process
                time.sleep(0.05)
        except RuntimeError:
            if error is None:  # the first one holds the store, and need not wait for those that are through
                return

    def agree(self, name: str, value: str) -> list[str]:
        """What each process says under a name, in their order; waits for all, however long that takes.

        What is said again under a name is waited for again.
        """
        if self.size == 1:
            return [value]
        self._said[name] += 1
        keys = [f"{index}.{name}.{self._said[name]}" for index in range(self.size)]
        self._store.set(keys[self.index], value)
        while not self._store.check(keys):
            if self.verdict is not None:
                raise TeamError(self.verdict)
            time.sleep(0.05)
        return [self._store.get(key).decode() for key in keys]

    def _have_ended(self) -> bool:
        others = [index for index in range(self.size) if index != self.index]
        if all(self._store.check([f"{index}.ended"]) for index in others):
            return True
        return self._look({}) is not None  # nobody waits for the dead

    def _beat(self, number: int) -> None:
        self._store.set(f"{self.index}.alive", f"{socket.gethostname()} {os.getpid()} {number}")

    def _work(self) -> None:
        number, seen = 0, dict[int, tuple[str, float]]()
        while not self._stopped.wait(BEAT_SECONDS):
            number += 1
            try:
                self._beat(number)
                self.verdict = self._look(seen)
            except RuntimeError:  # no store
                self.verdict = "Process 0, or the launcher that holds the processes' store, died."
            if self.verdict is not None and not self._stopped.wait(GRACE_SECONDS + 2 * BEAT_SECONDS):
                print(f"error: {self.verdict}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread waits for the other, and can be told nothing

    def _look(self, seen: dict[int, tuple[str, float]]) -> str | None:
        """Who died or failed, as a sentence; `seen` holds what each last said, and when that was new."""
        for index in range(self.size):
            if index == self.index or not self._store.check([f"{index}.alive"]):
                continue
            said, now = self._store.get(f"{index}.alive").decode(), time.monotonic()
            host, pid, _ = said.split()
            self._hosts |= {host, socket.gethostname()}
            here = host == socket.gethostname()
            if said != seen.get(index, ("", now))[0]:
                seen[index] = said, now
            is_gone = here and not runs(pid)
            silent = not here and now - seen.get(index, ("", now))[1] > SILENCE_SECONDS
            if self._store.check([f"{index}.failed"]):
                return f"Process {index} ({host}, pid {pid}) failed: {self._store.get(f'{index}.failed').decode()}"
            if (is_gone or silent) and not self._store.check([f"{index}.ended"]):
                return (
                    f"Process {index} ({host}, pid {pid}) died{' or fell silent' * silent}. Start the run again with "
                    "--resume_from_checkpoint true: it goes on from its last checkpoint."
                )
        return None


def _may_be_anothers(error: BaseException | None) -> bool:
    """Whether an error may come of another process' end: what torch raises of its groups are RuntimeErrors."""
    while error is not None:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
