"""Missing transcripts filled by a speech-recognition pipeline, and written to a file that marks and resumes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Value
from tqdm.auto import tqdm

from sailer.audio_sailer import load_audio
from sailer.data.schema import CorpusError

SAMPLING_RATE = 16000
# Longer clips are recognised in windows of this many seconds, which is what Whisper hears at once.
WINDOW_SECONDS = 30

Transcriber = Callable[..., Sequence[Mapping[str, Any]]]


def fill_transcripts(
    datasets: Mapping[str, Dataset],
    transcriber: str | Transcriber,
    transcripts_file: str | Path,
    *,
    batch_size: int = 8,
    device: str | int | None = None,
    generate_kwargs: Mapping[str, Any] | None = None,
) -> tuple[DatasetDict, dict[str, int]]:
    """Transcribe the clips that have a recording and no transcript.

    Each result is a line of `transcripts_file` as soon as it is there: {"split", "id", "transcript", "transcriber"}.
    That file is what marks a transcript as machine-made, and what a second call goes on from: clips that the same
    transcriber has done, even if it heard nothing, are not done again.

    Args:
        datasets: split -> canonical rows.
        transcriber: Hub id or folder of a speech-recognition model, or a pipeline (anything that takes a list of
            {"raw", "sampling_rate"} and returns a list of {"text"}).
        transcripts_file: JSON Lines, created or continued.
        batch_size: clips per call of the pipeline.
        device: where a model given by name runs; by default where transformers puts it.
        generate_kwargs: for a model that generates, such as {"language": "en"}.

    Returns:
        The rows with the transcripts filled in, and split -> number of machine-made transcripts (empty ones not
        counted).

    Raises:
        CorpusError: a model that cannot be loaded, a line of the file that is no transcript, a recording that cannot
            be decoded.
    """
    transcripts_file = Path(transcripts_file)
    name = transcriber if isinstance(transcriber, str) else _name(transcriber)
    done = read_transcripts(transcripts_file, name)
    rows = {
        split: [
            row
            for row, (clip, text) in enumerate(zip(dataset["id"], dataset["transcript"], strict=True))
            if not text and (split, clip) not in done
        ]
        for split, dataset in datasets.items()
    }
    if any(rows.values()):
        recognise = _pipeline(transcriber, device) if isinstance(transcriber, str) else transcriber
        options = {"generate_kwargs": dict(generate_kwargs)} if generate_kwargs else {}
        transcripts_file.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(transcripts_file, "a", encoding="utf-8") as file,
            tqdm(total=sum(map(len, rows.values())), desc="Transcribing", unit="clip") as progress,
        ):
            for split, dataset in datasets.items():
                for clips, texts in _recognised(dataset, rows[split], recognise, batch_size, options):
                    for clip, text in zip(clips, texts, strict=True):
                        done[split, clip] = text
                        line = {"split": split, "id": clip, "transcript": text, "transcriber": name}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()
                    progress.update(len(clips))
    return _filled(datasets, done)


def read_transcripts(transcripts_file: str | Path, transcriber: str | None = None) -> dict[tuple[str, str], str]:
    """(split, clip) -> machine-made transcript, of one transcriber or of all.

    A last line that was cut off when a run was stopped is removed from the file.

    Raises:
        CorpusError: another line that is no transcript.
    """
    path = Path(transcripts_file)
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    done: dict[tuple[str, str], str] = {}
    for number, line in enumerate(whole.decode("utf-8").split("\n"), start=1):
        if line:
            try:
                entry = json.loads(line)
                if transcriber in (None, entry["transcriber"]):
                    done[entry["split"], entry["id"]] = entry["transcript"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise CorpusError(f"{path}, line {number}: {line[:80]!r} is no transcript. Remove the line.") from None
    return done


def _filled(
    datasets: Mapping[str, Dataset], done: Mapping[tuple[str, str], str]
) -> tuple[DatasetDict, dict[str, int]]:
    filled, made = DatasetDict(), {}
    for split, dataset in datasets.items():
        texts = list(dataset["transcript"])
        machine = [
            done.get((split, clip), "") if not text else "" for clip, text in zip(dataset["id"], texts, strict=True)
        ]
        made[split] = sum(map(bool, machine))
        if made[split]:
            texts = [text or other for text, other in zip(texts, machine, strict=True)]
            names = dataset.column_names
            dataset = dataset.remove_columns("transcript").add_column("transcript", texts, feature=Value("string"))
            dataset = dataset.select_columns(names)
        filled[split] = dataset
    return filled, made


def _recognised(
    dataset: Dataset, rows: Sequence[int], recognise: Transcriber, batch_size: int, options: Mapping[str, Any]
) -> Iterator[tuple[list[str], list[str]]]:
    """Ids and texts of each batch of the rows that have a recording."""
    for start in range(0, len(rows), batch_size):
        batch = dataset.select(rows[start : start + batch_size])
        clips: list[str] = []
        inputs: list[dict[str, Any]] = []
        for clip, audio in zip(batch["id"], batch["audio"], strict=True):
            if audio["path"] or audio["bytes"]:
                try:
                    waveform = load_audio(audio, SAMPLING_RATE)
                except (OSError, ValueError) as error:
                    raise CorpusError(f"Clip {clip!r} cannot be transcribed: {error}") from error
                clips.append(clip)
                inputs.append({"raw": waveform, "sampling_rate": SAMPLING_RATE})
        if clips:
            longest = max(len(entry["raw"]) for entry in inputs) / SAMPLING_RATE
            window = {"chunk_length_s": WINDOW_SECONDS} if longest > WINDOW_SECONDS else {}
            results = recognise(inputs, batch_size=batch_size, **window, **options)
            yield clips, [" ".join(result["text"].split()) for result in results]


def _pipeline(model: str, device: str | int | None) -> Transcriber:
    from transformers import pipeline

    try:
        return pipeline("automatic-speech-recognition", model=model, device=device)
    except (OSError, ValueError) as error:
        raise CorpusError(f"The transcriber {model} cannot be loaded: {error}") from error


def _name(transcriber: Transcriber) -> str:
    model_name = getattr(getattr(transcriber, "model", None), "name_or_path", "")
    return model_name or getattr(transcriber, "__name__", type(transcriber).__name__)
