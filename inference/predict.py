"""Files, folders and globs in; a row per recording out, as CSV or JSON Lines, that a stopped run can go on with."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from sailer.data.atomic import replacing
from sailer.inference.loading import check_precision, load
from sailer.inference.outputs import EmbeddingFile, PredictionError, RowFile, columns_of, row_of, written_name
from sailer.inference.recordings import find_recordings
from sailer.inference.speakers import speakers_of, voices_of
from sailer.inference.submission import choose_recordings, submit
from sailer.inference.timeline import picture_name, plot_timeline
from sailer.layers_sailer import SpeakerStatistics
from sailer.pipeline_sailer import SpeechEmotionPipeline
from sailer.windows_sailer import Clip

if TYPE_CHECKING:
    import argparse

logger = logging.getLogger(__name__)

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
EMBEDDING_SUFFIXES = (".safetensors", ".npz", ".parquet")
ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/")  # of a store; a Windows drive has one letter
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class PredictionSettings:
    """How recordings are judged; kept beside the results, because a run is only continued with the same.

    Args:
        model: folder or Hub id of a SAILER system.
        backend, precision: the runtime and what it computes in, see `sailer.load`.
        prior: "balanced" or "natural" scores.
        min_confidence: decisions whose score is below are marked "undecided".
        chunk_length_s, stride_length_s: windows over long audio, as in the pipeline.
        transcriber: speech-recognition model for systems that read transcripts.
        timeline: also write a row per window, and a PNG per recording.
        embeddings: file for the clips' embeddings, .safetensors or .npz; .parquet beside a Parquet output.
        coverage: also write each clip's prediction set, of this coverage; `coverage_by_class` asks for it within each
            class (and without `coverage` for 0.9).
        speaker_from: adapt the system to each recording's speaker, by that one's other recordings (all are then heard
            twice): "folder", where each speaker has one, or a column of `file_list`, a CSV with a column FileName.

    Raises:
        PredictionError: a confidence outside [0, 1], a coverage outside (0, 1), or embeddings to a file of another
            kind.
    """

    model: str
    prior: str = "balanced"
    min_confidence: float = 0.0
    chunk_length_s: float | None = None
    stride_length_s: float | None = None
    transcriber: str | None = None
    timeline: bool = False
    embeddings: str | None = None
    backend: str = "torch"
    precision: str | None = None
    coverage: float | None = None
    coverage_by_class: bool = False
    speaker_from: str | None = None
    file_list: str | None = None

    def __post_init__(self) -> None:
        if self.coverage is not None and not 0 < self.coverage < 1:
            raise PredictionError(f"coverage is {self.coverage}; it must lie between 0 and 1, such as 0.9.")
        if not 0 <= self.min_confidence <= 1:
            raise PredictionError(f"min_confidence is {self.min_confidence}; it must be between 0 and 1.")
        if self.embeddings is not None and Path(self.embeddings).suffix not in EMBEDDING_SUFFIXES:
            raise PredictionError(f"embeddings go to a file in {list(EMBEDDING_SUFFIXES)}, not {self.embeddings}.")

    @property
    def has_sets(self) -> bool:
        return self.coverage is not None or self.coverage_by_class


def main(command: argparse.Namespace) -> int:
    """`sailer predict`: 1 if a recording could not be used, else 0."""
    given: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(command).items()
    }
    names = [field.name for field in dataclasses.fields(PredictionSettings)]
    if command.speaker_from is None:
        given["file_list"] = None  # it chooses the recordings, and says nothing of how they are judged
    for name in ("output", "embeddings"):
        if ADDRESS.match(str(given[name])):
            raise PredictionError(
                f"--{name} {given[name]} is an address: results are written to folders; copy them from there, or "
                "mount the store."
            )
    settings = PredictionSettings(**{name: given[name] for name in names if name in given})
    options = inspect.signature(predict).parameters
    if command.submission == "categorical" and settings.min_confidence > 0:
        raise PredictionError("A submission decides on every file: leave --min_confidence out.")
    is_archive = (command.format or FORMATS.get(command.output.suffix)) == "parquet"
    if is_archive:
        return _predict_archive(command, settings, given)
    for name in ("engine", "actors", "part_size", "audio_column"):
        if given[name] is not None:
            raise PredictionError(f"--{name} goes with a Parquet output: end --output in .parquet.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PredictionError(f"Several processes cannot write {command.output}: end --output in .parquet.")
    if command.file_list is not None:
        given["paths"] = choose_recordings(find_recordings(command.paths), command.file_list)
    failed = predict(settings, **{name: given[name] for name in options if name in given})
    if failed:
        print(f"{failed} recordings could not be used; the column 'error' says why.")
    result = command.output
    if command.submission is not None:
        result = submit(command.submission, result, find_recordings(given["paths"]), command.file_list)
    print(f"Result: {written_name(str(result))}")
    return int(failed > 0)


def _predict_archive(command: argparse.Namespace, settings: PredictionSettings, given: dict[str, Any]) -> int:
    from sailer.inference.archive import predict_archive

    if command.submission is not None or command.file_list is not None:
        raise PredictionError("A submission is made of a CSV: end --output in .csv, or leave --submission out.")
    if command.speaker_from is not None:
        raise PredictionError("--speaker_from hears all before it judges one: end --output in .csv or .jsonl.")
    options = inspect.signature(predict_archive).parameters
    failed = predict_archive(settings, **{name: given[name] for name in options if given.get(name) is not None})
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and os.environ.get("RANK") != "0":
        return 0
    if failed:
        print(f"{failed} recordings could not be used; the column 'error' says why.")
    print(f"Result: {written_name(str(command.output))}")
    return int(failed > 0 and not several)  # a launcher would take it for a crash


def predict(
    settings: PredictionSettings,
    paths: Sequence[str],
    output: str | Path = "predictions.csv",
    format: str | None = None,
    batch_size: int = 8,
    num_workers: int = 2,
    device: str | None = None,
    dtype: str = "auto",
) -> int:
    """Judge recordings and append a row for each to `output`.

    Rows are written as results come, each at once, so that a run that was stopped goes on where it was when it is
    started again. A recording that cannot be used gets a row with its error, and is not tried again (delete that row
    for another try); one that was cut short is used as far as it goes, and its row has a warning. No recording ends
    the run: an error in the model does, if the system fails on silence too.

    A file's name that is not UTF-8 or has line ends is written as `outputs.written_name` says.

    Args:
        settings: see `PredictionSettings`.
        paths: audio files, folders (searched through; every entry with an audio suffix gets a row, whatever it is),
            globs or URLs.
        output: file to append to. Beside it are `<name>.settings.json`, and with `timeline` `<name>_timeline.csv` (or
            .jsonl) and the folder `<name>_timeline` of PNG files.
        format: "csv" or "jsonl"; by default what the output's suffix says.
        batch_size: windows that the model sees at once.
        num_workers: threads that decode ahead of the model.
        device, dtype: of the model in torch, as in transformers.

    Returns:
        Number of these recordings that could not be used, in this run or an earlier one.

    Raises:
        FileNotFoundError: a path that is nowhere, or has no audio.
        PredictionError: an unknown format, device or precision, an output or embedding file that is not ours (it stays
            as it is) or was begun with other settings, or a system that fails on silence.
        ImportError: the backend is not installed.
    """
    settings = dataclasses.replace(settings, precision=check_precision(settings.backend, settings.precision))
    output = Path(output)
    format = format or FORMATS.get(output.suffix)
    if format is None or format not in FORMATS.values():
        raise PredictionError(f"The format of {output} is not known: end it in {list(FORMATS)}, or give --format.")
    if format == "parquet":
        raise PredictionError(f"{output} is Parquet, which sailer.inference.archive.predict_archive writes.")
    files = find_recordings(paths)
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_settings(settings, output)
    classifier = load_classifier(settings, batch_size, num_workers, device, dtype)

    columns = columns_of(classifier.model.config, settings.transcriber is not None, settings.has_sets)
    of_speaker = [] if settings.speaker_from is None else ["speaker", "speaker_recordings"]
    rows = RowFile(output, ["file", "seconds", *of_speaker, *columns, "warning", "error"], format)
    timeline = embeddings = pictures = None
    if settings.timeline:
        path = output.with_name(f"{output.stem}_timeline{output.suffix}")
        pictures = path.with_suffix("")
        timeline = RowFile(path, ["file", "start", "end", *columns], format, keep=rows.files)
    if settings.embeddings is not None and settings.embeddings.endswith(".parquet"):
        raise PredictionError(f"Embeddings go to a .parquet file beside a Parquet output alone, not {output}.")
    if settings.embeddings is not None:
        embeddings = EmbeddingFile(Path(settings.embeddings), keep=rows.files)
    # Only now, as all of them are ours or new.
    _write_settings(settings, output)
    for begun in (rows, timeline, embeddings):
        if begun is not None:
            begun.begin()

    names = {file: written_name(file) for file in files}
    todo = [file for file in files if names[file] not in rows.files]
    if len(todo) < len(files):
        logger.info("%d of %d recordings are in %s already.", len(files) - len(todo), len(files), output)
    told: dict[str, dict[str, Any]] = {}
    voices: dict[str, SpeakerStatistics] = {}
    if settings.speaker_from is not None and todo:
        speakers = speakers_of(files, settings.speaker_from, settings.file_list)
        voices = voices_of(classifier, files, speakers)
        for file, speaker in zip(files, speakers, strict=True):
            others = voices[file].count if file in voices else 0
            told[file] = {"speaker": written_name(speaker), "speaker_recordings": others}
    try:
        clips = classifier.encode(todo, speaker=[voices.get(file) for file in todo])
        for file, clip in tqdm(zip(todo, clips, strict=True), total=len(files), initial=len(files) - len(todo)):
            judged = judge(names[file], clip, classifier, settings, pictures)
            if judged is None:
                if clip.timestamps:
                    check_system(classifier, clip)
                rows.append([{"file": names[file], "warning": clip.warning, "error": clip.message}])
                continue
            row, windows, embedding = judged
            if timeline is not None:
                timeline.append(windows)
            if embeddings is not None:
                embeddings.append(names[file], embedding)
            rows.append([row | told.get(file, {})])  # last: what has a row is complete
    finally:
        if embeddings is not None:
            embeddings.save(keep=rows.files)
    return len(rows.failed.intersection(names.values()))


def load_classifier(
    settings: PredictionSettings,
    batch_size: int = 8,
    num_workers: int = 2,
    device: str | None = None,
    dtype: str = "auto",
) -> SpeechEmotionPipeline:
    """The pipeline that these settings ask for.

    Raises:
        PredictionError: an unknown device or precision, or a system that needs transcripts without a transcriber.
        ValueError, ImportError: see `sailer.load`.
    """
    _check_hardware(device, dtype)
    if dtype != "auto" and settings.precision not in (None, dtype):
        raise PredictionError(f"dtype is {dtype} and precision {settings.precision}: give one of them.")
    options = {name: getattr(settings, name) for name in ("chunk_length_s", "stride_length_s", "transcriber", "prior")}
    if settings.has_sets:
        options |= {"coverage": settings.coverage, "coverage_by_class": settings.coverage_by_class}
    if settings.backend != "torch" and dtype != "auto":
        raise PredictionError(f"dtype is torch's; for the backend {settings.backend!r} give precision.")
    precision = settings.precision or (dtype if settings.backend == "torch" else None)
    classifier = load(
        settings.model,
        settings.backend,
        precision,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        **{name: value for name, value in options.items() if value is not None},
    )
    text_dropout = classifier.model.config.text_dropout
    if classifier.processor.tokenizer is not None and settings.transcriber is None and text_dropout <= 0:
        raise PredictionError(
            f"{settings.model} was trained on speech and its transcript together: name a speech-recognition model "
            "with --transcriber."
        )
    return classifier


def _check_hardware(device: str | None, dtype: str) -> None:
    if dtype not in DTYPES:
        raise PredictionError(f"dtype is {dtype!r}; choose one of {list(DTYPES)}.")
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch raises differs by device
        reason = str(error).splitlines()[0][:200]
        raise PredictionError(f"device is {device!r}, which torch cannot use here ({reason}); try cpu.") from error


def judge(
    name: str,
    clip: Clip,
    classifier: SpeechEmotionPipeline,
    settings: PredictionSettings,
    pictures: Path | None,
) -> tuple[dict[str, Any], list[dict[str, Any]], np.ndarray] | None:
    """A recording's row, those of its windows for the timeline, and its embedding; None if `clip.error` says why.

    Args:
        name: of the recording, as it is written.
        clip: what `classifier.encode` gives.
        classifier: of the settings.
        settings: what is wanted; with `timeline` the windows are given too.
        pictures: folder of the timeline's pictures; None draws none.
    """
    if clip.error is not None:
        return None
    try:
        options = {name: getattr(settings, name) for name in ("prior", "coverage", "coverage_by_class")}
        result = classifier.postprocess(clip, return_all=True, **options)
        windows = []
        if settings.timeline:
            results = classifier.postprocess(clip, return_all=True, return_timestamps=True, **options)
            windows = [
                {"file": name, "start": round(start, 3), "end": round(end, 3)}
                | row_of(window, settings.min_confidence)
                for window, (start, end) in zip(results, clip.timestamps, strict=True)
            ]
            shows = {"primary", "attributes"} & results[0].keys()  # else there is nothing that a picture would show
            if shows and pictures is not None:
                plot_timeline(name, clip.timestamps, results, pictures / picture_name(name))
    except Exception as error:
        clip.error = error
        return None
    row = {"file": name, "seconds": round(clip.timestamps[-1][1], 3), "warning": clip.warning}
    return row | row_of(result, settings.min_confidence), windows, result["embedding"]


def check_system(classifier: SpeechEmotionPipeline, clip: Clip) -> None:
    """An error past reading is the recording's own only where the system can judge silence."""
    silence = np.zeros(classifier.processor.sampling_rate, np.float32)
    try:
        classifier(silence, return_all=True, on_error="raise")
    except Exception as error:
        raise PredictionError(f"The system fails, on silence too: {clip.message}") from error


def _check_settings(settings: PredictionSettings, output: Path) -> None:
    """Refuse an output that was begun with other settings, or not by us."""
    path = _settings_path(output)
    if not os.path.lexists(path):
        if output.is_file() and output.stat().st_size > 0:
            raise PredictionError(
                f"{output} exists and is not what a stopped run left (there is no {path.name} beside it); choose "
                "another output."
            )
        return
    try:
        theirs = json.loads(path.read_bytes())
        if not isinstance(theirs, dict) or "model" not in theirs:
            raise ValueError("it holds no settings")
    except (OSError, ValueError, RecursionError) as error:
        raise PredictionError(
            f"{path} is not what a run left ({error}): choose another --output, or delete that file."
        ) from error
    if output.is_file():
        # A run of an earlier release tells nothing of options that came since, which were as by default.
        theirs = as_json(PredictionSettings(theirs["model"])) | theirs
        ours = as_json(settings)
        changed = [f"{name} was {theirs[name]!r}" for name, value in ours.items() if theirs[name] != value]
        if changed:
            raise PredictionError(
                f"{output} was begun with other settings ({'; '.join(changed)}): choose another --output, or delete "
                "that one."
            )


def _write_settings(settings: PredictionSettings, output: Path) -> None:
    with replacing(_settings_path(output)) as beside:
        beside.write_text(json.dumps(as_json(settings), indent=2) + "\n", encoding="utf-8")


def as_json(settings: PredictionSettings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))  # a pair of strides is a list there


def _settings_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.settings.json")
