"""`sailer predict --speaker_from`: whose voice a recording is, and what that speaker's other recordings say of it."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from sailer.audio_sailer import URL_PREFIXES
from sailer.inference.outputs import PredictionError, written_name
from sailer.layers_sailer import (
    SpeakerStatistics,
    check_adaptable,
    reference_of,
    set_reference,
)
from sailer.pipeline_sailer import SpeechEmotionPipeline
from sailer.windows_sailer import recording_means

logger = logging.getLogger(__name__)

FOLDER = "folder"
FILE_COLUMN = "FileName"


def speakers_of(files: Sequence[str], speaker_from: str, table: str | os.PathLike | None = None) -> list[str]:
    """Each recording's speaker; "" where it is not known.

    Args:
        files: recordings.
        speaker_from: "folder", where each speaker has one; or a column of `table`.
        table: CSV with a column FileName, of names without folders, and that one.

    Raises:
        PredictionError: a URL, which is in no folder; no table, one that cannot be read or lacks the column; or a
            recording that it does not name, or names for several speakers.
    """
    if speaker_from == FOLDER:
        remote = next((file for file in files if file.lower().startswith(URL_PREFIXES)), None)
        if remote is not None:
            raise PredictionError(f"{remote} is in no folder that would tell its speaker: name a column.")
        return [os.path.dirname(os.path.abspath(file)) for file in files]
    if table is None:
        raise PredictionError(
            f"speaker_from is {speaker_from!r}: that is a column of --file_list, which was not given; or say 'folder'."
        )
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PredictionError(f"{table} cannot be read as a CSV of speakers: {error}") from error
    columns = list(rows[0]) if rows else []
    names = next((column for column in columns if column and column.lower() == FILE_COLUMN.lower()), None)
    if names is None or speaker_from not in columns:
        raise PredictionError(f"{table} has the columns {columns}, not {FILE_COLUMN} and {speaker_from!r}.")
    named: dict[str, str] = {}
    for row in rows:
        name, speaker = row[names], (row[speaker_from] or "").strip()
        if named.setdefault(name, speaker) != speaker:
            raise PredictionError(f"{table} names {name} for two speakers, {named[name]!r} and {speaker!r}.")
    lost = [file for file in files if Path(file).name not in named]
    if lost:
        raise PredictionError(f"{table} does not name {len(lost)} of the recordings, such as {written_name(lost[0])}.")
    return [named[Path(file).name] for file in files]


def voices_of(
    classifier: SpeechEmotionPipeline, files: Sequence[str], speakers: Sequence[str]
) -> dict[str, SpeakerStatistics]:
    """For each recording what its speaker's others say of the voice, never itself: it is encoded once for that.

    A system that does not know the mean voice learns it from these recordings, which is logged.

    Args:
        classifier: the pipeline.
        files: recordings; those that cannot be used say nothing of anybody.
        speakers: of each; a recording of an unknown one ("") is not adapted.

    Raises:
        ValueError: a system that cannot be adapted; or it does not know the mean voice, and these recordings are of
            fewer than four speakers.
        PredictionError: no recording of a known speaker can be used.
    """
    check_adaptable(classifier.model)
    named = [(file, speaker) for file, speaker in zip(files, speakers, strict=True) if speaker]
    clips = classifier.encode([file for file, _ in named])
    heard = [
        (file, speaker, recording_means([clip]))
        for (file, speaker), clip in zip(
            named, tqdm(clips, desc="Hearing the speakers", total=len(named)), strict=True
        )
        if clip.error is None
    ]
    if not heard:
        raise PredictionError(f"None of the {len(named)} recordings of known speakers can be used.")
    means = torch.cat([means for _, _, (means, _) in heard])
    said = [probabilities for _, _, (_, probabilities) in heard if probabilities is not None]
    probabilities = torch.cat(said) if said else None
    if not classifier.model.config.speaker_reference:
        logger.info("This system does not know the mean voice: it is learned from these recordings.")
        set_reference(classifier.model, means, probabilities, [speaker for _, speaker, _ in heard])
    reference = reference_of(classifier.model)

    def known(rows: list[int]) -> SpeakerStatistics:
        return reference.statistics(means[rows], None if probabilities is None else probabilities[rows])

    of_speaker: dict[str, list[int]] = {}
    for row, (_, speaker, _) in enumerate(heard):
        of_speaker.setdefault(speaker, []).append(row)
    voices = {speaker: known(rows) for speaker, rows in of_speaker.items()}
    sizes = Counter(len(rows) for rows in of_speaker.values())
    if sizes[1]:
        logger.warning("%d speakers have one recording that can be used: it is judged as it is.", sizes[1])
    return {file: voices[speaker].without(known([row])) for row, (file, speaker, _) in enumerate(heard)}
