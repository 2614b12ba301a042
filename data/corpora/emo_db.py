"""EMO-DB (Burkhardt et al. 2005): acted German speech of ten actors, with the share of listeners who recognised it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sailer.data.corpora import About, corpus
from sailer.data.corpora.audio_files import audio_reference, find_audio, read_durations
from sailer.data.corpora.files import Problems, clip_id, find_entry, read_text
from sailer.data.corpora.mapping import label_positions
from sailer.data.corpora.splits import actor_splits, by_split, take_rows
from sailer.data.schema import CorpusError, CorpusReport, LabelSet

# Actor -> sex and age; emotion letter (of the German word) -> emotion.
ACTORS = {
    **{3: ("male", 31), 8: ("female", 34), 9: ("female", 21), 10: ("male", 32), 11: ("male", 26)},
    **{12: ("male", 30), 13: ("female", 32), 14: ("female", 35), 15: ("male", 25), 16: ("female", 31)},
}
EMOTIONS = {
    **{"W": "Angry", "L": "Bored", "E": "Disgust", "A": "Fear"},
    **{"F": "Happy", "T": "Sad", "N": "Neutral"},
}
SENTENCES = {
    "a01": "Der Lappen liegt auf dem Eisschrank.",
    "a02": "Das will sie am Mittwoch abgeben.",
    "a04": "Heute abend könnte ich es ihm sagen.",
    "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "a07": "In sieben Stunden wird es soweit sein.",
    "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
    "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
    "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
    "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
    "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
}
LISTENERS = 20
SPREADS = ("uniform", "other", "none")
_NAME = re.compile(r"(?P<actor>\d\d)(?P<sentence>[ab]\d\d)(?P<emotion>[WLEAFTN])[a-z]?")


@corpus(
    "emo_db",
    # It can be fetched freely, and its pages (those of /docu too) state no license.
    about=About(title="EMO-DB", license="", link="http://emodb.bilderbar.info", languages=("de",)),
)
def load(
    path: Path,
    *,
    label_set: LabelSet,
    audio: bool,
    strict: bool,
    report: CorpusReport,
    train_actors: str | Sequence[int] = "3,8-11,14",
    validation_actors: str | Sequence[int] = "12-13",
    test_actors: str | Sequence[int] = "15-16",
    spread: str = "uniform",
    label_names: Mapping[str, str | None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Columns of the canonical row per split, from the released folder wav and erkennung.txt.

    The acted emotion is the label. The 20 listeners' votes for it are the share in erkennung.txt; what the others
    chose is not published, and `spread` says where their votes go. Boredom is no class of most label sets: it counts
    as Other. By default six actors train, and a woman and a man each are for validation and test. Labels alone are
    those of the files in wav, or else of those that erkennung.txt lists. For the parameters of every loader see
    `sailer.data.corpora`.

    Args:
        train_actors, validation_actors, test_actors: actor numbers of each split, as a list or as "3,8-11"; no actor
            may be in two.
        spread: "uniform" divides the votes of the listeners who did not recognise the emotion over the corpus's six
            other ones, "other" gives them to the class Other, "none" leaves them out.
        label_names: what one of the corpus's emotions (Bored among them) is called in another label set; null drops
            its clips and votes.

    Raises:
        CorpusError: no EMO-DB file, an unknown spread, impossible actors, or what `strict` refuses.
    """
    if spread not in SPREADS or (spread == "other" and "Other" not in label_set.labels):
        raise CorpusError(f"spread={spread!r}: it is one of {list(SPREADS)}, and 'other' needs a label 'Other'.")
    split_of = actor_splits(
        "EMO-DB",
        list(ACTORS),
        train_actors=train_actors,
        validation_actors=validation_actors,
        test_actors=test_actors,
    )
    positions = label_positions(list(EMOTIONS.values()), label_set, report, label_names)
    shares = _recognised(path, strict, report)
    folder = find_entry(path, "wav") or path
    files = {clip_id(file.name): file for file in find_audio(folder)}
    if audio or files:
        absent = len(set(shares) - set(files))
        if shares and absent:
            report.note(f"erkennung.txt rates {absent} more clips than there are recordings.")
    names = _clips(list(files) or ([] if audio else list(shares)), folder, split_of, positions, strict, report)
    clips = [name[0] for name in names]
    unrated = [clip for clip in clips if clip not in shares]
    if unrated:
        report.note(f"{len(unrated)} clips have no share of listeners: the acted emotion is their one vote.")

    emotions = [EMOTIONS[name["emotion"]] for name in names]
    actors = [int(name["actor"]) for name in names]
    columns: dict[str, Any] = {
        "id": clips,
        "votes": np.array(
            [
                _votes(emotion, shares.get(clip), spread, positions, label_set)
                for clip, emotion in zip(clips, emotions, strict=True)
            ]
        ).reshape(-1, len(label_set.labels)),
        "label": [positions[emotion] for emotion in emotions],
        "transcript": [SENTENCES[name["sentence"]] for name in names],
        "speaker": [f"emo-db-{actor:02d}" for actor in actors],
        "sex": [ACTORS[actor][0] for actor in actors],
        "age": [float(ACTORS[actor][1]) for actor in actors],
        "split": [split_of[actor] for actor in actors],
    }
    if audio:
        durations = read_durations([files[clip] for clip in clips], strict=strict, report=report)
        columns |= {"audio": [audio_reference(files[clip]) for clip in clips], "duration": durations}
        columns = take_rows(columns, [row for row, seconds in enumerate(durations) if seconds is not None])
    return by_split(columns, columns.pop("split"))


def _clips(
    names: list[str],
    folder: Path,
    split_of: Mapping[int, str],
    positions: Mapping[str, int | None],
    strict: bool,
    report: CorpusReport,
) -> list[re.Match[str]]:
    """The names that are EMO-DB clips of a split and a class; the rest is counted or refused."""
    problems = Problems(folder, strict, report)
    found = []
    for clip in names:
        name = _NAME.fullmatch(clip)
        if name is None or int(name["actor"]) not in ACTORS or name["sentence"] not in SENTENCES:
            problems.add(f"file {clip}", "not an EMO-DB file name (such as 03a01Fa.wav)", "not an EMO-DB file name")
        elif int(name["actor"]) not in split_of:
            report.leave_out("its actor is in no split", clip)
        elif positions[EMOTIONS[name["emotion"]]] is None:
            report.leave_out("its label is dropped by label_names", clip)
        else:
            found.append(name)
    if not names:
        raise CorpusError(f"No recordings in {folder}. Give the folder of EMO-DB that holds wav and erkennung.txt.")
    return found


def _votes(
    emotion: str, share: float | None, spread: str, positions: Mapping[str, int | None], label_set: LabelSet
) -> np.ndarray:
    """Votes of one clip, (labels,): the listeners' who recognised it, and the others' where `spread` puts them."""
    votes = np.zeros(len(label_set.labels))
    if share is None:
        votes[positions[emotion]] = 1
        return votes
    votes[positions[emotion]] = LISTENERS * share
    rest = LISTENERS * (1 - share)
    if spread == "other":
        votes[label_set.index("Other")] += rest
    elif spread == "uniform":
        for other, position in positions.items():
            if other != emotion and position is not None:
                votes[position] += rest / (len(positions) - 1)
    return votes


def _recognised(path: Path, strict: bool, report: CorpusReport) -> dict[str, float]:
    """Clip -> share of listeners who recognised the acted emotion, from 0 to 1."""
    file = find_entry(path, "erkennung.txt")
    if file is None:
        report.note(f"{path} has no erkennung.txt: the acted emotion is each clip's one vote.")
        return {}
    problems = Problems(file, strict, report)
    # Columns are set apart by tabs, spaces or no-break spaces, all of which split() takes.
    rows = [
        (number, line.split()) for number, line in enumerate(read_text(file, report).split("\n"), 1) if line.split()
    ]
    header = [cell.casefold() for cell in rows[0][1]] if rows else []
    if "satz" not in header or "erkannt" not in header:
        raise CorpusError(f"{file} begins with {header}; expected columns 'Satz' and 'erkannt'.")
    clip_column, share_column = header.index("satz"), header.index("erkannt")
    shares: dict[str, float] = {}
    for number, cells in rows[1:]:
        try:
            share = float(cells[share_column].rstrip("%").replace(",", "."))
            clip = clip_id(cells[clip_column])
        except (IndexError, ValueError):
            share, clip = -1.0, ""
        if not 0 <= share <= 100:
            problems.add(f"line {number}", f"{cells} gives no share from 0 to 100", "malformed row")
        elif shares.setdefault(clip, share) != share:
            problems.add(f"line {number}", f"{clip} occurs twice with different shares", "second row of a clip")
    scale = 100 if max(shares.values(), default=0) > 1 else 1
    return {clip: share / scale for clip, share in shares.items()}
