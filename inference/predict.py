"""Files, folders and globs in; a row per recording out, as CSV or JSON Lines, that a stopped run can go on with."""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import inspect
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sailer.atomic import replacing
from sailer.configuration_sailer import ATTRIBUTES, SailerConfig
from sailer.modeling_sailer import SailerForAudioClassification
from sailer.pipeline_sailer import SpeechEmotionPipeline
from sailer.processing_sailer import SailerProcessor
from sailer.windows_sailer import Clip

if TYPE_CHECKING:
    import argparse

logger = logging.getLogger(__name__)

AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64"}
FORMATS = {".csv": "csv", ".jsonl": "jsonl"}
EMBEDDING_SUFFIXES = (".safetensors", ".npz")
UNDECIDED = "undecided"
DECIMALS = 6


class PredictionError(ValueError):
    """A prediction that cannot start; the message names the path or option and the way out."""


@dataclass
class PredictionSettings:
    """How recordings are judged; kept beside the results, because a run is only continued with the same.

    Args:
        model: folder or Hub id of a SAILER system.
        prior: "balanced" or "natural" scores.
        min_confidence: decisions whose score is below are marked "undecided".
        chunk_length_s, stride_length_s: windows over long audio, as in the pipeline.
        transcriber: speech-recognition model for systems that read transcripts.
        timeline: also write a row per window, and a PNG per recording.
        embeddings: file for the clips' embeddings, .safetensors or .npz.

    Raises:
        PredictionError: a confidence outside [0, 1], or embeddings to a file of another kind.
    """

    model: str
    prior: str = "balanced"
    min_confidence: float = 0.0
    chunk_length_s: float | None = None
    stride_length_s: float | None = None
    transcriber: str | None = None
    timeline: bool = False
    embeddings: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise PredictionError(f"min_confidence is {self.min_confidence}; it must be between 0 and 1.")
        if self.embeddings is not None and Path(self.embeddings).suffix not in EMBEDDING_SUFFIXES:
            raise PredictionError(f"embeddings go to a file in {list(EMBEDDING_SUFFIXES)}, not {self.embeddings}.")


def main(command: argparse.Namespace) -> int:
    """`sailer predict`: 1 if a recording could not be used, else 0."""
    given: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(command).items()
    }
    names = [field.name for field in dataclasses.fields(PredictionSettings)]
    settings = PredictionSettings(**{name: given[name] for name in names if name in given})
    options = inspect.signature(predict).parameters
    failed = predict(settings, **{name: given[name] for name in options if name in given})
    if failed:
        print(f"{failed} recordings could not be used; the column 'error' says why.")
    print(f"Result: {command.output}")
    return int(failed > 0)


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
    started again. A recording that cannot be used gets a row with its error, and is not tried again.

    Args:
        settings: see `PredictionSettings`.
        paths: audio files, folders (searched through, for files with an audio suffix), globs or URLs.
        output: file to append to. Beside it are `<name>.settings.json`, and with `timeline` `<name>_timeline.csv` (or
            .jsonl) and the folder `<name>_timeline` of PNG files.
        format: "csv" or "jsonl"; by default what the output's suffix says.
        batch_size: windows that the model sees at once.
        num_workers: threads that decode ahead of the model.
        device, dtype: of the model, as in transformers.

    Returns:
        Number of these recordings that could not be used, in this run or an earlier one.

    Raises:
        FileNotFoundError: a path that is nowhere, or has no audio.
        PredictionError: an unknown format, or an output that was begun with other settings.
    """
    output = Path(output)
    format = format or FORMATS.get(output.suffix)
    if format is None or format not in FORMATS.values():
        raise PredictionError(f"The format of {output} is not known: end it in {list(FORMATS)}, or give --format.")
    files = find_recordings(paths)
    output.parent.mkdir(parents=True, exist_ok=True)
    _keep_settings(settings, output)
    classifier = load_classifier(settings, batch_size, num_workers, device, dtype)

    columns = _columns(classifier.model.config, settings.transcriber is not None)
    rows = RowFile(output, ["file", "seconds", *columns, "error"], format)
    timeline = embeddings = None
    if settings.timeline:
        path = output.with_name(f"{output.stem}_timeline{output.suffix}")
        timeline = RowFile(path, ["file", "start", "end", *columns], format, keep=rows.files)
    if settings.embeddings is not None:
        embeddings = EmbeddingFile(Path(settings.embeddings), keep=rows.files)
    todo = [file for file in files if file not in rows.files]
    if len(todo) < len(files):
        logger.info("%d of %d recordings are in %s already.", len(files) - len(todo), len(files), output)
    try:
        clips = classifier.encode(todo)
        for file, clip in tqdm(zip(todo, clips, strict=True), total=len(files), initial=len(files) - len(todo)):
            if clip.error is not None:
                rows.append([{"file": file, "error": str(clip.error)}])
                continue
            result = classifier.postprocess(clip, return_all=True, prior=settings.prior)
            if timeline is not None:
                _write_timeline(file, clip, classifier, settings, timeline)
            if embeddings is not None:
                embeddings.append(file, result["embedding"])
            # Last: what has a row is complete.
            seconds = round(clip.timestamps[-1][1], 3)
            rows.append([{"file": file, "seconds": seconds} | _flat(result, settings.min_confidence)])
    finally:
        if embeddings is not None:
            embeddings.save()
    return len(rows.failed.intersection(files))


def find_recordings(paths: Iterable[str]) -> list[str]:
    """Audio files that paths, folders and globs stand for, in their order and each once; URLs stay.

    Raises:
        FileNotFoundError: a path that is nowhere, or has no audio.
    """
    found: dict[Any, str] = {}
    for path in map(str, paths):
        if path.startswith(("http://", "https://")):
            found.setdefault(path, path)
            continue
        if Path(path).is_file():
            files = [path]
        elif Path(path).is_dir():
            files = _audio_below(Path(path))
        else:
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise FileNotFoundError(f"{path}: no such file or folder, and nothing matches it.")
            files = [
                file for match in matches for file in (_audio_below(Path(match)) if Path(match).is_dir() else [match])
            ]
        if not files:
            raise FileNotFoundError(f"{path} has no audio files ({', '.join(sorted(AUDIO_SUFFIXES))}).")
        for file in files:
            found.setdefault(Path(file).resolve(), file)
    return list(found.values())


def load_classifier(
    settings: PredictionSettings,
    batch_size: int = 8,
    num_workers: int = 2,
    device: str | None = None,
    dtype: str = "auto",
) -> SpeechEmotionPipeline:
    """The pipeline that these settings ask for.

    Raises:
        PredictionError: the system needs transcripts, and there is no transcriber.
    """
    model = SailerForAudioClassification.from_pretrained(settings.model, dtype=dtype)
    processor = SailerProcessor.from_pretrained(settings.model)
    if processor.tokenizer is not None and settings.transcriber is None and model.config.text_dropout <= 0:
        raise PredictionError(
            f"{settings.model} was trained on speech and its transcript together: name a speech-recognition model "
            "with --transcriber."
        )
    options = {name: getattr(settings, name) for name in ("chunk_length_s", "stride_length_s", "transcriber", "prior")}
    return SpeechEmotionPipeline(
        model=model,
        processor=processor,
        device=device,
        batch_size=batch_size,
        num_workers=num_workers,
        **{name: value for name, value in options.items() if value is not None},
    )


class RowFile:
    """A table to which rows are appended, a line each; what an interruption left of a last line is dropped.

    Args:
        path: file to go on with, or to begin.
        columns: of each row.
        format: "csv" or "jsonl".
        keep: files whose rows stay; all by default.

    Raises:
        PredictionError: the file holds something else.
    """

    def __init__(self, path: Path, columns: Sequence[str], format: str, keep: set[str] | None = None) -> None:
        self.path, self.columns, self.format = path, list(columns), format
        rows = self.read() if path.is_file() else []
        if keep is not None:
            rows = [row for row in rows if row["file"] in keep]
        self.files = {row["file"] for row in rows}
        self.failed = {row["file"] for row in rows if row.get("error")}
        lines: list[Mapping[str, Any] | Sequence[str]] = [self.columns, *rows] if format == "csv" else [*rows]
        with replacing(path) as beside:
            beside.write_text("".join(map(self._line, lines)), encoding="utf-8", newline="")

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows at once, so that no interruption loses them."""
        rows = list(rows)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write("".join(map(self._line, rows)))
        self.files.update(row["file"] for row in rows)
        self.failed.update(row["file"] for row in rows if row.get("error"))

    def read(self) -> list[dict[str, Any]]:
        """The whole rows of the file; a CSV's values are strings."""
        whole, newline, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        lines = (whole + newline).split("\n")[:-1]
        try:
            if self.format == "jsonl":
                rows = [json.loads(line) for line in lines]
            else:
                header, *rest = list(csv.reader(lines)) or [self.columns]
                if header != self.columns:
                    raise ValueError(f"its columns are {header[:4]}...")
                rows = [dict(zip(header, values, strict=True)) for values in rest]
            if not all({"file"} <= set(row) <= set(self.columns) for row in rows):
                raise ValueError("its rows have other columns")
        except (ValueError, TypeError) as error:
            raise PredictionError(
                f"{self.path} exists and is not what a stopped run left ({error}); choose another output."
            ) from error
        return rows

    def _line(self, row: Mapping[str, Any] | Sequence[str]) -> str:
        values = [row.get(name) for name in self.columns] if isinstance(row, Mapping) else row
        # A row must stay on its line.
        values = [" ".join(value.splitlines()) if isinstance(value, str) else value for value in values]
        if self.format == "jsonl":
            filled = {name: value for name, value in zip(self.columns, values, strict=True) if value is not None}
            return json.dumps(filled, ensure_ascii=False) + "\n"
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        return line.getvalue()


class EmbeddingFile:
    """Embeddings by file: kept in a journal while they come, saved as one matrix at the end of a run.

    A .npz holds `files` (n,) and `embeddings` (n, width), float32; a .safetensors holds `embeddings`, and the files as
    a JSON list in its metadata.

    Args:
        path: file to write, or to add to.
        keep: files whose embeddings stay.
    """

    def __init__(self, path: Path, keep: set[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.embeddings = self._load() if path.is_file() else {}
        self._journal = RowFile(path.with_name(f"{path.name}.part"), ["file", "embedding"], "jsonl", keep)
        for row in self._journal.read():
            self.embeddings[row["file"]] = np.array(row["embedding"], np.float32)
        self.embeddings = {file: value for file, value in self.embeddings.items() if file in keep}

    def append(self, file: str, embedding: np.ndarray) -> None:
        """Keep one embedding of shape (width,)."""
        self.embeddings[file] = embedding.astype(np.float32)
        self._journal.append([{"file": file, "embedding": self.embeddings[file].tolist()}])

    def save(self) -> None:
        """Write the matrix and end the journal."""
        files = list(self.embeddings)
        matrix = np.stack(list(self.embeddings.values())) if files else np.zeros((0, 0), np.float32)
        with replacing(self.path) as beside:
            if self.path.suffix == ".npz":
                with beside.open("wb") as file:
                    np.savez(file, files=np.array(files, dtype=str), embeddings=matrix)
            else:
                from safetensors.numpy import save_file

                save_file({"embeddings": matrix}, beside, metadata={"files": json.dumps(files)})
        self._journal.path.unlink()

    def _load(self) -> dict[str, np.ndarray]:
        if self.path.suffix == ".npz":
            with np.load(self.path) as stored:
                return dict(zip(stored["files"].tolist(), stored["embeddings"], strict=True))
        from safetensors import safe_open

        with safe_open(self.path, framework="np") as stored:
            return dict(zip(json.loads(stored.metadata()["files"]), stored.get_tensor("embeddings"), strict=True))


def plot_timeline(
    name: str, timestamps: Sequence[tuple[float, float]], results: Sequence[Mapping], path: Path
) -> Path:
    """Draw emotions (shares of the height) and attributes over time.

    Args:
        name: title.
        timestamps: (start, end) of each window, in seconds.
        results: of each window, as the pipeline's `return_all=True` gives them.
        path: PNG to write.
    """
    from matplotlib import color_sequences
    from matplotlib.figure import Figure

    panels = [panel for panel in ("primary", "attributes") if panel in results[0]]
    figure = Figure(figsize=(10, 1 + 2.6 * len(panels)), layout="constrained")
    start, end = timestamps[0][0], timestamps[-1][1]
    # A window's result stands at its middle; the first and last also hold out to the ends.
    times = [start, *((left + right) / 2 for left, right in timestamps), end]
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        series = [_scores(result[panel]) for result in (results[0], *results, results[-1])]
        labels = sorted(series[0]) if panel == "primary" else list(ATTRIBUTES)
        values = [[row[label] for row in series] for label in labels]
        if panel == "primary":
            axes.stackplot(times, values, labels=labels, colors=color_sequences["tab10"], alpha=0.85)
            axes.set_ylabel("probability")
        else:
            for label, line in zip(labels, values, strict=True):
                axes.plot(times, line, label=label, linewidth=2)
            axes.grid(alpha=0.3)
            axes.set_ylabel("attribute, 0 to 1")
        axes.set(xlim=(start, end), ylim=(0, 1))
        axes.legend(
            loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="small", reverse=panel == "primary"
        )
    axes.set_xlabel("seconds")
    figure.suptitle(name, fontsize="medium")
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    return path


def _write_timeline(
    file: str, clip: Clip, classifier: SpeechEmotionPipeline, settings: PredictionSettings, timeline: RowFile
) -> None:
    windows = classifier.postprocess(clip, return_all=True, return_timestamps=True, prior=settings.prior)
    timeline.append(
        {"file": file, "start": round(start, 3), "end": round(end, 3)} | _flat(window, settings.min_confidence)
        for window, (start, end) in zip(windows, clip.timestamps, strict=True)
    )
    if not {"primary", "attributes"} & windows[0].keys():
        return  # nothing that a picture would show
    name = f"{Path(file).stem}-{hashlib.sha256(file.encode()).hexdigest()[:8]}.png"  # stems repeat across folders
    plot_timeline(file, clip.timestamps, windows, timeline.path.with_suffix("") / name)


def _columns(config: SailerConfig, has_transcripts: bool) -> list[str]:
    columns = ["label", "score", *config.labels] if "primary" in config.heads else []
    if "attributes" in config.heads:
        columns += ATTRIBUTES
    if "secondary" in config.heads:
        columns += [_secondary(label) for label in config.secondary_labels]
    if "sex" in config.heads:
        columns += config.sex_labels
    return columns + ["age"] * ("age" in config.heads) + ["transcript"] * has_transcripts


def _flat(result: Mapping[str, Any], min_confidence: float) -> dict[str, Any]:
    scores = _scores(result.get("primary", []))
    row: dict[str, Any] = {}
    if scores:
        score = scores[result["label"]]
        row = {"label": result["label"] if score >= min_confidence else UNDECIDED, "score": score}
    row |= scores | _scores(result.get("attributes", {})) | _scores(result.get("sex", []))
    row |= {_secondary(label): score for label, score in _scores(result.get("secondary", [])).items()}
    row |= {name: result[name] for name in ("age", "transcript") if name in result}
    return {name: round(value, DECIMALS) if isinstance(value, float) else value for name, value in row.items()}


def _scores(values: Mapping[str, float] | Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return dict(values) if isinstance(values, Mapping) else {row["label"]: row["score"] for row in values}


def _secondary(label: str) -> str:
    return label if label.startswith("secondary_") else f"secondary_{label}"


def _audio_below(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file())


def _keep_settings(settings: PredictionSettings, output: Path) -> None:
    path = output.with_name(f"{output.name}.settings.json")
    ours = dataclasses.asdict(settings)
    if output.is_file() and path.is_file():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{name} was {theirs.get(name)!r}" for name, value in ours.items() if theirs.get(name) != value]
        if changed:
            raise PredictionError(
                f"{output} was begun with other settings ({'; '.join(changed)}): choose another --output, or delete "
                "that one."
            )
    with replacing(path) as beside:
        beside.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
