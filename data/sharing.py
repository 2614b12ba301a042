"""A corpus that one process of a machine reads, and the others map into their memory."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sailer.data.team import Team

if TYPE_CHECKING:
    from datasets import DatasetDict

ROWS = "rows"


def read_once(read: Callable[[], DatasetDict], folder: Path, team: Team) -> tuple[DatasetDict, Path | None]:
    """What `read` returns, called by one process of the team.

    It writes the rows as Arrow, which every process of the team then maps: the machine holds them once. Recordings
    whose bytes are in the rows are copied; those of which the rows hold paths are not.

    Args:
        read: reads the corpus.
        folder: where the rows are written, below a folder of this machine and run.
        team: the processes of this machine.

    Returns:
        The corpus, and the folder of its rows, to be deleted by the first process when the run ends; None for a
        process that is alone, which writes nothing.

    Raises:
        TeamError: the process that reads failed or died.
    """
    if team.size == 1:
        return read(), None
    from datasets import load_from_disk

    from sailer.data.sampler import without_progress_bars

    host = socket.gethostname()
    place = folder / f"{host}-{team.token}"
    if team.index == 0:
        for left in {*folder.glob(f"{host}-*")} - {place}:  # of a run that was killed; here another may have begun
            shutil.rmtree(left, ignore_errors=True)
    with team.at_work(place):
        if team.index == 0:
            corpus = read()
            with without_progress_bars():
                corpus.save_to_disk(place / ROWS)
            team.tell(place, "read")
        else:
            team.wait(place, "read", only=0)
        corpus = load_from_disk(place / ROWS)
        team.tell(place, "opened")
        if team.index == 0:
            team.wait(place, "opened")
    if team.index == 0:
        team.close(place)
    return corpus, place
