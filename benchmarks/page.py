"""Thirty visitors at once on `sailer page`: their places in the queue, whose result each gets, memory, files left.

    python benchmarks/page.py [MODEL] [--visitors 30] [--requests 1000]

serves the page as a process of its own (of a tiny system with random weights, unless a folder is named) and visits it
by HTTP as its own script does: a clip is uploaded, the visitor waits in the queue for the answer. A visitor keeps the
session from one request to the next, unless `--strangers` has new ones. Every request has a clip of its own,
no two alike in length or sound, and its answer is compared with what this process heard in that clip before the page
was started. Uploads are removed `--keep_minutes` after their last use: the benchmark waits for that and counts what is
left. It fails where anything does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import soundfile
import torch
from transformers import AutoFeatureExtractor

import sailer
from sailer import SailerForAudioClassification, SailerProcessor
from sailer.inference.page_parts import panels
from sailer.inference.page_parts.judging import Limits, System, judge
from sailer.training.tiny_backbones import make_tiny_whisper

RATE = 16000
TOLERANCE = 0.011  # of scores that the page shows with two digits
PATIENCE_S = 300
MEGABYTE = 2**20
PRIOR = "balanced"


@dataclass
class Answer:
    """What a visitor got.

    Attributes:
        clip: the request's number.
        seconds: until it came.
        places: in the queue, as they were told.
        wrong: what is wrong with it, "" if nothing.
    """

    clip: int
    seconds: float = 0.0
    places: list[int] = field(default_factory=list)
    wrong: str = ""


@dataclass
class Asked:
    """How the page is asked: its event's number, how many transcripts that takes, and whether sessions are new."""

    client: httpx.Client
    address: str
    analyse: int
    texts: int
    strangers: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a system; by default a tiny one is made")
    parser.add_argument("--visitors", type=int, default=30, help="at once")
    parser.add_argument("--requests", type=int, default=1000, help="in all")
    parser.add_argument("--strangers", action="store_true", help="every request has a session of its own")
    parser.add_argument("--keep_minutes", type=float, default=0.5, help="as of `sailer page`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # of this process, whose threads would only wait for each other
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = arguments.model or make_system(folder / "tiny")
        clips = write_clips(folder / "clips", arguments.requests)
        expected = expectations(model, clips)
        print(
            f"{datetime.now():%Y-%m-%d}, {os.cpu_count()} cores, torch {torch.__version__}: {arguments.visitors} "
            f"visitors, {len(clips)} clips, {len({scores for _, scores in expected})} different results expected"
        )
        temporary = folder / "temporary"
        temporary.mkdir()
        with page(model, temporary, arguments.keep_minutes) as (address, process):
            answers = visit_all(address, process, clips, expected, arguments.visitors, arguments.strangers)
            uploads_left = wait_for_sweep(temporary, arguments.keep_minutes)
        at_the_end = files_in(temporary)
    wrong = [answer for answer in answers if answer.wrong]
    for answer in wrong[:5]:
        print(f"request {answer.clip}: {answer.wrong}")
    places = [max(answer.places) for answer in answers if answer.places]
    took = sorted(answer.seconds for answer in answers)
    print(
        f"{len(answers) - len(wrong)} of {len(clips)} answers are those of their own clip, {len(wrong)} are not; "
        f"{len(places)} were told a place in the queue, up to {max(places, default=0)}"
    )
    print(f"an answer took {statistics.median(took):.2f} s, the slowest {took[-1]:.2f} s")
    print(f"files left: {len(uploads_left)} uploads after {arguments.keep_minutes:g} minutes, "
          f"{len(at_the_end)} files once the page has ended")  # fmt: skip
    return int(bool(wrong or uploads_left or at_the_end))


def make_system(folder: Path) -> Path:
    """A tiny system of speech alone with random weights, whose answers differ from clip to clip."""
    torch.manual_seed(0)
    whisper = make_tiny_whisper(folder / "whisper")
    model = SailerForAudioClassification.from_audio_text_pretrained(whisper, heads=["primary", "attributes"]).eval()
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(whisper))
    inputs = processor(audio=[clip(number) for number in range(0, 1000, 40)], sampling_rate=RATE)
    with torch.no_grad():
        embeddings = model(**inputs).embeddings
        for head in model.heads.values():  # as it comes it gives all much the same answer
            deviation, mean = torch.std_mean(head(embeddings), dim=0)
            head[-1].weight /= deviation.unsqueeze(1)
            head[-1].bias.sub_(mean).div_(deviation)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def clip(number: int) -> np.ndarray:
    """Noise of a colour, a loudness and, to the millisecond, a length of its own (1 to 2 s of the first thousand)."""
    generator = np.random.default_rng(number)
    milliseconds = 1000 + 373 * number % 1000 + number // 1000 * 1000  # neighbours differ much
    samples = generator.normal(0, 1, RATE * milliseconds // 1000)
    kernel = generator.normal(0, 1, 8)
    coloured = np.convolve(samples, kernel / np.abs(kernel).sum(), mode="same")
    return (generator.uniform(0.02, 0.2) * coloured).clip(-1, 1).astype(np.float32)


def write_clips(folder: Path, number: int) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{place}.wav" for place in range(number)]
    for place, file in enumerate(files):
        soundfile.write(file, clip(place), RATE)
    return files


def expectations(model: str | Path, clips: Sequence[Path]) -> list[tuple[float, tuple[float, ...]]]:
    """What the page is to show of each clip: its length in seconds, and the values of all bars."""
    system = System("it", sailer.load(model))
    return [shown_values(panels.results(judge(file, [system], Limits()), PRIOR)) for file in clips]


def shown_values(shown: str) -> tuple[float, tuple[float, ...]]:
    """A result's length in seconds, and the values of its bars in the order of their labels.

    Raises:
        ValueError: it is none.
    """
    end = re.search(r'data-end="([\d.]+)"', shown)
    if end is None:
        raise ValueError(re.sub(r"<[^>]+>", "", shown)[:200] or "an empty answer")
    named = re.findall(r'"sailer-name">([^<]+)</span>.*?"sailer-value">([\d.]+)<', shown)
    return float(end[1]), tuple(float(value) for _, value in sorted(named))


@contextmanager
def page(model: str | Path, temporary: Path, keep_minutes: float) -> Iterator[tuple[str, psutil.Process]]:
    """The page's address and process; Ctrl+C ends it with the block."""
    command = [sys.executable, "-m", "sailer.cli", "page", str(model), "--port", "0"]
    command += ["--keep_minutes", str(keep_minutes)]
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://\S+", process.stdout.readline() if process.stdout else "")
        if found is None:
            raise RuntimeError("The page did not start: its message stands above.")
        yield found[0], psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def visit_all(
    address: str,
    process: psutil.Process,
    clips: Sequence[Path],
    expected: Sequence[tuple[float, tuple[float, ...]]],
    visitors: int,
    strangers: bool = False,
) -> list[Answer]:
    """Every request, by `visitors` at once; the page's memory after each hundred."""
    print(f"memory of the page: {process.memory_info().rss / MEGABYTE:.0f} MB at the start")
    step = max(len(clips) // 10, 1)
    answers, memory, began = [], [], time.perf_counter()
    with httpx.Client(timeout=PATIENCE_S, limits=httpx.Limits(max_connections=2 * visitors)) as client:
        asked = client.get(f"{address}config").json()["dependencies"]
        analyse = next(one["id"] for one in asked if one["api_name"] == "analyse")
        texts = len(next(one for one in asked if one["id"] == analyse)["inputs"]) - 2
        asked_page = Asked(client, address, analyse, texts, strangers)
        with ThreadPoolExecutor(visitors, thread_name_prefix="visitor") as crowd:
            jobs = [crowd.submit(visit, asked_page, place, file, expected[place]) for place, file in enumerate(clips)]
            for place, job in enumerate(jobs, start=1):
                answers.append(job.result())
                if place % step == 0:
                    memory.append(process.memory_info().rss / MEGABYTE)
                    print(
                        f"  {place:5} answers after {time.perf_counter() - began:6.1f} s: {memory[-1]:.0f} MB",
                        flush=True,
                    )
    print(f"memory after the first tenth of the requests {memory[0]:.0f} MB, at the end {memory[-1]:.0f} MB")
    return answers


def visit(page: Asked, place: int, file: Path, expected: tuple[float, tuple[float, ...]]) -> Answer:
    """Upload a clip, ask, and wait, as a browser does; a visitor is a thread."""
    client, address = page.client, page.address
    answer, began = Answer(place), time.perf_counter()
    session = threading.current_thread().name + (f"-{time.monotonic_ns()}" if page.strangers else "")
    try:
        with file.open("rb") as stream:
            sent = client.post(f"{address}gradio_api/upload", files={"files": (file.name, stream)}).raise_for_status()
        recording = {"path": sent.json()[0], "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}
        data = [recording, PRIOR, *[""] * page.texts]
        asked = {"data": data, "fn_index": page.analyse, "session_hash": session}
        client.post(f"{address}gradio_api/queue/join", json=asked).raise_for_status()
        with client.stream("GET", f"{address}gradio_api/queue/data", params={"session_hash": session}) as told:
            message = last_message(told.iter_lines(), answer.places)
        shown = next((part for part in parts_of(message) if "sailer-results" in part), "")
        seconds, scores = shown_values(shown or "".join(parts_of(message)) or json.dumps(message))
        if seconds != expected[0]:
            answer.wrong = f"the result of a clip of {seconds} s, where its own has {expected[0]} s"
        elif len(scores) != len(expected[1]) or not np.allclose(scores, expected[1], atol=TOLERANCE):
            answer.wrong = f"scores {scores}, where its own are {expected[1]}"
    except (httpx.HTTPError, ValueError, KeyError) as error:
        answer.wrong = f"{type(error).__name__}: {error}"
    answer.seconds = time.perf_counter() - began
    return answer


def last_message(lines: Iterator[str], places: list[int]) -> dict[str, Any]:
    """The queue's last word to a visitor; the places that it told before are added to `places`, 1 for the first."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        message = json.loads(line.removeprefix("data:"))
        if message["msg"] == "estimation" and message["rank"] is not None:
            places.append(message["rank"] + 1)
        elif message["msg"] in ("process_completed", "unexpected_error"):
            return message
    raise ValueError("the queue ended without an answer")


def parts_of(message: dict[str, Any]) -> list[str]:
    return [part for part in message.get("output", {}).get("data", ()) if isinstance(part, str)]


def wait_for_sweep(folder: Path, keep_minutes: float) -> list[Path]:
    """The uploads that are left once all are older than what is kept, and the page has looked."""
    until = time.monotonic() + 2 * 60 * keep_minutes + 5
    while (left := [file for file in files_in(folder) if "uploads" in file.parts]) and time.monotonic() < until:
        time.sleep(0.5)
    return left


def files_in(folder: Path) -> list[Path]:
    """Relative to the folder; what goes while this looks is not there."""
    return [Path(place, name).relative_to(folder) for place, _, names in os.walk(folder) for name in names]


if __name__ == "__main__":
    sys.exit(main())
