"""Label files of MSP-Podcast 1.12's size -> canonical rows: time and peak memory, of the whole and of a tenth.

    python benchmarks/labels.py

writes 116,221 clips with 649,102 annotators' rows and 1,400 distinct free-text primaries in each form of the detailed
labels, and reads each back in a fresh process. The time is load_corpus's with audio=False, once the libraries are
imported; the memory is the process's highest. A tenth of the clips should take a tenth of the time.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sailer.data.corpora.msp_labels import CONSENSUS_FIELDS, EMOTION_CODES
from sailer.data.labels import consensus
from sailer.data.schema import PRIMARY_LABELS, SECONDARY_LABELS

CLIPS, ANNOTATIONS, FREE_TEXTS = 116_221, 649_102, 1_400
FORMS = ("csv", "csv_columns", "json", "json_workers", "txt")
MEASURE = """
import json, resource, sys, time
import datasets, pandas
from sailer.data import load_corpus
import sailer.data.corpora.msp_podcast
start = time.perf_counter()
corpus = load_corpus("msp_podcast", sys.argv[1], audio=False)
seconds = time.perf_counter() - start
votes = sum(float(dataset.with_format("numpy")["votes"][:].sum()) for dataset in corpus.values())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
print(json.dumps({"clips": sum(map(len, corpus.values())), "votes": votes, "seconds": seconds, "gigabytes": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips of the whole corpus")
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS, help="forms of the detailed labels")
    arguments = parser.parse_args()
    print(f"{'form':14}{'clips':>9}{'annotations':>13}{'seconds':>9}{'peak GB':>9}{'a tenth':>9}{'ratio':>7}")
    for form in arguments.forms:
        whole, tenth = measure(form, arguments.clips), measure(form, arguments.clips // 10)
        print(
            f"{form:14}{whole['clips']:9,}{round(whole['votes']):13,}{whole['seconds']:9.2f}{whole['gigabytes']:9.2f}"
            f"{tenth['seconds']:9.2f}{whole['seconds'] / tenth['seconds']:7.1f}",
            flush=True,
        )


def measure(form: str, clips: int) -> dict[str, float]:
    """Seconds and peak gigabytes of reading that many clips, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "Labels", form, clips)
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, folder], capture_output=True, text=True, check=True, cwd=folder
        )
    return json.loads(result.stdout)


def write(labels: Path, form: str, clips: int) -> None:
    """Consensus and detailed labels of made-up clips; every clip has five annotators or more."""
    labels.mkdir()
    random = np.random.default_rng(0)
    annotators = np.full(clips, 5)
    annotators[random.choice(clips, clips * (ANNOTATIONS - 5 * CLIPS) // CLIPS, replace=False)] += 1
    clip = np.repeat(np.arange(clips), annotators)
    primary = random.choice(9, len(clip), p=[0.08, 0.04, 0.04, 0.02, 0.18, 0.38, 0.09, 0.05, 0.12])
    votes = np.zeros((clips, 9), dtype=np.int64)
    np.add.at(votes, (clip, primary), 1)
    free_text = [f"Other-{'Bored, tired/' if text % 3 else ' slightly '}number {text}" for text in range(FREE_TEXTS)]
    texts = [PRIMARY_LABELS[label] if label < 8 else free_text[random.integers(FREE_TEXTS)] for label in primary]
    second = [",".join(random.choice(SECONDARY_LABELS[:16], random.integers(1, 4))) for _ in range(2000)]
    seconds = [second[choice] for choice in random.integers(2000, size=len(clip))]
    workers = random.integers(20000, size=len(clip))
    ratings = random.integers(1, 8, size=(len(clip), 3))
    names = [f"MSP-PODCAST_{number // 1000:04d}_{number % 1000:04d}.wav" for number in range(clips)]

    label = consensus(votes)
    codes = {text: code for code, text in EMOTION_CODES.items()}
    with open(labels / "labels_consensus.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CONSENSUS_FIELDS)
        splits = random.choice(["Train", "Development", "Test1"], clips, p=[0.6, 0.25, 0.15])
        means = np.stack([np.bincount(clip, ratings[:, k]) / annotators for k in range(3)], axis=1)
        for row, name in enumerate(names):
            code = codes[PRIMARY_LABELS[label[row]]] if label[row] >= 0 else "X"
            writer.writerow([name, code, *(f"{mean:.6f}" for mean in means[row]), row % 3000, "Male", splits[row]])

    rows = zip(clip, workers, texts, seconds, ratings.tolist(), strict=True)
    answers = ((names[file], f"WORKER{worker:08d}", *rest) for file, worker, *rest in rows)
    _FORMS[form](labels, answers)


def _detail(worker: str, primary: str, second: str, rating: list[int]) -> str:
    return f"{worker}; {primary}; {second}; A:{rating[0]}.000000; V:{rating[1]}.000000; D:{rating[2]}.000000;"


def _csv(labels: Path, answers: Iterable[Sequence[Any]]) -> None:
    with open(labels / "labels_detailed.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["FileName", "EmoDetail"])
        writer.writerows((name, _detail(*rest)) for name, *rest in answers)


def _csv_columns(labels: Path, answers: Iterable[Sequence[Any]]) -> None:
    with open(labels / "labels_detailed.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["FileName", "Workers", *_KEYS])
        writer.writerows((*rest, *rating) for *rest, rating in answers)


def _json(labels: Path, answers: Iterable[Sequence[Any]]) -> None:
    content: dict[str, dict] = {}
    for position, (name, worker, *rest, rating) in enumerate(answers):
        content.setdefault(name, {})[f"{worker}-{position}"] = dict(zip(_KEYS, (*rest, *rating), strict=True))
    (labels / "labels_detailed.json").write_text(json.dumps(content))


def _json_workers(labels: Path, answers: Iterable[Sequence[Any]]) -> None:
    content: dict[str, dict] = {}
    for name, worker, *rest, rating in answers:
        answer = {"Name": worker, **dict(zip(_KEYS, (*rest, *rating), strict=True))}
        content.setdefault(name, {"Workers": []})["Workers"].append(answer)
    (labels / "labels_detailed.json").write_text(json.dumps(content))


def _txt(labels: Path, answers: Iterable[Sequence[Any]]) -> None:
    blocks: dict[str, list[str]] = {}
    for name, *rest in answers:
        blocks.setdefault(name, [f"{name}; N; A:4.000000; V:4.000000; D:4.000000;"]).append(_detail(*rest))
    (labels / "labels.txt").write_text("\n\n".join("\n".join(block) for block in blocks.values()) + "\n")


_KEYS = ("EmoClass_Major", "EmoClass_Second", "EmoAct", "EmoVal", "EmoDom")
_FORMS = {"csv": _csv, "csv_columns": _csv_columns, "json": _json, "json_workers": _json_workers, "txt": _txt}


if __name__ == "__main__":
    main()
