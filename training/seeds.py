"""Runs of one recipe with several seeds go in; their figures' means and intervals come out, and a report of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from scipy.stats import t as student

from sailer.data.atomic import replacing, write_json
from sailer.hub.card import FACTS_FILE, NOT_METRICS, seed_tables, write_card
from sailer.settings import SettingsError

LEVEL = 95
FINISHED = ("config.json", "metrics.json", "recipe.yaml", FACTS_FILE, "README.md")
# Where it is, not what it is.
NOT_COMPARED = ("output_dir", "feature_cache_dir", "resume_from_checkpoint", "data_dir", "disable_tqdm")


def check_seeds(seeds: Sequence[int], given: Mapping[str, Any]) -> None:
    """Refuse seeds that cannot be used, beside the options that were given.

    Raises:
        SettingsError: none, one that is there twice or is negative, or with another option that contradicts them.
    """
    doubled = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
    if not seeds or doubled or min(seeds) < 0:
        why = f"{doubled[0]} is there twice" if doubled else "give whole numbers from 0, such as 0,1,2"
        raise SettingsError(f"seeds is {list(seeds)}: {why}.")
    for name, reason in {
        "seed": "each run has one of the seeds; leave one of the two out.",
        "push_to_hub": "choose one of the systems and push it: sailer push OUTPUT/seed-N REPO_ID.",
        "resume_from_checkpoint": "what is finished is kept and what was cut short goes on by itself; leave it out.",
    }.items():
        if given.get(name) is not None and given[name] is not False:
            raise SettingsError(f"{name} is {given[name]!r} beside seeds: {reason}")


def is_finished(folder: Path, recipe: str) -> bool:
    """Whether a folder holds the finished system of a recipe.

    Args:
        folder: of one seed.
        recipe: as resolved, YAML.

    Raises:
        SettingsError: it holds the finished system of another recipe; the message names what differs.
    """
    if not all((folder / name).is_file() for name in FINISHED):
        return False
    yaml = YAML(typ="safe", pure=True)
    try:
        before, wanted = yaml.load((folder / "recipe.yaml").read_text(encoding="utf-8")), yaml.load(recipe)
    except (YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{folder / 'recipe.yaml'} cannot be read: {error}. Move {folder} away.") from error
    differing = [
        f"{name} ({before.get(name)!r} there, {wanted.get(name)!r} here)"
        for name in sorted({*before, *wanted} - {*NOT_COMPARED})
        if before.get(name) != wanted.get(name)
    ]
    if differing:
        raise SettingsError(
            f"{folder} holds the finished system of other settings: {', '.join(differing)}. Choose another "
            "output_dir, or move it away."
        )
    return True


def summarize(figures: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and interval of each figure over seeds.

    The interval is of the mean, by Student's t distribution with one degree of freedom less than there are seeds
    (deviations are of a sample, divided by n - 1): what other seeds would give, of the same corpus and splits.

    Args:
        figures: seed -> split -> figures by name, as metrics.json has them; what is not a number is left out.

    Returns:
        `seeds`, `level` (in %), `method` (a sentence) and `splits`: split -> figure -> `values` (by seed, None where
        not defined), `mean`, `deviation` and `interval` (None with one value; mean None with none).
    """
    seeds = list(figures)
    splits: dict[str, dict[str, Any]] = {}
    for split, first in figures[seeds[0]].items():
        if not isinstance(first, Mapping):
            continue
        names = [name for name in first if not name.startswith(("loss", *NOT_METRICS))]
        splits[split] = {}
        for name in names:
            values = [figures[seed].get(split, {}).get(name) for seed in seeds]
            if all(value is None or isinstance(value, int | float) for value in values):
                splits[split][name] = {"values": values, **_spread(values)}
    degrees = f"{len(seeds) - 1} degree{'s' * (len(seeds) > 2)} of freedom"
    method = (
        f"Intervals hold the mean over seeds at {LEVEL} %, by Student's t distribution with {degrees}: they tell what "
        "another seed would change, not what other speakers would."
        if len(seeds) > 1
        else "With one seed there is no interval."
    )
    return {"seeds": seeds, "level": LEVEL, "method": method, "splits": splits}


def write_summary(output_dir: Path, seeds: Sequence[int]) -> Path:
    """Write seeds.json and report.md of finished runs, and the same figures on each one's model card.

    Args:
        output_dir: has a folder `seed-N` for each.
        seeds: of the runs.

    Returns:
        The report.
    """
    figures = {seed: _read(output_dir / f"seed-{seed}" / "metrics.json") for seed in seeds}
    summary = summarize(figures)
    write_json(summary, output_dir / "seeds.json")
    for seed in seeds:
        folder = output_dir / f"seed-{seed}"
        write_card(_read(folder / FACTS_FILE) | {"seeds": {**summary, "own": seed}}, folder)
    text = [f"# {output_dir.name}: {len(seeds)} seeds", f"{summary['method']} Written on {date.today().isoformat()}."]
    for split, table in seed_tables(summary).items():
        text += [f"## {split}", table]
    with replacing(output_dir / "report.md") as beside:
        beside.write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return output_dir / "report.md"


def summary_lines(output_dir: Path, names: Sequence[str] = ("macro_f1", "accuracy", "min_map")) -> str:
    """The main figures of seeds.json, for the terminal."""
    lines = []
    for split, figures in _read(output_dir / "seeds.json")["splits"].items():
        for name in (name for name in names if name in figures and figures[name]["mean"] is not None):
            found = figures[name]
            ends = "" if found["interval"] is None else " [{:.4f}, {:.4f}]".format(*found["interval"])
            lines.append(f"  {split} {name}: {found['mean']:.4f}{ends}")
    return "\n".join(lines)


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    known = [float(value) for value in values if value is not None and math.isfinite(value)]
    if len(known) < 2:
        return {"mean": known[0] if known else None, "deviation": None, "interval": None}
    mean, deviation = statistics.fmean(known), statistics.stdev(known)
    reach = float(student.ppf((100 + LEVEL) / 200, len(known) - 1)) * deviation / math.sqrt(len(known))
    return {"mean": mean, "deviation": deviation, "interval": [mean - reach, mean + reach]}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
