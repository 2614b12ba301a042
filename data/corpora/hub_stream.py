"""A split of a dataset that does not fit the disk: its annotations are read once, its recordings as they are heard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Audio, Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from sailer.data.corpora.files import Problems
from sailer.data.corpora.hub import Columns, canonical_audio, is_recording, own_split, place
from sailer.data.corpora.mapping import TableOptions, TableReader
from sailer.data.corpora.splits import chosen
from sailer.data.schema import CorpusError, CorpusReport, LabelSet, build_dataset, canonical_features
from sailer.data.streaming import ROW, SHARD

_BATCH = 64


@dataclass(frozen=True)
class StreamSource:
    """A split whose recordings stay where they are; any process opens it anew.

    Args:
        path: dataset id or folder, as `load_dataset` takes it.
        split: the dataset's own name of it.
        subset, revision: of the dataset.
        column: of the recordings.
    """

    path: str
    split: str
    subset: str | None
    revision: str | None
    column: str

    def recordings(self, shard: int, first: int) -> Iterator[dict[str, Any]]:
        """The recordings of a shard from its row `first` on, as {path, bytes}."""
        stream = _open_stream(self.path, self.subset, self.revision)[self.split].select_columns([self.column])
        part = stream.shard(num_shards=stream.num_shards, index=shard).skip(first)
        # In batches: row by row `datasets` would share the shards out over a data loader's workers once more.
        for batch in part.with_format("arrow").iter(batch_size=_BATCH):
            column = batch.column(self.column)
            yield from canonical_audio(
                column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
            ).to_pylist()


def load_streamed(
    path: Path,
    streamed: str,
    *,
    label_set: LabelSet,
    report: CorpusReport,
    strict: bool,
    subset: str | None = None,
    revision: str | None = None,
    **table_options: Any,
) -> dict[str, Dataset]:
    """Canonical rows per split: of `streamed` without recordings, with the columns `shard` and `row`; of others whole.

    Raises:
        CorpusError: what needs the recordings at hand, or a dataset that cannot be streamed.
    """
    options = TableOptions(**table_options)
    if options.split_fractions or "split" in (options.columns or {}):
        raise CorpusError("A dataset is streamed by its own splits: leave split_fractions and the split column out.")
    folder = path.expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        raise CorpusError(f"{path} is on this disk, and read from there as it is heard: leave streaming out.")
    source = _open_stream(path.as_posix(), subset, revision)
    own = {split: own_split(split, options.split_names, len(source)) for split in source}
    if streamed not in own.values():
        raise CorpusError(f"{path} has no split {streamed!r} to stream; it has {sorted(set(own.values()))}.")
    if list(own.values()).count(streamed) > 1:
        raise CorpusError(f"{path} has several splits that count as {streamed!r}: name one with split_names.")
    rows: dict[str, Dataset] = {}
    for split, name in own.items():
        if name in chosen(sorted(set(own.values())), options.splits):
            problems = Problems(path, strict, report)
            part, annotations = source[split], source[split]
            if name == streamed:
                audio = _audio_column(part, options, split)
                wanted = [column for column in _features(part) if column != audio]
                if part.info.builder_name == "parquet":  # a selection of columns alone would read all, and drop some
                    annotations = _open_stream(path.as_posix(), subset, revision, columns=wanted)[split]
                annotations = annotations.select_columns(wanted)
            rows[name] = _read(part, annotations, split, name == streamed, options, label_set, problems)
    return rows


def stream_source(
    path: str | Path, streamed: str, subset: str | None = None, revision: str | None = None, **table_options: Any
) -> StreamSource:
    """Where the recordings of a streamed split are; for the arguments see `load_streamed`."""
    options = TableOptions(**table_options)
    source = _open_stream(Path(path).as_posix(), subset, revision)
    split = next(one for one in source if own_split(one, options.split_names, len(source)) == streamed)
    return StreamSource(Path(path).as_posix(), split, subset, revision, _audio_column(source[split], options, split))


def _open_stream(
    path: str, subset: str | None, revision: str | None, columns: list[str] | None = None
) -> Mapping[str, IterableDataset]:
    """The dataset's splits; of Parquet files nothing is read but `columns`, where they are given."""
    folder = Path(path).expanduser()
    given: dict[str, Any] = {} if columns is None else {"columns": columns}
    if revision is not None and not folder.is_dir():
        given["revision"] = revision
    try:
        return load_dataset(str(folder) if folder.is_dir() else path, name=subset, streaming=True, **given)
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        raise CorpusError(f"`datasets` cannot stream {path}: {error} (is it a dataset id, or a folder?)") from error


def _features(part: IterableDataset) -> Mapping[str, Any]:
    return part.features if part.features is not None else part._resolve_features().features


def _audio_column(part: IterableDataset, options: TableOptions, split: str) -> str:
    features = _features(part)
    column = (options.columns or {}).get("audio", "audio")
    if column not in features:
        raise CorpusError(
            f"Split {split} has no column {column!r} of recordings; it has {list(features)}: name it in `columns`."
        )
    if not (isinstance(features[column], Audio) or is_recording(pa.struct(_kind(features[column])))):
        raise CorpusError(
            f"The column {column!r} of split {split} does not hold the recordings: only those inside the dataset can "
            "be streamed. Leave streaming out."
        )
    return column


def _kind(feature: Any) -> list[tuple[str, pa.DataType]]:
    return [(name, pa.null()) for name in feature] if isinstance(feature, Mapping) else []


def _read(
    part: IterableDataset,
    annotations: IterableDataset,
    split: str,
    is_streamed: bool,
    options: TableOptions,
    label_set: LabelSet,
    problems: Problems,
) -> Dataset:
    """Canonical rows of one split, from its annotations; with their recordings where it is not the streamed one."""
    audio, features = _audio_column(part, options, split), _features(part)
    tables, lengths = [], []
    for shard in range(annotations.num_shards):
        stream = annotations.shard(num_shards=annotations.num_shards, index=shard)
        batches = list(stream.with_format("arrow").iter(batch_size=1000))
        tables += batches
        lengths.append(sum(map(len, batches)))
    if not tables:
        raise CorpusError(f"Split {split} has no rows.")
    table = pa.concat_tables(tables, promote_options="permissive")
    if is_streamed:
        kind = pa.struct([pa.field("path", pa.string()), pa.field("bytes", pa.binary())])
        table = table.append_column(audio, pa.nulls(len(table), kind))
    else:
        recordings = canonical_audio(table.column(audio))
        table = table.set_column(table.column_names.index(audio), audio, recordings)
    is_canonical = options.columns is None and set(features) == set(canonical_features(label_set))
    if is_canonical:
        columns: dict[str, Any] = {name: table.column(name).to_pylist() for name in canonical_features(label_set)}
        first_rows = list(range(len(table)))
    else:
        reader = TableReader(Columns(Dataset(table)), options, label_set, problems, where=partial(place, split))
        columns, _, first_rows = reader.read()
        columns["audio"] = table.column(audio).take(first_rows).to_pylist()
    columns["audio"] = [None if is_streamed else recording for recording in columns["audio"]]
    kept = _long_enough(columns, options.minimum_seconds, split, problems)
    canonical = build_dataset({name: [values[row] for row in kept] for name, values in columns.items()}, label_set)
    if not is_streamed:
        return canonical
    places = {
        SHARD: np.repeat(np.arange(len(lengths)), lengths),
        ROW: np.concatenate([np.arange(length) for length in lengths]),
    }
    for name, values in places.items():
        canonical = canonical.add_column(name, values[np.array(first_rows, dtype=int)[kept]])
    return canonical


def _long_enough(columns: Mapping[str, Any], least: float, split: str, problems: Problems) -> list[int]:
    seconds = np.asarray(columns.get("duration", np.full(len(columns["id"]), np.nan)), dtype=np.float64)
    if least and np.isnan(seconds).any():
        raise CorpusError(
            f"minimum_seconds is {least}, and split {split} has clips without a duration, which streaming does not "
            "look into: give the dataset a column of durations, or leave minimum_seconds out."
        )
    for row in np.flatnonzero(seconds < least):
        problems.report.leave_out(f"shorter than {least} s", columns["id"][row])
    return np.flatnonzero(~(seconds < least)).tolist()
