"""An archive's parts, judged by actors of a Ray cluster through Ray Data; those of a node that dies once more."""

from __future__ import annotations

import logging
import os
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from sailer.inference.archive import Archive, PartJudge
from sailer.inference.outputs import PredictionError

logger = logging.getLogger(__name__)


class Actor:
    """Judges parts in a process of the cluster; Ray Data makes it and calls it with a row per part.

    Args:
        archive: an `Archive`, in Ray's object store.
        options: of `PartJudge`.
    """

    def __init__(self, archive: Any, options: dict[str, Any]) -> None:
        import ray

        self.archive: Archive = ray.get(archive)
        self.options = options
        self.judge: PartJudge | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A row per part: its number, its tables as Parquet files' bytes, and what went wrong, if anything did."""
        rows = [self._row(part) for part in batch["part"].to_pylist()]
        tables = {
            table: pa.array([row.get(table) for row in rows], pa.large_binary()) for table in self.archive.tables
        }
        errors = pa.array([row.get("failure") for row in rows], pa.string())
        return pa.table({"part": batch["part"], "failure": errors} | tables)

    def _row(self, part: int) -> dict[str, Any]:
        # An error that Ray saw would be tried again on every node, though it is the system's own.
        try:
            self.judge = self.judge or PartJudge(self.archive, **self.options)
            ((_, tables),) = self.judge.judge([part])
        except Exception as error:
            return {"failure": f"{type(error).__name__}: {error}"}
        return dict(tables)


def judge_by_ray(archive: Archive, *, actors: int | None = None, device: str | None = None, **options: Any) -> None:
    """Judge the parts that are missing on the Ray cluster that RAY_ADDRESS names, or on this machine.

    The parts come back to this process, which writes each as it comes. A node that dies takes nothing along but the
    time of its unfinished parts: these are judged again, by actors on the nodes that are left.

    Args:
        archive: its folder has been begun.
        actors: how many; by default one per GPU, or else per two CPUs. Where fewer have room, fewer run.
        device: "cuda" (a GPU for each actor) or "cpu"; by default whichever the cluster has.
        options: of `PartJudge`.

    Raises:
        ImportError: the extra `ray` is not installed.
        PredictionError: a cluster that cannot be reached or lacks the GPU, or a part that no actor could judge.
    """
    ray = _import_ray()
    _connect(ray)
    per_actor = _resources(ray, device)
    actors = _default_actors(ray, "num_gpus" in per_actor) if actors is None else actors
    if actors < 1:
        raise PredictionError(f"actors is {actors}; give at least one.")
    options["device"] = "cuda" if "num_gpus" in per_actor else device
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # what a node took along is missing afterwards, and goes into another round
    stored = ray.put(archive)
    todo = [part for part in range(archive.number_of_parts) if not archive.is_judged(part)]
    bar = tqdm(total=archive.number_of_parts, initial=archive.number_of_parts - len(todo), unit="part")
    while todo:
        rows = ray.data.from_items([{"part": part} for part in todo], override_num_blocks=len(todo))
        judged = rows.map_batches(
            Actor,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
            fn_constructor_args=(stored, options),
            ray_remote_args_fn=_without_waiting,
            **per_actor,
        )
        try:
            for batch in judged.iter_batches(batch_size=1, batch_format="pyarrow"):
                _keep(archive, batch, bar)
        except ray.exceptions.RayError as error:
            logger.warning("Ray gave up a round: %s", _first_line(error))
        left = [part for part in todo if not archive.is_judged(part)]
        if len(left) == len(todo):
            raise PredictionError(
                f"No actor could judge any of {len(left)} parts (such as {archive.names_of(left[0])[0]}): look into "
                "Ray's logs. What is finished is kept."
            )
        if left:
            logger.warning("%d parts were lost with a process or node of the cluster: judged again.", len(left))
        todo = left
    bar.close()


def _keep(archive: Archive, batch: pa.Table, bar: tqdm) -> None:
    (row,) = batch.to_pylist()
    if row["failure"] is not None:
        raise PredictionError(
            f"Part {row['part']} ({archive.names_of(row['part'])[0]}, ...) cannot be judged on the cluster: "
            f"{row['failure']}"
        )
    archive.write(row["part"], {table: row[table] for table in archive.tables})
    bar.update()


def _without_waiting() -> dict[str, int]:
    """An actor whose node died is given up: waiting for a node on which it can start again may be for ever."""
    return {"max_restarts": 0, "max_task_retries": 0}


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"--engine ray needs Ray Data ({error}): pip install 'sailer[ray]'.") from error
    return ray


def _connect(ray: Any) -> None:
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PredictionError(
            f"No Ray cluster can be reached at RAY_ADDRESS={address} ({_first_line(error)}): start one with `ray "
            "start --head`, or leave it out to use this machine."
        ) from error


def _resources(ray: Any, device: str | None) -> dict[str, int]:
    """What Ray is to give each actor."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    if device is not None and device.split(":")[0] not in ("cpu", "cuda"):
        raise PredictionError(f"device is {device!r}; on a Ray cluster it is cpu or cuda.")
    if device is not None and device.startswith("cuda") and not gpus:
        raise PredictionError(
            f"--device {device} asks for a GPU, and the Ray cluster has none ({int(there.get('CPU', 0))} CPUs): add a "
            "node with one, or leave --device out."
        )
    return {"num_cpus": 1, "num_gpus": 1} if gpus and device != "cpu" else {"num_cpus": 1}


def _default_actors(ray: Any, on_gpus: bool) -> int:
    there = ray.cluster_resources()
    return int(there["GPU"]) if on_gpus else max(1, int(there.get("CPU", 1)) // 2)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
