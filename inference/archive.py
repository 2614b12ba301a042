"""An archive of recordings in, one Parquet table out: judged in parts by any number of processes, and merged.

A part holds the rows of so many recordings that follow each other; it is there whole or not at all. A run that is
started again, by as many processes or by others, goes on with the parts that are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from sailer.data.atomic import replacing
from sailer.data.team import Team
from sailer.inference.loading import check_precision
from sailer.inference.outputs import PredictionError, columns_of, written_name
from sailer.inference.predict import PredictionSettings, as_json, check_system, judge, load_classifier
from sailer.inference.sources import find_sources, source_of
from sailer.pipeline_sailer import SpeechEmotionPipeline

logger = logging.getLogger(__name__)

TEXTS = ("file", "label", "set", "transcript", "warning", "error")
# Of a part, and of the result; the rows last, because a part with rows is complete.
TABLES = ("embeddings", "timeline", "rows")
METADATA = b"sailer"


@dataclass(frozen=True)
class Archive:
    """What is judged and how: the same in every process, and in every run that goes on with another's parts.

    Args:
        settings: see `PredictionSettings`.
        names: of the recordings, see `find_sources`.
        output: the Parquet file to be.
        part_size: recordings of a part.
        audio_column: of Parquet files.
    """

    settings: PredictionSettings
    names: list[str]
    output: Path
    part_size: int = 256
    audio_column: str = "audio"

    def __post_init__(self) -> None:
        if self.part_size < 1:
            raise PredictionError(f"part_size is {self.part_size}; a part holds at least one recording.")

    @property
    def folder(self) -> Path:
        """Where the parts are while the archive is judged."""
        return self.output.with_name(f"{self.output.name}.parts")

    @property
    def number_of_parts(self) -> int:
        return -(-len(self.names) // self.part_size)

    def names_of(self, part: int) -> list[str]:
        """The recordings of a part."""
        return self.names[part * self.part_size : (part + 1) * self.part_size]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What two runs must share to share parts, by name."""
        digest = hashlib.sha256("\n".join(map(written_name, self.names)).encode())
        listing = f"{len(self.names)} recordings, {digest.hexdigest()[:16]}"
        return as_json(self.settings) | {"recordings": listing, "part_size": self.part_size}

    @cached_property
    def metadata(self) -> bytes:
        """`identity` as it stands in every file."""
        return json.dumps(self.identity, sort_keys=True).encode()

    def path_of(self, table: str, part: int) -> Path:
        return self.folder / f"{table}-{part:07d}.parquet"

    def result_of(self, table: str) -> Path:
        """Where a merged table goes."""
        if table == "embeddings":
            return Path(self.settings.embeddings or "")
        return self.output if table == "rows" else self.output.with_name(f"{self.output.stem}_timeline.parquet")

    @property
    def pictures(self) -> Path | None:
        return self.output.with_name(f"{self.output.stem}_timeline") if self.settings.timeline else None

    @property
    def tables(self) -> list[str]:
        """The tables that are wanted, in the order in which they are written."""
        wanted = {"embeddings": self.settings.embeddings, "timeline": self.settings.timeline, "rows": True}
        return [table for table in TABLES if wanted[table]]

    def is_judged(self, part: int) -> bool:
        """Whether a part is there.

        Raises:
            PredictionError: it is another run's, or no part.
        """
        path = self.path_of("rows", part)
        if not path.is_file():
            return False
        self.check(path)
        return True

    def check(self, path: Path) -> None:
        """Refuse a file that is not of this run.

        Raises:
            PredictionError: names it, and what differs.
        """
        try:
            theirs = json.loads((pq.read_schema(path).metadata or {})[METADATA])
        except (OSError, pa.ArrowInvalid, ValueError, KeyError) as error:
            raise PredictionError(
                f"{path} is not what a run left ({error}): choose another --output, or delete it."
            ) from error
        self.compare(theirs, path)

    def compare(self, theirs: Mapping[str, Any], path: Path) -> None:
        """Refuse the parts or the result of another run.

        Raises:
            PredictionError: names `path`, and what differs.
        """
        names = [name for name in {**self.identity, **theirs} if self.identity.get(name) != theirs.get(name)]
        if names:
            told = "; ".join(f"{name} was {theirs.get(name)!r}, is {self.identity.get(name)!r}" for name in names)
            raise PredictionError(
                f"{path} is of another run ({told}): choose another --output, or delete {self.output} and "
                f"{self.folder.name} beside it."
            )

    def begin(self) -> None:
        """Make the folder of parts, or find that of this run.

        Raises:
            PredictionError: the folder holds another run's parts or other files.
        """
        told = self.folder / "run.json"
        if self.folder.exists() and not told.is_file() and any(self.folder.glob("[!.]*")):
            raise PredictionError(f"{self.folder} holds other files: choose another --output.")
        self.folder.mkdir(parents=True, exist_ok=True)
        if told.is_file() and any(self.folder.glob("*.parquet")):  # one that left no part stands in nobody's way
            try:
                theirs = dict(json.loads(told.read_bytes()))
            except (ValueError, TypeError) as error:
                raise PredictionError(f"{told} is not what a run left ({error}): delete {self.folder}.") from error
            self.compare(theirs, self.folder)
        with replacing(told) as beside:
            beside.write_bytes(self.metadata)

    def check_listing(self) -> None:
        """Refuse to work where this process sees other recordings, or has other settings, than the first one.

        Raises:
            PredictionError: names the machine's process and what differs.
        """
        theirs = json.loads((self.folder / "run.json").read_bytes())
        names = [name for name in self.identity if self.identity[name] != theirs.get(name)]
        if names:
            told = "; ".join(f"{name}: {self.identity[name]!r} here, {theirs.get(name)!r} there" for name in names)
            raise PredictionError(
                f"Process {os.environ.get('RANK', '?')} does not see what process 0 sees ({told}): all processes need "
                "the same options, and all machines the same files under the same names."
            )

    def write(self, part: int, tables: Mapping[str, bytes]) -> None:
        """Put a part in its place, whole; the rows last."""
        for table in self.tables:
            with replacing(self.path_of(table, part)) as beside:
                beside.write_bytes(tables[table])

    def merge(self) -> int:
        """Write the tables of all parts as one each, after checking that every recording has one row, in order.

        Returns:
            Number of recordings that could not be used.

        Raises:
            PredictionError: a part that is missing, of another run, or has other rows than it must have.
        """
        failed = 0
        for part in range(self.number_of_parts):
            if not self.is_judged(part):
                raise PredictionError(f"{self.path_of('rows', part)} is missing: start the run again, and it is made.")
            rows = pq.read_table(self.path_of("rows", part), columns=["file", "error"])
            if rows["file"].to_pylist() != [written_name(name) for name in self.names_of(part)]:
                raise PredictionError(
                    f"{self.path_of('rows', part)} has not one row for each of its recordings: delete it, and start "
                    "the run again."
                )
            failed += len(rows) - rows["error"].null_count
        for table in self.tables:
            with ExitStack() as stack:
                beside = stack.enter_context(replacing(self.result_of(table)))
                schema = _common_schema([self.path_of(table, part) for part in range(self.number_of_parts)])
                writer = stack.enter_context(pq.ParquetWriter(beside, schema))
                for part in range(self.number_of_parts):
                    writer.write_table(pq.read_table(self.path_of(table, part)).cast(schema))
        shutil.rmtree(self.folder)
        return failed

    def failed_of_result(self) -> int | None:
        """Number of recordings that could not be used, of a result that is there; None if there is none.

        Raises:
            PredictionError: it is of another run, or none of ours.
        """
        if not os.path.lexists(self.output):
            return None
        self.check(self.output)
        errors = pq.read_table(self.output, columns=["error"])["error"]
        return len(errors) - errors.null_count


class PartJudge:
    """A system that judges parts of an archive, one after the other.

    Args:
        archive: what is judged.
        options: of `load_classifier`, beside the settings.
    """

    def __init__(self, archive: Archive, **options: Any) -> None:
        self.archive = archive
        self.classifier: SpeechEmotionPipeline = load_classifier(archive.settings, **options)
        config, has_transcripts = self.classifier.model.config, archive.settings.transcriber is not None
        self.columns = columns_of(config, has_transcripts, archive.settings.has_sets)

    def judge(self, parts: Sequence[int]) -> Iterator[tuple[int, dict[str, bytes]]]:
        """Each part with its tables as Parquet files' bytes; the model's batches reach over the ends of parts.

        Raises:
            PredictionError: the system fails, on silence too.
        """
        archive = self.archive
        sources = (source_of(name, archive.audio_column) for part in parts for name in archive.names_of(part))
        clips = self.classifier.encode(sources)
        for part in parts:
            rows, windows, embeddings = [], [], []
            for name in map(written_name, archive.names_of(part)):
                clip = next(clips)
                judged = judge(name, clip, self.classifier, archive.settings, archive.pictures)
                if judged is None:
                    if clip.timestamps:
                        check_system(self.classifier, clip)
                    rows.append({"file": name, "warning": clip.warning, "error": clip.message})
                    continue
                rows.append(judged[0])
                windows += judged[1]
                embeddings.append({"file": name, "embedding": judged[2].tolist()})
            contents = {"rows": rows, "timeline": windows, "embeddings": embeddings}
            yield part, {table: self._file(table, contents[table]) for table in archive.tables}

    def _file(self, table: str, rows: list[dict[str, Any]]) -> bytes:
        if table == "embeddings":
            fields = [pa.field("file", pa.string()), pa.field("embedding", pa.list_(pa.float32()))]
        else:
            own = {"rows": ["file", "seconds"], "timeline": ["file", "start", "end"]}[table]
            ends = ["warning", "error"] if table == "rows" else []
            names = [*own, *self.columns, *ends]
            fields = [pa.field(name, pa.string() if name in TEXTS else pa.float64()) for name in names]
        schema = pa.schema(fields, metadata={METADATA: self.archive.metadata})
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
        return sink.getvalue().to_pybytes()


def predict_archive(
    settings: PredictionSettings,
    paths: Sequence[str],
    output: str | Path,
    batch_size: int = 8,
    num_workers: int = 2,
    device: str | None = None,
    dtype: str = "auto",
    part_size: int = 256,
    audio_column: str = "audio",
    engine: str | None = None,
    actors: int | None = None,
) -> int:
    """Judge an archive: one row per recording in `output`, with the columns and values that a CSV would have.

    Started by torchrun or `accelerate launch` it shares the work out over the processes, which must all see the
    recordings and the folder of the output; the first one merges the parts when all are there. Beside the output are
    `<name>_timeline.parquet` and the folder `<name>_timeline` of PNG files, if the settings ask for a timeline.

    Args:
        settings: see `PredictionSettings`.
        paths: recordings, see `find_sources`.
        output: the Parquet file; while it is made its parts are in `<output>.parts`.
        batch_size, num_workers, device, dtype: as for `predict`; of several processes on one machine each takes a
            CUDA device of its own by default.
        part_size: recordings of a part.
        audio_column: of recordings in Parquet files.
        engine: None, or "ray": a Ray cluster's actors judge the parts, see `archive_ray`.
        actors: of the engine "ray", how many; by default one per GPU, or else per two CPUs.

    Returns:
        Number of recordings that could not be used.

    Raises:
        FileNotFoundError: a path or address that is nowhere.
        PredictionError: settings that a Parquet output does not go with, parts of another run, processes that see
            other recordings, or a system that fails on silence.
        TeamError: another process failed or died; what is finished is kept.
    """
    output = Path(output)
    settings = dataclasses.replace(settings, precision=check_precision(settings.backend, settings.precision))
    if settings.embeddings is not None and not settings.embeddings.endswith(".parquet"):
        raise PredictionError(
            f"With a Parquet output embeddings go to a .parquet file too, not {settings.embeddings}."
        )
    team = Team() if engine == "ray" else Team.of_this_launch()
    archive = Archive(settings, find_sources(paths, audio_column), output, part_size, audio_column)
    failed = archive.failed_of_result()
    if failed is not None:
        logger.info("%s is complete: nothing is left to do.", output)
        return failed
    output.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "device": device, "dtype": dtype}
    if engine == "ray":
        from sailer.inference.archive_ray import judge_by_ray

        archive.begin()
        judge_by_ray(archive, actors=actors, **options)
        return archive.merge()
    with team.at_work(archive.folder):
        if team.index == 0:
            archive.begin()
            team.tell(archive.folder, "begun")
        else:
            team.wait(archive.folder, "begun", only=0)
            archive.check_listing()
        _judge_share(archive, team, options)
        team.tell(archive.folder, "judged")
        if team.index == 0:
            team.wait(archive.folder, "judged")
    return archive.merge() if team.index == 0 else 0


def _judge_share(archive: Archive, team: Team, options: dict[str, Any]) -> None:
    own = range(team.index, archive.number_of_parts, team.size)
    todo = [part for part in own if not archive.is_judged(part)]
    if len(todo) < len(own):
        logger.info("%d of %d parts are in %s already.", len(own) - len(todo), len(own), archive.folder)
    if not todo:
        return
    judge_of_parts = PartJudge(archive, **options | {"device": _device_of(team, options["device"])})
    bar = tqdm(judge_of_parts.judge(todo), total=len(own), initial=len(own) - len(todo), unit="part")
    for part, tables in bar if team.index == 0 else judge_of_parts.judge(todo):
        archive.write(part, tables)


def _device_of(team: Team, device: str | None) -> str | None:
    """Of several processes on a machine each takes a GPU of its own."""
    if team.size == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise PredictionError(
            f"Process {team.index} would take GPU {local}, and this machine has {torch.cuda.device_count()}: start as "
            "many processes on it, or give --device cpu."
        )
    return f"cuda:{local}"


def _common_schema(paths: Sequence[Path]) -> pa.Schema:
    schema = pq.read_schema(paths[0])
    for path in paths[1:]:
        if not pq.read_schema(path).equals(schema):
            raise PredictionError(
                f"{path} has other columns than {paths[0].name}: delete it, and start the run again."
            )
    return schema
