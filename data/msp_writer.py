"""A corpus in canonical rows -> a folder in MSP-Podcast's own form, in any of the forms that its labels have had."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm

from sailer.audio_sailer import load_audio
from sailer.data.atomic import replacing_folder
from sailer.data.corpora.msp_labels import CONSENSUS_FIELDS, EMOTION_CODES, NO_AGREEMENT_CODE
from sailer.data.schema import NO_AGREEMENT, SECONDARY_LABELS, CorpusError, LabelSet

SPLIT_NAMES = {"train": "Train", "validation": "Development", "test": "Test1", "unassigned": "NA"}
_SAMPLING_RATE = 16000
_ANSWER_KEYS = ("EmoClass_Major", "EmoClass_Second", "EmoAct", "EmoVal", "EmoDom")


def write_msp_podcast(
    datasets: DatasetDict | Mapping[str, Dataset],
    output_dir: str | Path,
    *,
    label_set: LabelSet | None = None,
    consensus: Iterable[str] = ("csv", "json"),
    detailed: Iterable[str] = ("csv", "json", "txt"),
    labels_folder: str = "Labels",
    consensus_name: str = "labels_consensus",
    split_names: Mapping[str, str] | None = None,
) -> Path:
    """Write Audios (16 kHz mono WAV), Transcripts and Labels, which `load_corpus("msp_podcast", output_dir)` reads.

    Rows tell how many annotators chose what, not who: annotators are made up so that the counts come out, each with
    the clip's own attributes. Clips are named by their id, with what a file name should not hold replaced by "_".
    Age has no place in that form.

    Args:
        datasets: split -> canonical rows.
        output_dir: a folder that does not exist or is empty; it appears whole or not at all.
        label_set: the rows' primary emotions; each must be one of MSP-Podcast's nine.
        consensus: forms of the consensus file: "csv"; "json" or "json_list" (older: a list of one, numbers as text).
        detailed: forms of the detailed labels: "csv" (FileName,EmoDetail) or "csv_columns" (releases 1.6 and 2.0);
            "json" (by worker) or "json_workers"; "txt" (labels.txt).
        labels_folder: releases have Labels, labels or label.
        consensus_name: "labels_concensus" before release 1.10.
        split_names: split -> Split_Set, beside `SPLIT_NAMES`; by default test becomes Test1.

    Returns:
        `output_dir`.

    Raises:
        CorpusError: a folder with content, an unknown form or two that share a file, a label that MSP-Podcast has not,
            votes that are no whole numbers, more of them for a secondary emotion than annotators, two clips of one
            name.
    """
    label_set = label_set or LabelSet()
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise CorpusError(f"{output_dir} exists and is not an empty folder: give another output_dir.")
    writers = _writers(list(consensus), list(detailed), consensus_name)
    unknown = [label for label in label_set.labels if label not in EMOTION_CODES.values()]
    if unknown:
        raise CorpusError(f"MSP-Podcast has no label for {unknown}; it has {list(EMOTION_CODES.values())}.")
    names = SPLIT_NAMES | dict(split_names or {})
    clips = [
        clip
        for split, dataset in datasets.items()
        for clip in _clips(dataset, names.get(split, split.capitalize()), label_set)
    ]
    _check_names(clips)

    with replacing_folder(output_dir) as partial:
        (partial / labels_folder).mkdir(parents=True)
        for file_name, write in writers.items():
            (partial / labels_folder / file_name).write_text(write(clips), encoding="utf-8")
        if any(clip["transcript"] for clip in clips):
            (partial / "Transcripts").mkdir()
        for clip in clips:
            if clip["transcript"]:
                file = partial / "Transcripts" / Path(clip["file"]).with_suffix(".txt")
                file.write_text(clip["transcript"] + "\n", encoding="utf-8")
        _write_audio(datasets, clips, partial / "Audios")
    return output_dir


def _writers(consensus: list[str], detailed: list[str], stem: str) -> dict[str, Callable[[list[dict[str, Any]]], str]]:
    """File name -> function that makes its text."""
    writers: dict[str, Callable[[list[dict[str, Any]]], str]] = {}
    for kind, forms, choices in (("consensus", consensus, _CONSENSUS), ("detailed", detailed, _DETAILED)):
        for form in forms:
            if form not in choices:
                raise CorpusError(f"{kind}: unknown form {form!r}; known are {list(choices)}.")
            file_name, write = choices[form]
            file_name = file_name.format(consensus_name=stem)
            if file_name in writers:
                raise CorpusError(f"{kind}: two of the forms {forms} are both the file {file_name}; choose one.")
            writers[file_name] = write
    return writers


def _clips(dataset: Dataset, split: str, label_set: LabelSet) -> list[dict[str, Any]]:
    """What the label files say of each clip."""
    codes = {label: code for code, label in EMOTION_CODES.items()}
    clips = []
    for row in dataset.remove_columns("audio"):
        if row["label"] >= 0:
            code = codes[label_set.labels[row["label"]]]
        else:
            code = NO_AGREEMENT_CODE if row["label"] == NO_AGREEMENT else ""
        clips.append(
            {
                "file": re.sub(r"[^\w.-]+", "_", row["id"]).lstrip(".") + ".wav",
                "code": code,
                "attributes": [None if np.isnan(value) else 1 + 6 * value for value in row["attributes"]],
                "speaker": row["speaker"] or "Unknown",
                "sex": row["sex"].capitalize() or "Unknown",
                "split": split,
                "transcript": row["transcript"],
                "annotators": _annotators(row, label_set),
            }
        )
    return clips


def _annotators(row: Mapping[str, Any], label_set: LabelSet) -> list[tuple[str, str, str]]:
    """Name, primary and secondary answer of made-up annotators whose votes add up to the row's."""
    votes = [_whole(count, "votes", row["id"]) for count in row["votes"]]
    tags = [_whole(count, "secondary_votes", row["id"]) for count in row["secondary_votes"]]
    primaries = [label for label, count in zip(label_set.labels, votes, strict=True) for _ in range(count)]
    if max(tags) > len(primaries):
        raise CorpusError(
            f"Clip {row['id']!r} has {max(tags)} votes for a secondary emotion but {len(primaries)} annotators: a tag "
            "counts once per annotator."
        )
    answers: list[list[str]] = [[] for _ in primaries]
    for position, (label, count) in enumerate(zip(SECONDARY_LABELS, tags, strict=True)):
        for offset in range(count):
            answers[(position + offset) % len(primaries)].append(_free_text(label))
    return [
        (f"WORKER{number:08d}", _free_text(primary), ",".join(answer))
        for number, (primary, answer) in enumerate(zip(primaries, answers, strict=True), start=1)
    ]


def _whole(count: float, column: str, clip: str) -> int:
    if abs(count - round(count)) > 1e-4:
        raise CorpusError(f"Clip {clip!r} has {column} of {count:g}: only whole votes can be written as annotators.")
    return round(count)


def _free_text(label: str) -> str:
    return "Other-" if label == "Other" else label


def _check_names(clips: list[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for clip in clips:
        if clip["file"].lower() in seen:
            raise CorpusError(f"Two clips would be the file {clip['file']}: ids must differ across all splits.")
        seen.add(clip["file"].lower())


def _write_audio(datasets: Mapping[str, Dataset], clips: list[dict[str, Any]], folder: Path) -> None:
    sources = (audio for dataset in datasets.values() for audio in dataset["audio"])
    for clip, source in zip(tqdm(clips, desc="Writing recordings", unit="clip"), sources, strict=True):
        if source["path"] or source["bytes"]:
            folder.mkdir(exist_ok=True)
            if _is_plain_wav(source):
                data = source["bytes"] or Path(source["path"]).read_bytes()
                (folder / clip["file"]).write_bytes(data)
            else:
                samples = load_audio(source, _SAMPLING_RATE)
                soundfile.write(folder / clip["file"], samples, _SAMPLING_RATE, subtype="PCM_16")


def _is_plain_wav(source: Mapping[str, Any]) -> bool:
    with soundfile.SoundFile(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"]) as file:
        return (file.format, file.samplerate, file.channels) == ("WAV", _SAMPLING_RATE, 1)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _fields(clip: Mapping[str, Any]) -> dict[str, Any]:
    values = (clip["file"], clip["code"], *clip["attributes"], clip["speaker"], clip["sex"], clip["split"])
    return dict(zip(CONSENSUS_FIELDS, values, strict=True))


def _csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()


def _consensus_csv(clips: list[dict[str, Any]]) -> str:
    rows = (
        [_text(value) if isinstance(value, float) else value for value in _fields(clip).values()] for clip in clips
    )
    return _csv(CONSENSUS_FIELDS, rows)


def _consensus_json(clips: list[dict[str, Any]]) -> str:
    entries = [_fields(clip) for clip in clips]
    return json.dumps({entry.pop("FileName"): entry for entry in entries}, indent=1)


def _consensus_json_list(clips: list[dict[str, Any]]) -> str:
    content = {}
    for clip in clips:
        entry = {key: _text(value) if isinstance(value, float) else value for key, value in _fields(clip).items()}
        content[entry.pop("FileName")] = [entry]
    return json.dumps(content, indent=1)


def _detail(clip: Mapping[str, Any], annotator: tuple[str, str, str]) -> str:
    numbers = [f"{key}:{_text(value)}" for key, value in zip("AVD", clip["attributes"], strict=True)]
    return "; ".join([*annotator[:2], *filter(None, annotator[2:]), *numbers]) + ";"


def _detailed_csv(clips: list[dict[str, Any]]) -> str:
    rows = ((clip["file"], _detail(clip, annotator)) for clip in clips for annotator in clip["annotators"])
    return _csv(("FileName", "EmoDetail"), rows)


def _detailed_csv_columns(clips: list[dict[str, Any]]) -> str:
    rows = (
        (clip["file"], *annotator, *map(_text, clip["attributes"]))
        for clip in clips
        for annotator in clip["annotators"]
    )
    return _csv(("FileName", "Workers", *_ANSWER_KEYS), rows)


def _answer(clip: Mapping[str, Any], annotator: tuple[str, str, str]) -> dict[str, Any]:
    return dict(zip(_ANSWER_KEYS, (*annotator[1:], *clip["attributes"]), strict=True))


def _detailed_json(clips: list[dict[str, Any]]) -> str:
    content = {clip["file"]: {one[0]: _answer(clip, one) for one in clip["annotators"]} for clip in clips}
    return json.dumps(content, indent=1)


def _detailed_json_workers(clips: list[dict[str, Any]]) -> str:
    content = {
        clip["file"]: {"Workers": [{"Name": one[0], **_answer(clip, one)} for one in clip["annotators"]]}
        for clip in clips
    }
    return json.dumps(content, indent=1)


def _detailed_text(clips: list[dict[str, Any]]) -> str:
    blocks = (
        "\n".join(
            [_detail(clip, (clip["file"], clip["code"], "")), *(_detail(clip, one) for one in clip["annotators"])]
        )
        for clip in clips
    )
    return "\n\n".join(blocks) + "\n"


_CONSENSUS = {
    "csv": ("{consensus_name}.csv", _consensus_csv),
    "json": ("{consensus_name}.json", _consensus_json),
    "json_list": ("{consensus_name}.json", _consensus_json_list),
}
_DETAILED = {
    "csv": ("labels_detailed.csv", _detailed_csv),
    "csv_columns": ("labels_detailed.csv", _detailed_csv_columns),
    "json": ("labels_detailed.json", _detailed_json),
    "json_workers": ("labels_detailed.json", _detailed_json_workers),
    "txt": ("labels.txt", _detailed_text),
}
