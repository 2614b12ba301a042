"""RAVDESS (Livingstone & Russo 2018): acted speech of 24 actors, its labels read from the file names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from sailer.data.corpora import About, corpus, label_indices
from sailer.data.corpora.audio_files import audio_reference, is_audio, read_durations, walk_files
from sailer.data.corpora.splits import actor_splits
from sailer.data.schema import CorpusError, CorpusReport, LabelSet

NUMBER_OF_ACTORS = 24
EMOTIONS = {
    **{"01": "Neutral", "02": "Calm", "03": "Happy", "04": "Sad"},
    **{"05": "Angry", "06": "Fear", "07": "Disgust", "08": "Surprise"},
}
STATEMENTS = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}
_NAME = re.compile(
    r"(?P<modality>0[1-3])-(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])"
    r"-(?P<statement>0[12])-(?P<repetition>0[12])-(?P<actor>0[1-9]|1\d|2[0-4])"
)
_AUDIO_ONLY, _SPEECH = "03", "01"


@dataclass(frozen=True)
class _Clip:
    path: Path
    emotion: str
    statement: str
    actor: int


@corpus(
    "ravdess",
    about=About(
        title="RAVDESS",
        license="cc-by-nc-sa-4.0",
        link="https://zenodo.org/records/1188976",
        languages=("en",),
        kin="Its songs and its videos are of the same 24 actors.",
    ),
)
def load(
    path: Path,
    *,
    label_set: LabelSet,
    audio: bool,
    strict: bool,
    report: CorpusReport,
    train_actors: str | Sequence[int] = "1-16",
    validation_actors: str | Sequence[int] = "17-18",
    test_actors: str | Sequence[int] = "19-20",
) -> dict[str, dict[str, Any]]:
    """Columns of the canonical row per split, from the released folders (48 kHz WAV) or any copy with the same names.

    The acted emotion is the label and stands as the one vote: the release has no single raters. Calm counts as
    Neutral unless the label set has a class "Calm"; an emotion outside the label set counts as "Other". Songs, video,
    further copies of a clip and actors of no split are left out and counted; clips of an actor that hold the same
    recording (there is such a pair of actor 07) are kept and noted. For the other parameters of every
    loader see `sailer.data.corpora`.

    Args:
        path: the folder that holds the Actor_XX folders, at any depth.
        audio: False takes the labels from the file names and opens no file; durations are then unknown.
        strict: raise on an audio file that cannot be read, has another name, or an emotion without a class.
        train_actors, validation_actors, test_actors: actor numbers of each split, as a list or as "1-8,11"; no actor
            may be in two. By default actors 21 to 24 are in none.

    Raises:
        CorpusError: no RAVDESS speech in the folder, impossible or shared actors, or what `strict` refuses.
    """
    split_of = actor_splits(
        "RAVDESS",
        range(1, NUMBER_OF_ACTORS + 1),
        train_actors=train_actors,
        validation_actors=validation_actors,
        test_actors=test_actors,
    )
    clips = _in_splits(_find_clips(path, strict, report), split_of, report)
    classes = _classes(clips, label_set, strict, report)
    clips = [clip for clip in clips if classes[clip.emotion] is not None]
    durations = [float("nan")] * len(clips)
    if audio:
        found = read_durations([clip.path for clip in clips], strict=strict, report=report)
        clips = [clip for clip, duration in zip(clips, found, strict=True) if duration is not None]
        durations = [duration for duration in found if duration is not None]
        _note_equal_recordings(clips, durations, report)

    labels = np.array([classes[clip.emotion] for clip in clips], dtype=np.int16)
    columns: dict[str, Any] = {
        "id": [clip.path.stem for clip in clips],
        "audio": [audio_reference(clip.path) if audio else None for clip in clips],
        "duration": durations,
        "transcript": [STATEMENTS[clip.statement] for clip in clips],
        "votes": np.eye(len(label_set.labels), dtype=np.float32)[labels],
        "label": labels,
        "speaker": [f"ravdess-{clip.actor:02d}" for clip in clips],
        "sex": ["male" if clip.actor % 2 else "female" for clip in clips],
    }
    splits = {}
    for split in ("train", "validation", "test"):
        rows = [row for row, clip in enumerate(clips) if split_of[clip.actor] == split]
        splits[split] = {name: [values[row] for row in rows] for name, values in columns.items()}
    return splits


def _find_clips(folder: Path, strict: bool, report: CorpusReport) -> list[_Clip]:
    """The speech clips by name; everything else that is audio or named like a clip is counted, or refused."""
    clips: dict[str, _Clip] = {}
    for path in walk_files(folder):
        name = _NAME.fullmatch(path.stem)
        if name is None:
            if is_audio(path) and strict:
                raise CorpusError(
                    f"{path} does not have a RAVDESS file name (such as 03-01-05-01-01-01-01.wav). "
                    "Take it out of the folder, or load with strict=False to leave such files out."
                )
            if is_audio(path):
                report.leave_out("not a RAVDESS file name", str(path))
        elif name["modality"] != _AUDIO_ONLY or not is_audio(path):
            report.leave_out("video (only modality 03 is audio alone)", str(path))
        elif name["channel"] != _SPEECH:
            report.leave_out("song (channel 02)", str(path))
        elif path.stem in clips:
            report.leave_out("further copy of a clip", str(path))
        else:
            clips[path.stem] = _Clip(path, EMOTIONS[name["emotion"]], name["statement"], int(name["actor"]))
    if not clips:
        found = " ".join(report.lines())
        raise CorpusError(
            f"No RAVDESS speech (such as Actor_01/03-01-05-01-01-01-01.wav) in {folder}. {found} "
            "Give the folder that holds the Actor_XX folders of Audio_Speech_Actors_01-24.zip."
        )
    return list(clips.values())


def _in_splits(clips: list[_Clip], split_of: dict[int, str], report: CorpusReport) -> list[_Clip]:
    for clip in clips:
        if clip.actor not in split_of:
            report.leave_out("its actor is in no split", str(clip.path))
    if absent := sorted(set(split_of) - {clip.actor for clip in clips}):
        report.note(f"No clips of actors {absent}, which the splits name.")
    return [clip for clip in clips if clip.actor in split_of]


def _classes(clips: list[_Clip], label_set: LabelSet, strict: bool, report: CorpusReport) -> dict[str, int | None]:
    """The class of each emotion that occurs; None, refused if `strict`, where the label set has none for it."""
    occurring = sorted({clip.emotion for clip in clips})
    named = {emotion: emotion for emotion in occurring}
    if "Calm" not in label_set.labels and "Calm" in named:
        named["Calm"] = "Neutral"
    indices = label_indices(sorted(set(named.values())), label_set, report)
    classes = {emotion: indices[name] for emotion, name in named.items()}
    for clip in clips:
        if classes[clip.emotion] is None:
            if strict:
                raise CorpusError(
                    f"{clip.path} is {named[clip.emotion]}, which is not in the label set {list(label_set.labels)}. "
                    "Add 'Other' to the label set, or load with strict=False to leave such clips out."
                )
            report.leave_out(f"{named[clip.emotion]} is not in the label set", str(clip.path))
    return classes


def _note_equal_recordings(clips: list[_Clip], durations: list[float], report: CorpusReport) -> None:
    """Note clips of one actor with the same samples; only those of the same size and duration are decoded."""
    candidates = defaultdict(list)
    for clip, duration in zip(clips, durations, strict=True):
        candidates[clip.actor, clip.path.stat().st_size, duration].append(clip.path)
    for paths in candidates.values():
        first_with: dict[bytes, Path] = {}
        for path in paths if len(paths) > 1 else ():
            samples, _ = soundfile.read(path, dtype="int16")
            first = first_with.setdefault(samples.tobytes(), path)
            if first != path:
                report.note(f"{first.stem} and {path.stem} are the same recording; both are kept.")
