"""Tensors by name, in memory or as safetensors in a folder that several processes fill together."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sailer.data.atomic import replacing
from sailer.data.team import Team, runs

logger = logging.getLogger(__name__)

# A pass that is cut short loses at most this much: finished shards are found again.
SHARD_BYTES = 2**28
PREFIX = "states-"
SHARED_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
CGROUPS = Path("/sys/fs/cgroup")


class Shelf:
    """Tensors by name. In a folder they are in files whose names hold their checksums: a damaged one is put away.

    Args:
        folder: where; None for memory, which several processes of a machine share.
        dtype: of the tensors.
        team: processes that fill the shelf together.
    """

    def __init__(self, folder: Path | None, dtype: torch.dtype, team: Team | None = None) -> None:
        self.team, self.dtype = team or Team(), dtype
        self.in_memory = folder is None
        if folder is None and self.team.size > 1:
            _sweep(SHARED_MEMORY)
            folder = SHARED_MEMORY / f"sailer-{self.team.token}"
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._tensors: dict[str, torch.Tensor] = {}
        self._files: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name] if name in self._tensors else self._files[name].get_tensor(name)

    def __getstate__(self) -> dict[str, Any]:
        if self.in_memory and self.folder is not None:
            raise ValueError(
                "Features that processes share in memory cannot be sent to spawned workers: set cache_features to "
                "disk, or leave dataloader_multiprocessing_context out."
            )
        return {**self.__dict__, "_files": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Find what is there, sound, before the block, and what all processes added after it."""
        if self.folder is None:
            yield
            return
        with self.team.at_work(self.folder):
            self._put_damaged_away()
            self._together("checked")
            yield
            self._together("filled")
            self.team.tell(self.folder, "opened")
            if self.team.index == 0:
                self.team.wait(self.folder, "opened")
        if self.team.size > 1 and self.team.index == 0:
            self.team.close(self.folder)
            if self.in_memory:  # what is open stays until the last process is gone, however it ends
                shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """Keep the tensors of all batches."""
        pending: dict[str, torch.Tensor] = {}
        for tensors in batches:
            pending |= tensors
            if self.folder is not None and sum(tensor.nbytes for tensor in pending.values()) >= SHARD_BYTES:
                self._write(self.folder, pending)
                pending = {}
        if self.folder is None:
            self._tensors |= pending
        elif pending:
            self._write(self.folder, pending)

    def free(self) -> tuple[str, int]:
        """Where the tensors go, and how many bytes of room there are."""
        if not self.in_memory and self.folder is not None:
            return str(self.folder), shutil.disk_usage(self.folder).free
        room = available_memory()
        if self.folder is not None:
            room = min(room, shutil.disk_usage(self.folder).free)
        return "memory", room

    def _together(self, stage: str) -> None:
        assert self.folder is not None
        self.team.tell(self.folder, stage)
        self.team.wait(self.folder, stage)
        self._open()

    def _write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        content = save(dict(tensors))
        with replacing(folder / f"{PREFIX}{checksum(content)}.safetensors") as beside:
            beside.write_bytes(content)

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob(f"{PREFIX}*.safetensors")) if self.folder is not None else []

    def _put_damaged_away(self) -> None:
        for shard in self._shards()[self.team.index :: self.team.size]:
            with shard.open("rb") as file:
                sound = hashlib.file_digest(file, _blake).hexdigest() == shard.stem.removeprefix(PREFIX)
            if not sound:
                logger.warning("%s is damaged (its checksum is another): what it held is encoded again.", shard)
                shard.unlink()

    def _open(self) -> None:
        self._files = {}
        for shard in self._shards():
            try:
                opened = safe_open(shard, framework="pt")
            except FileNotFoundError:
                continue  # damaged, and just put away by the process whose share it is
            except SafetensorError as error:
                raise ValueError(
                    f"{shard} cannot be read ({error}): delete it, and its clips are encoded again."
                ) from error
            self._files |= dict.fromkeys(opened.keys(), opened)


def available_memory() -> int:
    """Bytes that this machine's processes may still take: what is free of it, or of the container's limit."""
    return max(0, min([psutil.virtual_memory().available, *_left_of_limits(CGROUPS)]))


def checksum(content: bytes) -> str:
    """A digest of a file's content, as `Shelf` names its files by."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def readable(size: float) -> str:
    """Bytes as "1.23 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _blake() -> Any:
    return hashlib.blake2b(digest_size=16)


def _sweep(place: Path) -> None:
    """Free the memory of runs that were killed while they filled it."""
    for folder in place.glob("sailer-*"):
        try:
            pids = [path.read_text().split()[-1] for path in folder.glob(".*/[0-9]*.alive")]
        except (OSError, IndexError):  # a run that begins or ends just now
            continue
        if pids and not any(map(runs, pids)):
            shutil.rmtree(folder, ignore_errors=True)


def _left_of_limits(root: Path) -> Iterator[int]:
    """Of each control group (version 2 or 1) that this process is in: its limit less what is used for good."""
    names = {"": ("memory.max", "memory.current", "inactive_file")}
    names["memory"] = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    paths = {"": "/", "memory": "/"}
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                paths["memory" if controllers else ""] = path
    except OSError:
        pass
    for kind, (limit, usage, cached) in names.items():
        top = root / kind
        place = top / paths[kind].lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(top):
                break
            try:
                most, used = (int((group / name).read_text()) for name in (limit, usage))
                lines = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # no such group here, or "max"
                continue
            reclaimable = sum(int(line.split()[1]) for line in lines if line.split()[0] == cached)
            yield most - used + reclaimable
