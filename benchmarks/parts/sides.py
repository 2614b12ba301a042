"""Sides of a benchmark: a process each, idle while another works; rounds take turns, and medians are compared."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Side:
    """A process that does one side's work when asked, and nothing otherwise."""

    def __init__(self, name: str, script: Path, folder: Path, python: Path | str = sys.executable) -> None:
        self.name, self.log = name, folder / f"{name.replace(' ', '_').replace('/', '_')}.log"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [str(python), str(script), "--worker", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            env=environment,
            text=True,
        )
        self._answer()  # ready
        self.start_up = time.perf_counter() - start

    def run(self, task: str) -> Any:
        """Seconds for a set of clips by its name, megabytes for "memory", what else the side gives for other tasks."""
        print(task, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


def take_turns(sides: dict[str, Side], task: str, rounds: int, warm_up: bool = False) -> dict[str, float]:
    """Median seconds of each side over rounds in which all take their turn."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + warm_up):
        for name, side in sides.items():
            seconds = side.run(task)
            if index >= warm_up:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}
