"""A recording and the page's systems go in; what each says of it, as a whole and over time, comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sailer.audio_sailer import Recording, read_audio
from sailer.inference.outputs import RowFile, by_label, columns_of, row_of
from sailer.inference.timeline import plot_timeline
from sailer.pipeline_sailer import PRIORS, SpeechEmotionPipeline
from sailer.windows_sailer import at_least

PEAKS = 600  # of the waveform's picture
MOST_WINDOWS = 240  # over time: of longer recordings the windows are further apart, and then longer
UNTOLD = "{} was only trained with transcripts, and hears speech alone here, which it may judge badly: {}."


class PageError(ValueError):
    """What the page cannot do, for whoever asked it; the message says what to do instead."""


@dataclass
class Limits:
    """How much of a recording the page takes and how finely it follows it.

    Args:
        max_seconds: longest recording.
        window_s, hop_s: what a result over time hears, and from one to the next; the last ends with the recording.

    Raises:
        ValueError: a length out of its range.
    """

    max_seconds: float = 3600.0
    window_s: float = 3.0
    hop_s: float = 1.0

    def __post_init__(self) -> None:
        at_least("max_seconds", self.max_seconds, 1)
        at_least("window_s", self.window_s, 0.1)
        at_least("hop_s", self.hop_s, 0.1)
        if self.hop_s > self.window_s:
            raise PageError(f"hop_s is {self.hop_s} and window_s {self.window_s}: choose a hop up to the window.")


@dataclass
class System:
    """A system of the page: its name there, and the pipeline."""

    name: str
    classifier: SpeechEmotionPipeline

    @property
    def reads_text(self) -> bool:
        return self.classifier.processor.tokenizer is not None

    @property
    def needs_text(self) -> bool:
        """Whether it was never trained on speech alone."""
        return self.reads_text and self.classifier.model.config.text_dropout <= 0

    def untold(self, transcriber: Any = None, way_out: str = "--transcriber MODEL gives it what is said") -> str:
        """What is to be said where it hears recordings without a transcript; "" where it was trained for that."""
        return UNTOLD.format(self.name, way_out) if self.needs_text and transcriber is None else ""

    def options(self, transcriber: Any = None) -> dict[str, Any]:
        """The pipeline's options for recordings that come without a transcript."""
        if not self.reads_text:
            return {}
        return {"transcriber": transcriber or no_words} if transcriber or self.needs_text else {}


def no_words(sources: Sequence[Any], batch_size: int = 1) -> list[dict[str, str]]:
    """A transcriber that recognises nothing: a system that was only trained with transcripts then hears speech alone,
    which the pipeline refuses without being told to, and the page says beside the result."""
    return [{"text": ""} for _ in sources]


@dataclass
class Opinion:
    """What one system says of a recording.

    Attributes:
        system: its name.
        whole: prior -> the pipeline's `return_all` of the whole recording.
        windows: prior -> the same of each window over time.
        timestamps: (start, end) of each window, in seconds.
        without_text: prior -> the whole judged on speech alone; None where no transcript was read.
        needs_text: whether the system was never trained on speech alone.
    """

    system: str
    whole: dict[str, dict[str, Any]]
    windows: dict[str, list[dict[str, Any]]]
    timestamps: list[tuple[float, float]]
    without_text: dict[str, dict[str, Any]] | None = None
    needs_text: bool = False


@dataclass
class Judged:
    """A recording as the page shows it.

    Attributes:
        name: the file's.
        seconds: its length.
        peaks: (lowest, highest) sample of each of up to `PEAKS` pieces, of full scale 1.
        opinions: of each system.
        warning: what is to be said of the file.
    """

    name: str
    seconds: float
    peaks: list[tuple[float, float]]
    opinions: list[Opinion]
    warning: str | None = None
    columns: dict[str, list[str]] = field(default_factory=dict)

    def rows(self, prior: str) -> list[dict[str, Any]]:
        """A row per system, as `sailer predict` writes it; with several systems `model` says which."""
        return [
            self._named(opinion)
            | {"file": self.name, "seconds": round(self.seconds, 3), "warning": self.warning}
            | row_of(opinion.whole[prior], 0.0)
            for opinion in self.opinions
        ]

    def window_rows(self, prior: str) -> list[dict[str, Any]]:
        """A row per system and window, as `sailer predict --timeline` writes them."""
        return [
            self._named(opinion)
            | {"file": self.name, "start": round(start, 3), "end": round(end, 3)}
            | row_of(window, 0.0)
            for opinion in self.opinions
            for window, (start, end) in zip(opinion.windows[prior], opinion.timestamps, strict=True)
        ]

    def _named(self, opinion: Opinion) -> dict[str, Any]:
        return {"model": opinion.system} if len(self.opinions) > 1 else {}

    def as_json(self, prior: str) -> dict[str, Any]:
        """Everything that the page shows, for one prior."""
        return {
            "file": self.name,
            "seconds": self.seconds,
            "prior": prior,
            "warning": self.warning,
            "systems": [
                {
                    "model": opinion.system,
                    "row": row_of(opinion.whole[prior], 0.0),
                    "result": opinion.whole[prior],
                    "without_transcript": opinion.without_text[prior] if opinion.without_text else None,
                    "windows": [
                        {"start": start, "end": end} | window
                        for window, (start, end) in zip(opinion.windows[prior], opinion.timestamps, strict=True)
                    ],
                }
                for opinion in self.opinions
            ],
        }

    def write_rows(self, path: Path, prior: str, windows: bool = False) -> Path:
        """Write `rows`, or `window_rows`, as the CSV that `sailer predict` writes."""
        own = ["model"] if len(self.opinions) > 1 else []
        columns = list(dict.fromkeys(name for opinion in self.opinions for name in self.columns[opinion.system]))
        ends = ["warning", "error"]
        header = [*own, "file", "start", "end", *columns] if windows else [*own, "file", "seconds", *columns, *ends]
        RowFile(path, header, "csv").append(self.window_rows(prior) if windows else self.rows(prior))
        return path

    def draw(self, folder: Path, prior: str) -> list[Path]:
        """A PNG per system of its emotions and attributes over time, where it has any."""
        pictures = []
        for number, opinion in enumerate(self.opinions, start=1):
            if {"primary", "attributes"} & opinion.whole[prior].keys():
                title = f"{self.name}, {opinion.system}" if len(self.opinions) > 1 else self.name
                path = folder / f"{number}.png"
                pictures.append(plot_timeline(title, opinion.timestamps, opinion.windows[prior], path))
        return pictures


def judge(
    path: Path,
    systems: Sequence[System],
    limits: Limits,
    transcript: str | None = None,
    transcriber: Any = None,
    name: str | None = None,
) -> Judged:
    """Hear a recording by each system: as a whole, exactly as `sailer predict` does, and over time.

    Args:
        path: audio file.
        systems: one or two.
        limits: lengths; a recording so long that it would have more than `MOST_WINDOWS` gets longer hops.
        transcript: what is said; read by systems that read transcripts.
        transcriber: speech recognition for those, where there is no transcript.
        name: what results call the file; by default its own.

    Raises:
        PageError: too long.
        ValueError, OSError: not audio, or too short.
    """
    name = path.name if name is None else name
    transcript = (transcript or "").strip() or None
    rate = systems[0].classifier.processor.sampling_rate
    recording, seconds = read_limited(path, rate, limits, name)
    untold = [] if transcript else [system.untold(transcriber, "type what is said") for system in systems]
    warning = _joined(recording.warning, *untold)
    judged = Judged(name, seconds, _peaks(recording.waveform), [], warning)
    for system in systems:
        if system.classifier.processor.sampling_rate != rate:
            rate = system.classifier.processor.sampling_rate
            recording = read_audio(path, rate, name=name)
        judged.opinions.append(_heard(recording.waveform, system, limits, transcript, transcriber))
        has_text = system.reads_text and transcriber is not None
        judged.columns[system.name] = columns_of(system.classifier.model.config, has_text)
    return judged


def hear_file(
    path: Path, system: System, limits: Limits, prior: str, transcriber: Any = None, **options: Any
) -> tuple[dict[str, Any], float, str | None]:
    """A recording as a whole: the pipeline's `return_all`, its length in seconds, and what is to be said of the file.

    Args:
        options: of the pipeline's call.

    Raises:
        PageError, ValueError, OSError: see `judge`.
    """
    recording, seconds = read_limited(path, system.classifier.processor.sampling_rate, limits)
    audio = {"array": recording.waveform, "sampling_rate": system.classifier.processor.sampling_rate}
    options |= {"return_all": True, "return_embedding": False, "prior": prior}
    result = system.classifier(audio, **system.options(transcriber), **options)
    return result, seconds, _joined(recording.warning, system.untold(transcriber))


def difference(one: Opinion, other: Opinion, prior: str) -> tuple[float, list[tuple[str, float, float]]]:
    """Half the sum of the absolute differences of two systems' probabilities, in [0, 1], and those of each label that
    both have, the largest difference first."""
    first, second = (by_label(opinion.whole[prior].get("primary", [])) for opinion in (one, other))
    labels = first.keys() | second.keys()
    distance = sum(abs(first.get(label, 0) - second.get(label, 0)) for label in labels) / 2
    rows = [(label, first[label], second[label]) for label in first if label in second]
    return distance, sorted(rows, key=lambda row: -abs(row[1] - row[2]))


def disagreements(one: Opinion, other: Opinion, prior: str) -> list[tuple[float, float, str, str]]:
    """Windows on which two systems decide differently: start, end, and both decisions."""
    pairs = zip(one.timestamps, one.windows[prior], other.windows[prior], strict=False)
    return [
        (start, end, first["label"], second["label"])
        for (start, end), first, second in pairs
        if "label" in first and "label" in second and first["label"] != second["label"]
    ]


def windows_over(seconds: float, limits: Limits, longest: float) -> tuple[float, float]:
    """Window and hop, in seconds, that follow a recording with about `MOST_WINDOWS` results at most.

    Args:
        seconds: the recording's.
        limits: the window and hop of a short one.
        longest: what the system hears at once.
    """
    hop = max(limits.hop_s, math.ceil(10 * seconds / MOST_WINDOWS) / 10)
    window = min(max(limits.window_s, hop), longest)
    return window, min(hop, window)


def read_limited(path: Path, rate: int, limits: Limits, name: str | None = None) -> tuple[Recording, float]:
    """A recording at `rate` Hz and its length in seconds; `name` is what messages call it, by default the file's.

    Raises:
        PageError: it is too long.
        ValueError, OSError: not audio.
    """
    name = path.name if name is None else name
    recording = read_audio(path, rate, limits.max_seconds + 1, name=name)
    seconds = len(recording.waveform) / rate
    if seconds > limits.max_seconds:
        raise PageError(
            f"{name} is longer than {_minutes(limits.max_seconds)}, which is what this page takes: cut it, or run "
            "`sailer predict` on it."
        )
    return recording, seconds


def _heard(waveform: np.ndarray, system: System, limits: Limits, transcript: str | None, transcriber: Any) -> Opinion:
    classifier = system.classifier
    audio = {"array": waveform, "sampling_rate": classifier.processor.sampling_rate}
    source = {"audio": audio, "text": transcript} if transcript and system.reads_text else audio
    whole = _encoded(classifier, source, **system.options(transcriber))
    heard = whole.text or " ".join(whole.texts[index] for index in sorted(whole.texts)) or None
    if heard:
        source = {"audio": audio, "text": heard}
    seconds = len(waveform) / classifier.processor.sampling_rate
    window, hop = windows_over(seconds, limits, classifier.model.config.max_seconds)
    windows = {"chunk_length_s": window, "stride_length_s": (0, window - hop)}
    over_time = _encoded(classifier, source, **system.options(), **windows)
    opinion = Opinion(system.name, _whole(classifier, whole), {}, over_time.timestamps, needs_text=system.needs_text)
    for prior in PRIORS:
        opinion.windows[prior] = classifier.postprocess(
            over_time, return_all=True, return_timestamps=True, prior=prior, return_embedding=False
        )
        for result in opinion.windows[prior]:  # times stand beside, and what was said stands once
            del result["timestamp"]
            result.pop("transcript", None)
    if heard:
        opinion.without_text = _whole(classifier, _encoded(classifier, audio, **system.options()))
    return opinion


def _joined(*warnings: str | None) -> str | None:
    return " ".join(filter(None, warnings)) or None


def _encoded(classifier: SpeechEmotionPipeline, source: Any, **options: Any) -> Any:
    (clip,) = classifier.encode([source], **options)
    if clip.error is not None:
        raise clip.error
    return clip


def _whole(classifier: SpeechEmotionPipeline, clip: Any) -> dict[str, dict[str, Any]]:
    found = {
        prior: classifier.postprocess(clip, return_all=True, prior=prior, return_embedding=False) for prior in PRIORS
    }
    for result in found.values():
        if not result.get("transcript", True):
            del result["transcript"]
    return found


def _peaks(waveform: np.ndarray) -> list[tuple[float, float]]:
    pieces: Iterable[np.ndarray] = np.array_split(waveform, min(PEAKS, len(waveform)))
    return [(round(float(piece.min()), 4), round(float(piece.max()), 4)) for piece in pieces]


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 120 else f"{seconds:g} seconds"
