"""MSP-Podcast of any release (Lotfian & Busso 2019), and corpora released in the same form, in canonical rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sailer.data.corpora import About, corpus
from sailer.data.corpora.files import FileIndex, Problems, attach_recordings, clip_id, decode_text, find_entry
from sailer.data.corpora.mapping import label_positions
from sailer.data.corpora.msp_labels import Consensus, read_annotations, read_consensus
from sailer.data.corpora.splits import by_split, chosen, split_name, take_rows
from sailer.data.labels import consensus
from sailer.data.schema import NO_AGREEMENT, PRIMARY_LABELS, UNLABELLED, CorpusError, CorpusReport, LabelSet

_OTHER = PRIMARY_LABELS.index("Other")
_DROPPED = -999


@corpus(
    "msp_podcast",
    about=About(
        title="MSP-Podcast",
        license="other",
        link="https://ecs.utdallas.edu/research/researchlabs/msp-lab/MSP-Podcast.html",
        languages=("en",),
        license_name="msp-podcast-agreement",
        kin="A release holds clips of those before it: a test set of one may be training material of another.",
    ),
)
def load(
    path: Path,
    *,
    label_set: LabelSet,
    audio: bool,
    strict: bool,
    report: CorpusReport,
    splits: Sequence[str] | str | None = None,
    development_extra: bool = False,
    minimum_seconds: float = 0.0,
    label_names: Mapping[str, str | None] | None = None,
    unlisted_split: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Columns of the canonical row per split, from the folder that holds Audios, Transcripts and Labels.

    The published EmoClass is the label; where it differs from the plurality of the votes, the report says how often.
    Attributes are the published means, or else the annotators' mean. A clip without annotators keeps its label and
    has no votes; annotators of a clip that the consensus does not list are left out, as its split is unknown. A
    recording is found in any case and audio format. Clips whose Split_Set is NA form the split "unassigned" or, if
    that is all of them, "train". A missing or empty transcript is "". For the parameters of every loader see
    `sailer.data.corpora`.

    Args:
        splits: which to load, of train, validation, test1, ...; by default all.
        development_extra: move the validation split's Other and no-agreement clips into training (paper, from its
            Table 3 on).
        minimum_seconds: leave out shorter clips (the authors' released models were trained on 3 s and more).
        label_names: what one of the nine emotions is called in another label set; null drops it. By default an
            emotion outside the label set is Other.
        unlisted_split: load the recordings that the consensus does not list, unlabelled, as this split; by default
            they are only counted.

    Raises:
        CorpusError: no Labels folder, no consensus, no Audios folder (with `audio`), or what `strict` refuses.
    """
    labels_folder = find_entry(path, "Labels", "label")
    if labels_folder is None:
        raise CorpusError(f"{path} has no folder Labels, labels or label. Give the folder that holds it and Audios.")
    clips = read_consensus(labels_folder, strict=strict, report=report)
    index = _recordings(path) if audio else None
    if index is not None:
        _list_unlisted(clips, index, unlisted_split, report)
    ids = [clip_id(name) for name in clips.names]
    published = np.array(clips.labels, dtype=np.int64)
    attributes = np.array(clips.attributes, dtype=np.float64).reshape(-1, 3)
    votes, secondary_votes, mean_attributes = _votes(labels_folder, ids, published, strict, report)
    _compare(published, votes, report)

    to_label, to_votes = _conversion(label_set, label_names, report)
    columns: dict[str, Any] = {
        "id": ids,
        "votes": votes @ to_votes,
        "secondary_votes": secondary_votes,
        "attributes": (np.where(np.isnan(attributes), mean_attributes, attributes) - 1) / 6,
        "label": np.where(published >= 0, to_label[published.clip(min=0)], published),
        "speaker": clips.speakers,
        "sex": clips.sexes,
        "name": clips.names,
        "split": _splits(clips.splits, published, development_extra, report),
    }
    wanted = chosen(sorted(set(columns["split"])), splits)
    dropped = columns["label"] == _DROPPED
    for row in np.flatnonzero(dropped):
        report.leave_out("its label is dropped by label_names", ids[row])
    columns = take_rows(columns, np.flatnonzero(~dropped & np.isin(columns["split"], wanted)))
    names = columns.pop("name")
    if index is not None:
        problems = Problems(labels_folder, strict, report)
        columns = take_rows(
            columns,
            attach_recordings(columns, names, index, minimum_seconds=minimum_seconds, problems=problems),
        )
    elif minimum_seconds > 0:
        raise CorpusError("minimum_seconds needs the recordings: leave it out, or load with audio=True.")
    columns["transcript"] = _transcripts(path, columns["id"], report)
    return by_split(columns, columns.pop("split"))


def _votes(
    folder: Path, ids: list[str], published: np.ndarray, strict: bool, report: CorpusReport
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Votes (clips, 9), secondary votes (clips, 17) and mean attributes (clips, 3) in the order of `ids`."""
    votes, secondary, means = np.zeros((len(ids), 9)), np.zeros((len(ids), 17)), np.full((len(ids), 3), np.nan)
    annotations = read_annotations(folder, strict=strict, report=report)
    if annotations is None:
        report.note(f"{folder} has no detailed labels: no clip has votes.")
        return votes, secondary, means
    row_of = {clip: row for row, clip in enumerate(ids)}
    rows = np.array([row_of.get(clip, -1) for clip in annotations.clips], dtype=np.int64)
    for position in np.flatnonzero(rows < 0):
        report.leave_out("annotated, but not in the consensus file, so of no split", annotations.clips[position])
    found = rows >= 0
    for target, totals in zip((votes, secondary, means), annotations.totals(), strict=True):
        target[rows[found]] = totals[found]
    alone = int(((votes.sum(axis=1) == 0) & (published != UNLABELLED)).sum())
    if alone:
        report.note(f"{alone} clips have a published class but no annotators: kept, without votes.")
    return votes, secondary, means


def _compare(published: np.ndarray, votes: np.ndarray, report: CorpusReport) -> None:
    recomputed = consensus(votes)
    comparable = (published != UNLABELLED) & (recomputed != UNLABELLED)
    differing = int((published != recomputed)[comparable].sum())
    report.note(
        f"The published class differs from the plurality of the votes for {differing} of {int(comparable.sum())} "
        "clips; the published one is the label."
    )


def _splits(
    published_splits: list[str | None], published: np.ndarray, development_extra: bool, report: CorpusReport
) -> list[str]:
    unassigned = published_splits.count(None)
    default = "train" if unassigned == len(published_splits) else "unassigned"
    if unassigned:
        report.note(f"{unassigned} clips have no Split_Set: they are the split {default!r}.")
    split = [name or default for name in published_splits]
    if development_extra:
        moved = [
            row for row, name in enumerate(split) if name == "validation" and published[row] in (_OTHER, NO_AGREEMENT)
        ]
        for row in moved:
            split[row] = "train"
        report.note(f"{len(moved)} Other and no-agreement clips of the validation split joined training.")
    return split


def _recordings(path: Path) -> FileIndex:
    folder = find_entry(path, "Audios", "Audio")
    if folder is None:
        raise CorpusError(f"{path} has no folder Audios. Give the corpus's folder; for its labels alone, audio=False.")
    return FileIndex(folder)


def _list_unlisted(clips: Consensus, index: FileIndex, split: str | None, report: CorpusReport) -> None:
    """Give a row without labels to every recording that has none, or note how many there are."""
    listed = {clip_id(name).lower() for name in clips.names}
    names = [name for name in index.names() if clip_id(name).lower() not in listed]
    if split is None:
        if names:
            report.note(f"{len(names)} recordings are not in the labels ({names[0]}, ...); unlisted_split loads them.")
        return
    clips.names += names
    clips.labels += [UNLABELLED] * len(names)
    clips.attributes += [(np.nan,) * 3] * len(names)
    clips.speakers += [""] * len(names)
    clips.sexes += [""] * len(names)
    clips.splits += [split_name(split)] * len(names)


def _conversion(
    label_set: LabelSet, label_names: Mapping[str, str | None] | None, report: CorpusReport
) -> tuple[np.ndarray, np.ndarray]:
    """From the nine emotions to a label set: the position of each (9,), and the matrix for votes (9, labels)."""
    positions = label_positions(PRIMARY_LABELS, label_set, report, label_names)
    to_label = np.array([_DROPPED if place is None else place for place in positions.values()])
    to_votes = (to_label[:, None] == np.arange(len(label_set.labels))).astype(np.float64)
    return to_label, to_votes


def _transcripts(path: Path, ids: list[str], report: CorpusReport) -> list[str]:
    folder = find_entry(path, "Transcripts", "Transcript")
    if folder is None:
        report.note(f"{path} has no folder Transcripts: no clip has a transcript.")
        return [""] * len(ids)
    index = FileIndex(folder, (".txt",))

    def read(clip: str) -> tuple[str, str]:
        file = index.find(f"{clip}.txt")
        text, latin = decode_text(file.read_bytes()) if file else ("", False)
        problem = "missing" if file is None else "empty" if not text.strip() else "not UTF-8, read as Latin-1"
        return " ".join(text.split()), problem if latin or not text.strip() else ""

    with ThreadPoolExecutor() as pool:
        texts = list(tqdm(pool.map(read, ids), total=len(ids), desc="Reading transcripts", unit="file"))
    for problem in ("missing", "empty", "not UTF-8, read as Latin-1"):
        clips = [clip for clip, (_, own) in zip(ids, texts, strict=True) if own == problem]
        if clips:
            report.note(
                f"{len(clips)} transcripts are {problem} ({', '.join(clips[:3])}{', ...' * (len(clips) > 3)})."
            )
    return [text for text, _ in texts]
