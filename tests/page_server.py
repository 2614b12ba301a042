"""`sailer page` as a process of its own, for tests that visit it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running_page(*words: str | Path, cwd: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """The page's address and process; it ends, by Ctrl+C, with the block."""
    command = [sys.executable, "-m", "sailer.cli", "page", *map(str, words), "--port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(cwd)}
    log = cwd / "page.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        line = process.stdout.readline()
        match = re.search(r"http://\S+", line)
        assert match, f"{line!r}; {log.read_text()}"
        yield match[0], process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
