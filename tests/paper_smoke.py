"""Every system of the paper from its recipe, end to end, on tiny backbones: does each row of the tables run?

    make paper-smoke

A synthetic corpus is written in MSP-Podcast's own form. Every recipe on that corpus is trained by `sailer train RECIPE
--tiny`, which changes the backbones alone; then both ensembles of Table 5, the report on its three rows, and the two
files of the challenge, all by the commands that someone with the corpus would give. It says whether they work, not how
well: the backbones are random and the speech is synthetic. What each command printed is in a .log file.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched: what is missing is then told at once

from sailer.cli import main as sailer
from sailer.data import load_corpus
from sailer.data.challenge import KINDS, check_submission, read_file_list
from sailer.data.msp_writer import SPLIT_NAMES, write_msp_podcast
from sailer.settings import bundled_recipes, load_recipe

CORPUS = "msp_podcast"
# The three systems of Table 5 and its rows, by the names of their folders.
SYSTEMS = ("paper_system1_wavlm", "paper_system2_whisper_secondary", "paper_system3_whisper_attributes")
ENSEMBLES = {"table5_two_systems": SYSTEMS[:2], "table5_three_systems": SYSTEMS}
REPORT = "table5_report"
# Imported once, before the commands' processes are forked off: a third of the time would go there.
HEAVY = ("sailer.train", "sailer.training.ensembling", "sailer.training.evaluation")
PAPERS_FIGURES = re.compile(r"macro-F1 (\d\.\d+)")


@dataclass
class Line:
    """What became of a step: its name, seconds, development macro-F1 and the paper's, and its fault ("" if none)."""

    name: str
    seconds: float
    macro_f1: float | None = None
    paper: str = ""
    fault: str = ""

    def cells(self) -> list[str]:
        """The line as a row of the table."""
        figure = "" if self.macro_f1 is None else f"{self.macro_f1:.3f}"
        return [self.name, f"{self.seconds:.0f}", figure, self.paper, self.fault or "ok"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; 1 if one of them failed, after the others have run."""
    options = make_parser().parse_args(arguments)
    folder, lines = options.output_dir, []
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def step(name: str, command: Sequence[object], recipe: str = "") -> Line:
        line = run(name, command, folder)
        line.macro_f1, line.paper = figures(folder / name, recipe)
        lines.append(line)
        return line

    started = time.perf_counter()
    for module in HEAVY:
        importlib.import_module(module)
    file_list = write_corpus(folder / "MSP-Podcast", options.train_clips, options.development_clips)
    show(Line("corpus", time.perf_counter() - started))
    data = ["--corpus", CORPUS, "--data_dir", folder / "MSP-Podcast"]
    for name in options.recipes:
        command = ["train", name, "--tiny", "--data_dir", folder / "MSP-Podcast", "--output_dir", folder / name]
        show(step(name, [*command, "--disable_tqdm"], recipe=name))
    if {*SYSTEMS} <= {*options.recipes}:
        for name, members in ENSEMBLES.items():
            show(step(name, ["ensemble", *(folder / member for member in members), folder / name]))
        rows = [folder / name for name in (SYSTEMS[-1], *ENSEMBLES)]
        report = ["evaluate", *rows, *data, "--split", "validation", "--output_dir", folder / REPORT]
        show(step(REPORT, [*report, "--bootstrap", "100"]))
        for kind in KINDS:
            name = f"challenge_{kind}"
            submit = ["evaluate", rows[-1], *data, "--split", "test1", "--output_dir", folder / name]
            line = step(name, [*submit, "--submission", kind, "--file_list", file_list, "--bootstrap", "100"])
            line.fault = line.fault or wrong_submission(kind, folder / name, file_list)
            show(line)
    print(f"\n{table(lines)}\n")
    failed = [line.name for line in lines if line.fault]
    print(f"{len(lines) - len(failed)} of {len(lines)} steps ran, in {time.perf_counter() - started:.0f} s.", *failed)
    return bool(failed)


def write_corpus(folder: Path, train_clips: int, development_clips: int) -> Path:
    """A synthetic corpus in MSP-Podcast's form, and beside it the challenge's list of files: those of Test1."""
    corpus = load_corpus(
        "synthetic", train_clips=train_clips, validation_clips=development_clips, test_clips_per_class=2
    )
    write_msp_podcast(corpus, folder)
    with open(folder / "Labels" / "labels_consensus.csv", newline="", encoding="utf-8") as file:
        names = [row["FileName"] for row in csv.DictReader(file) if row["Split_Set"] == SPLIT_NAMES["test"]]
    file_list = folder.parent / "test_files.csv"
    file_list.write_text("\n".join(["FileName", *names]) + "\n")
    return file_list


def run(name: str, command: Sequence[object], folder: Path) -> Line:
    """Give `sailer` a command, in a process of its own that writes to a log. What it imports is there already."""
    started, log = time.perf_counter(), folder / f"{name}.log"
    words = [str(word) for word in command]
    process = multiprocessing.get_context("fork").Process(target=_give, args=(words, log))
    process.start()
    process.join()
    fault = f"exit status {process.exitcode}, see {log}" if process.exitcode else ""
    return Line(name, time.perf_counter() - started, fault=fault)


def _give(words: list[str], log: Path) -> None:
    with open(log, "w", buffering=1, encoding="utf-8") as file:
        for stream in (1, 2):  # for handlers of logs, which keep the stream that they were made with
            os.dup2(file.fileno(), stream)
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                status = sailer(words)
            except Exception:
                traceback.print_exc()
                status = 1
    os._exit(status)  # nothing of the parent's is this process's to finish


def show(line: Line) -> None:
    """One line in the terminal, as soon as there is one."""
    name, seconds, figure, paper, result = line.cells()
    print(f"{name:36} {seconds:>5} s  {figure:>5}  {paper:>5}  {result}", flush=True)


def figures(folder: Path, recipe: str) -> tuple[float | None, str]:
    """The development set's macro-F1 that a step left, and the paper's by the recipe's first line."""
    found, file = None, folder / "metrics.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        found = kept["validation"]["macro_f1"] if "validation" in kept else list(kept.values())[-1]["macro_f1"]
    first = bundled_recipes()[recipe].read_text(encoding="utf-8").splitlines()[0] if recipe else ""
    match = PAPERS_FIGURES.search(first)
    return found, match[1] if match else ""


def wrong_submission(kind: str, folder: Path, file_list: Path) -> str:
    """What is wrong with the challenge's file, if anything."""
    try:
        check_submission(kind, folder / f"submission_{kind}.csv", read_file_list(file_list))
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def table(lines: Sequence[Line]) -> str:
    """The steps as a table in Markdown."""
    titles = "| step | seconds | macro-F1 of the tiny system | the paper's, of the real one | result |"
    return "\n".join([titles, "|---|--:|--:|--:|---|", *(f"| {' | '.join(line.cells())} |" for line in lines)])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipes = [name for name in bundled_recipes() if load_recipe(name).get("corpus") == CORPUS]
    rows = [name for name in recipes if not name.startswith("more_")]  # those are tests/test_recipes_more.py's
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=rows, metavar="NAME", help="rows to run")
    parser.add_argument("--train_clips", type=int, default=96, metavar="N")
    parser.add_argument("--development_clips", type=int, default=48, metavar="N")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/paper_smoke"), help="emptied first")
    return parser


if __name__ == "__main__":
    sys.exit(main())
