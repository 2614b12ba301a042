"""Any dataset that `datasets` can load, from the Hub or a folder, in canonical rows; rows that already are pass."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    List,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from sailer.data.corpora import corpus
from sailer.data.corpora.audio_files import read_durations
from sailer.data.corpora.files import FileIndex, Problems, attach_recordings
from sailer.data.corpora.mapping import TableOptions, TableReader
from sailer.data.corpora.splits import assign_splits, chosen, split_name, take_rows
from sailer.data.schema import CorpusError, CorpusReport, LabelSet, build_dataset, canonical_features

# Written beside the rows by `sailer data --output_dir`.
LABEL_SET_FILE = "label_set.json"


@corpus("hub", reads_folder=False, shared_options=TableOptions)
def load(
    path: Path | None,
    *,
    label_set: LabelSet,
    audio: bool,
    strict: bool,
    report: CorpusReport,
    subset: str | None = None,
    revision: str | None = None,
    streamed: str | None = None,
    **table_options: Any,
) -> dict[str, Dataset]:
    """Canonical rows per split, from a dataset id, a folder of `save_to_disk`, or one that `load_dataset` reads.

    A folder of canonical rows (what `sailer data --output_dir` writes) needs no mapping; its recordings are not opened
    again. The columns of any other are named as for the corpus `manifest`. Recordings inside the dataset stay where
    they are on disk. For the other parameters see `sailer.data.corpora`.

    Args:
        path: dataset id or folder.
        label_set: the primary emotions; canonical rows must have been written with the same.
        subset: the dataset's configuration, where it has several.
        revision: branch, tag or commit of a dataset on the Hub.
        streamed: leave the recordings of this split where they are (a recipe's `streaming` names its training split).
        **table_options: see `TableOptions`. Without a column of splits the dataset's own splits are taken; recordings
            given as paths are by default relative to the dataset's folder.

    Raises:
        CorpusError: a dataset that cannot be loaded, another label set, a mapping that does not fit it, or what
            `strict` refuses.
    """
    if path is None:
        raise CorpusError("Corpus 'hub' is read from a dataset id or a folder: give one of them.")
    if streamed is not None:
        from sailer.data.corpora.hub_stream import load_streamed

        own_options = {"subset": subset, "revision": revision, **table_options}
        return load_streamed(path, streamed, label_set=label_set, report=report, strict=strict, **own_options)
    options = TableOptions(**table_options)
    columns, fractions, seconds = options.columns, options.split_fractions, options.minimum_seconds
    source = _open(path, subset, revision)
    problems = Problems(path, strict, report)
    if columns is None and all(set(part.features) == set(canonical_features(label_set)) for part in source.values()):
        if options.rows or options.label_names or options.split_names or fractions:
            raise CorpusError(
                f"{path} holds canonical rows already: leave out the options that map columns and labels."
            )
        _check_label_set(path, source, label_set)
        canonical = {split: source[split] for split in chosen(list(source), options.splits)}
        return {split: _canonical(part, audio, seconds, problems) for split, part in canonical.items()}

    has_column = any("split" in (part.column_names if columns is None else columns) for part in source.values())
    if fractions and len(source) > 1:
        raise CorpusError(f"{path} has the splits {list(source)}: leave out split_fractions.")
    own: dict[str, str] = {}
    if not (has_column or fractions):
        own = {split: own_split(split, options.split_names, len(source)) for split in source}
        wanted = chosen(sorted(set(own.values())), options.splits)
        source = DatasetDict({split: part for split, part in source.items() if own[split] in wanted})
    parts: dict[str, list[Dataset]] = defaultdict(list)
    for split, dataset in source.items():
        table = Columns(dataset)
        reader = TableReader(table, options, label_set, problems, where=partial(place, split))
        clips, named, first_rows = reader.read()
        if own:
            clips["split"] = [own[split]] * len(first_rows)
        else:
            clips["split"] = assign_splits(named, clips["speaker"], has_column, fractions, report)
        if audio:
            merged, assigned = _with_audio(clips, first_rows, reader, table, path)
        else:
            assigned = clips.pop("split")
            merged = build_dataset(clips, label_set)
        for name in dict.fromkeys(assigned):
            indices = [row for row, other in enumerate(assigned) if other == name]
            parts[name].append(merged.select(indices) if len(indices) < len(merged) else merged)
    return {name: concatenate_datasets(parts[name]) for name in chosen(sorted(parts), options.splits)}


def place(split: str, row: int) -> str:
    return f"split {split}, row {row}"


class Columns(Mapping[str, list[Any]]):
    """A dataset's columns as lists, read when asked for: classes by their names, recordings without their bytes."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._read: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._read:
            values, feature = self.arrow(name), self.dataset.features[name]
            if is_recording(values.type):
                paths = pa.chunked_array(
                    [pc.struct_field(chunk, "path").cast(pa.string()) for chunk in values.chunks], pa.string()
                )
                self._read[name] = [{"path": path} for path in paths.to_pylist()]
            else:
                self._read[name] = [_class_name(value, feature) for value in values.to_pylist()]
        return self._read[name]

    def arrow(self, name: str) -> pa.ChunkedArray:
        """The column as it lies on disk."""
        return self.dataset.data.column(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset.column_names)


def is_recording(kind: pa.DataType) -> bool:
    """Whether a column holds recordings with their paths or bytes, as `datasets.Audio` stores them."""
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"path", "bytes"}


def _open(path: Path, subset: str | None, revision: str | None) -> DatasetDict:
    """The dataset with its recordings left encoded."""
    folder = path.expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = load_from_disk(folder)
        elif folder.is_dir():
            loaded = load_dataset(str(folder), name=subset)
        elif folder.is_file():
            raise CorpusError(f"{path} is a file: read it with the corpus 'manifest'.")
        else:
            loaded = load_dataset(path.as_posix(), name=subset, revision=revision)
    except CorpusError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, DatasetsError) as error:
        if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
            raise CorpusError(
                f"`datasets` cannot load {path} without a library: {error.__cause__ or error} A folder of recordings "
                "with a table is also read, without that, by the corpus 'manifest'."
            ) from error
        raise CorpusError(f"`datasets` cannot load {path}: {error} (is it a dataset id, or a folder?)") from error
    if not isinstance(loaded, DatasetDict):
        loaded = DatasetDict(train=loaded)
    for split, dataset in loaded.items():
        for name, feature in dataset.features.items():
            if isinstance(feature, Audio):
                dataset = dataset.cast_column(name, Audio(decode=False))
        # The loader reads the table itself, in which a selection of rows would not show.
        loaded[split] = dataset.flatten_indices() if dataset._indices is not None else dataset
    return loaded


def own_split(split: str, split_names: Mapping[Any, str] | None, number: int) -> str:
    """The canonical name of a dataset's own split; the only one may have any name."""
    try:
        return split_name((split_names or {}).get(split, split)) or "train"
    except CorpusError as error:
        if number == 1:
            return "train"
        raise CorpusError(f"{error}; say with split_names which it is.") from None


def _class_name(value: Any, feature: Any) -> Any:
    """A value with the name of its class in place of a class number."""
    if isinstance(feature, List) and isinstance(value, list):
        return [_class_name(item, feature.feature) for item in value]
    if isinstance(feature, ClassLabel) and value is not None:
        return feature.int2str(value) if value >= 0 else None
    return value


def _with_audio(
    clips: dict[str, Any], first_rows: list[int], reader: TableReader, table: Columns, path: Path
) -> tuple[Dataset, list[str]]:
    """Canonical rows of the clips whose recording can be used, and the split of each."""
    minimum_seconds = reader.options.minimum_seconds
    if "audio" not in reader.columns:
        raise CorpusError(
            f"{reader.problems.source} has no column said to be audio: name it in `columns`, or pass audio=False."
        )
    column = table.arrow(reader.columns["audio"])
    if not is_recording(column.type):
        values = table[reader.columns["audio"]]
        names = [str(values[row] or "") for row in first_rows]
        index = FileIndex(Path(reader.options.audio_folder or path).expanduser())
        rows = attach_recordings(clips, names, index, minimum_seconds=minimum_seconds, problems=reader.problems)
        clips = take_rows(clips, rows)
        assigned = clips.pop("split")
        return build_dataset(clips, reader.label_set), assigned

    stored = canonical_audio(column)
    sources = [_source(stored[row]) for row in first_rows]
    names = [f"of clip {clip} in {reader.problems.source}" for clip in clips["id"]]
    strict, report = reader.problems.strict, reader.problems.report
    durations = read_durations(sources, strict=strict, report=report, names=names)
    for clip, duration in zip(clips["id"], durations, strict=True):
        if duration is not None and duration < minimum_seconds:
            report.leave_out(f"shorter than {minimum_seconds} s", clip)
    rows = [row for row, duration in enumerate(durations) if duration is not None and duration >= minimum_seconds]
    clips = take_rows({**clips, "duration": durations}, rows)
    assigned = clips.pop("split")
    narrow = build_dataset(clips, reader.label_set).remove_columns("audio")
    # The recordings are not copied: the new table points to where the old one has them.
    recordings = Dataset(
        pa.table({"audio": stored}),
        info=DatasetInfo(features=Features({"audio": canonical_features(reader.label_set)["audio"]})),
        fingerprint=f"{table.dataset._fingerprint}-recordings",
    )
    kept = [first_rows[row] for row in rows]
    if kept != list(range(len(recordings))):
        recordings = recordings.select(kept)
    merged = concatenate_datasets([narrow, recordings], axis=1)
    return merged.select_columns(list(canonical_features(reader.label_set))), assigned


def canonical_audio(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Recordings as {path, bytes} of which one is set: a path beside bytes is but a name."""
    kind = pa.struct([pa.field("path", pa.string()), pa.field("bytes", pa.binary())])
    chunks = []
    for chunk in column.chunks:
        data = pc.struct_field(chunk, "bytes").cast(pa.binary())
        path = pc.struct_field(chunk, "path").cast(pa.string())
        path = pc.if_else(pc.is_valid(data), pa.scalar(None, pa.string()), path)
        chunks.append(pa.StructArray.from_arrays([path, data], fields=list(kind)))
    return pa.chunked_array(chunks, kind)


def _source(recording: pa.StructScalar) -> str | bytes | memoryview:
    data = recording["bytes"]
    return memoryview(data.as_buffer()) if data.is_valid else recording["path"].as_py() or b""


def _check_label_set(path: Path, source: DatasetDict, label_set: LabelSet) -> None:
    """Refuse canonical rows that were written with another label set."""
    file = path.expanduser() / LABEL_SET_FILE
    if file.is_file():
        labels = json.loads(file.read_text(encoding="utf-8"))["labels"]
        if labels != list(label_set.labels):
            raise CorpusError(f"{path} was written with the labels {labels}; asked for are {list(label_set.labels)}.")
    for dataset in source.values():
        width = dataset.features["votes"].length
        if width != len(label_set.labels):
            raise CorpusError(f"{path} has votes over {width} labels; asked for are {list(label_set.labels)}.")


def _canonical(dataset: Dataset, audio: bool, minimum_seconds: float, problems: Problems) -> Dataset:
    """Canonical rows whose recordings are there, if these are wanted."""
    if not audio:
        return dataset
    chunks = dataset.data.column("audio").chunks
    inside = [there for chunk in chunks for there in pc.is_valid(pc.struct_field(chunk, "bytes")).to_pylist()]
    paths = [recording["path"] for recording in Columns(dataset)["audio"]]
    seconds = dataset.with_format("numpy")["duration"][:]
    kept, missing = [], []
    for row, clip in enumerate(dataset["id"]):
        if not inside[row] and not (paths[row] and os.path.isfile(paths[row])):
            missing.append(f"{clip} ({paths[row] or 'none given'})")
        elif seconds[row] < minimum_seconds:
            problems.report.leave_out(f"shorter than {minimum_seconds} s", clip)
        else:
            kept.append(row)
    if missing and problems.strict:
        raise CorpusError(
            f"{len(missing)} of {len(dataset)} recordings of {problems.source} are missing: {', '.join(missing[:3])}. "
            "Put them back, load with strict=False to leave them out, or with audio=False for the labels alone."
        )
    for clip in missing:
        problems.report.leave_out("recording missing", clip)
    return dataset.select(kept) if len(kept) < len(dataset) else dataset
