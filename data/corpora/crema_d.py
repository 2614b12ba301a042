"""CREMA-D (Cao et al. 2014): acted speech of 91 actors and raters' votes on the voice alone, in canonical rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sailer.data.corpora import About, corpus
from sailer.data.corpora.audio_files import is_audio
from sailer.data.corpora.files import FileIndex, Problems, attach_recordings, clip_id, find_entry, read_rows
from sailer.data.corpora.mapping import label_positions
from sailer.data.corpora.splits import actor_splits, by_split, take_rows
from sailer.data.schema import NO_AGREEMENT, UNLABELLED, CorpusError, CorpusReport, LabelSet

ACTORS = range(1001, 1092)
EMOTIONS = {"A": "Angry", "D": "Disgust", "F": "Fear", "H": "Happy", "N": "Neutral", "S": "Sad"}
SENTENCES = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}
# Its recording is there, but without sound.
SILENT = ("1076_MTI_SAD_XX",)
_NAME = re.compile(r"(?P<actor>10\d\d)_(?P<sentence>[A-Z]{3})_[A-Z]{3}_[A-Z]+")
_VOICE_ONLY = range(100_000, 200_000)


@corpus(
    "crema_d",
    about=About(
        title="CREMA-D",
        license="odbl",
        link="https://github.com/CheyneyComputerScience/CREMA-D",
        languages=("en",),
        kin="Its videos are of the same 91 actors.",
    ),
)
def load(
    path: Path,
    *,
    label_set: LabelSet,
    audio: bool,
    strict: bool,
    report: CorpusReport,
    train_actors: str | Sequence[int] = "1001-1017,1028-1042,1053-1091",
    validation_actors: str | Sequence[int] = "1043-1052",
    test_actors: str | Sequence[int] = "1018-1027",
    exclude: Sequence[str] = SILENT,
    label_names: Mapping[str, str | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Columns of the canonical row per split, from the released folders AudioWAV (or AudioMP3) and processedResults.

    Votes are those of the raters who heard the voice alone, and emoVote is the label (a tie is no agreement). By
    default 71 actors train, and five women and five men each are for validation and test. For the
    parameters of every loader see `sailer.data.corpora`.

    Args:
        train_actors, validation_actors, test_actors: actor numbers of each split, as a list or as "1001-1010,1020"; no
            actor may be in two.
        exclude: clips whose recording is left out; by default the one that is silent.
        label_names: what one of the six emotions is called in another label set; null drops it.

    Raises:
        CorpusError: no table of votes, no recordings (with `audio`), impossible actors, or what `strict` refuses.
    """
    split_of = actor_splits(
        "CREMA-D",
        ACTORS,
        train_actors=train_actors,
        validation_actors=validation_actors,
        test_actors=test_actors,
    )
    table = find_entry(find_entry(path, "processedResults") or path, "tabulatedVotes.csv")
    if table is None:
        raise CorpusError(
            f"{path} has no processedResults/tabulatedVotes.csv. Give the folder of the released corpus."
        )
    problems = Problems(table, strict, report)
    positions = label_positions(list(EMOTIONS.values()), label_set, report, label_names)
    places = dict(zip(EMOTIONS, positions.values(), strict=True))
    people = _demographics(path, report)

    columns: dict[str, list[Any]] = {
        name: [] for name in ("id", "votes", "label", "transcript", "speaker", "sex", "age", "split")
    }
    rows = list(_voice_rows(problems))
    for name, counts, published in rows:
        clip, actor = name[0], int(name["actor"])
        if actor not in split_of:
            report.leave_out("its actor is in no split", clip)
            continue
        label = places[published] if len(published) == 1 else NO_AGREEMENT if published else UNLABELLED
        if label is None:
            report.leave_out("its label is dropped by label_names", clip)
            continue
        votes = np.zeros(len(label_set.labels))
        for code, count in counts.items():
            if places[code] is not None:
                votes[places[code]] += count
        sex, age = people.get(actor, ("", float("nan")))
        row = (clip, votes, label, SENTENCES[name["sentence"]], f"crema-d-{actor}", sex, age, split_of[actor])
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    if audio:
        columns = _with_audio(path, columns, exclude, {name[0] for name, *_ in rows}, problems)
    return by_split(columns, columns.pop("split"))


def _with_audio(
    path: Path, columns: dict[str, list[Any]], exclude: Sequence[str], voted: set[str], problems: Problems
) -> dict[str, Any]:
    """The columns of the clips whose recording can be used."""
    folder = find_entry(path, "AudioWAV") or find_entry(path, "AudioMP3")
    if folder is None:
        raise CorpusError(f"{path} has neither AudioWAV nor AudioMP3. For the labels alone pass audio=False.")
    for clip in sorted({clip_id(file.name) for file in folder.iterdir() if is_audio(file)} - voted):
        problems.report.leave_out("recording without votes", clip)
    for clip in set(exclude).intersection(columns["id"]):
        problems.report.leave_out("excluded (by default the recording without sound)", clip)
    columns = take_rows(columns, [row for row, clip in enumerate(columns["id"]) if clip not in exclude])
    index = FileIndex(folder)
    rows = attach_recordings(columns, columns["id"], index, minimum_seconds=0, problems=problems)
    return take_rows(columns, rows)


def _voice_rows(problems: Problems) -> Iterator[tuple[re.Match[str], dict[str, float], str]]:
    """Clip name, votes by emotion code, and the published codes of the stimuli that were voice alone."""
    rows = read_rows(problems.source, problems.report)
    header = next(rows, (0, [""]))[1]
    if header[0].startswith("version https://git-lfs"):
        raise CorpusError(f"{problems.source} is a Git LFS pointer, not the table: run `git lfs pull` in the corpus.")
    if missing := [name for name in (*EMOTIONS, "fileName") if name not in header]:
        raise CorpusError(f"{problems.source} has no columns {missing}; it has {header}.")
    first: dict[str, list[str]] = {}
    differing = 0
    for number, cells in rows:
        where = f"line {number}"
        fields = dict(zip(header, cells, strict=False))
        try:
            stimulus = int(cells[0])
            counts = {code: float(fields[code]) for code in EMOTIONS}
            clip = clip_id(fields["fileName"])
        except (KeyError, ValueError):
            problems.add(where, f"{cells[:8]} is no stimulus number with six counts and a file", "malformed row")
            continue
        if stimulus not in _VOICE_ONLY:
            continue
        name = _NAME.fullmatch(clip)
        if min(counts.values()) < 0 or name is None or name["sentence"] not in SENTENCES:
            problems.add(where, f"{clip!r} is no CREMA-D file name, or a count is negative", "malformed row")
        elif clip in first:
            if first[clip] == cells[1:]:
                problems.report.note(f"{problems.source.name} repeats {clip} with equal content: read once.")
            else:
                problems.add(where, f"{clip} occurs twice with different content", "second row of a clip")
        else:
            first[clip] = cells[1:]
            recomputed = _plurality(counts)
            published = "".join(code for code in fields.get("emoVote", "").split(":") if code in EMOTIONS)
            differing += bool(published) and sorted(published) != sorted(recomputed)
            yield name, counts, published or recomputed
    problems.report.note(
        f"emoVote differs from the plurality of the votes for {differing} of {len(first)} clips; it is the label."
    )


def _plurality(counts: Mapping[str, float]) -> str:
    """The codes with the most votes, such as "A" or "AD"; "" without votes."""
    most = max(counts.values())
    return "".join(code for code, count in counts.items() if count == most > 0)


def _demographics(path: Path, report: CorpusReport) -> dict[int, tuple[str, float]]:
    """Sex and age by actor."""
    file = find_entry(path, "VideoDemographics.csv")
    if file is None:
        report.note(f"{path} has no VideoDemographics.csv: sex and age are unknown.")
        return {}
    rows = read_rows(file, report)
    header = next(rows, (0, []))[1]
    people = {}
    for number, cells in rows:
        fields = dict(zip(header, cells, strict=False))
        try:
            people[int(fields["ActorID"])] = (fields["Sex"].lower(), float(fields["Age"]))
        except (KeyError, ValueError):
            raise CorpusError(f"{file}, line {number}: expected ActorID, Age and Sex, found {cells}.") from None
    return people
