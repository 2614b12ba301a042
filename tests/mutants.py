"""Small changes to the modules that numbers come from, each run against the tests of its module: how many are noticed?

    make mutants

draws a seeded sample of the changes that Cosmic Ray makes (an operator, a comparison, a constant, a condition), makes
one at a time in a copy of the checkout and runs the tests. A stopped run goes on where it stopped. Results of tests
that have changed since are not kept, and a changed module is a new sample. tests/mutants.md keeps what was found.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from functools import cache
from itertools import islice
from operator import attrgetter
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "data/augmentation.py": "tests/test_augmentation.py",
    "data/labels.py": "tests/test_labels.py",
    "data/rendering.py": "tests/test_rendering.py",
    "training/calibration.py": "tests/test_calibration.py",
    "training/losses.py": "tests/test_losses.py",
    "training/metrics.py": "tests/test_metrics.py",
    "windows_sailer.py": "tests/test_windows.py",
}
# Imported once, before the runs of the tests are forked off: most of the time would go there.
HEAVY = (
    *("accelerate", "datasets", "evaluate", "hypothesis.extra.numpy", "pytest", "soundfile", "soxr"),
    *("scipy.optimize", "scipy.spatial.distance", "scipy.special", "sklearn.metrics", "torch", "transformers"),
)
TIMEOUT = 180  # seconds: ten times what the slowest file takes
MEMORY = 12 * 1024**3  # bytes of address space: a changed size may be any number
# An operator is replaced by its like. A shift in a product's place raises at the first call: any test would notice it.
FAMILIES = (
    *({"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}, {"BitOr", "BitAnd", "BitXor"}),
    *({"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"}, {"Is", "IsNot"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, default=300, help="how many changes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    options = parser.parse_args()
    work_dir = ROOT / "outputs" / "mutants"
    work_dir.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    session = work_dir / f"{digest(*TESTS)}_{options.sample}_{options.seed}.sqlite"
    if not session.exists():
        draw(session, options.sample, options.seed)
    with use_db(session) as database:
        run(database, copied(work_dir / "copy"))
        report(database)


def digest(*names: str) -> str:
    """Short name of the present contents of some files."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()[:12]


def draw(session: Path, size: int, seed: int) -> None:
    """Write a session with a random sample of the changes, the same one for the same seed and modules."""
    unfinished = session.with_suffix(".part")
    with use_db(unfinished) as database:
        init([Path(name) for name in TESTS], database, {})
        items = [item for item in database.work_items if counts(item.mutations[0])]
        items.sort(key=lambda item: attrgetter("module_path", "operator_name", "occurrence")(item.mutations[0]))
        random.Random(seed).shuffle(items)
        valid = (item for item in items if mutated(item.mutations[0]) is not None)
        sample = list(islice(valid, size))
        database.clear()
        database.add_work_items(sample)
    unfinished.rename(session)


def counts(change: MutationSpec) -> bool:
    """Whether a change is one of the kind above, and not of a type in a signature, which nothing evaluates."""
    replaced, _, kinds = change.operator_name.rpartition("Operator_")
    if replaced.endswith(("Binary", "Comparison")) and not any(set(kinds.split("_")) <= kind for kind in FAMILIES):
        return False
    return not any(start <= tuple(change.start_pos) < end for start, end in types_of(change.module_path))


@cache
def types_of(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Beginning and end (line, column) of every type in a module's signatures."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    types = [getattr(node, name, None) for node in nodes for name in ("annotation", "returns")]
    return [((one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)) for one in types if one]


def mutated(change: MutationSpec) -> str | None:
    """The changed module, or None where the change is not Python."""
    operator = get_operator(change.operator_name)()
    code = mutate_code(change.module_path.read_text(), operator, change.occurrence)
    try:
        ast.parse(code)
    except SyntaxError:
        return None
    return code


def copied(parent: Path) -> Path:
    """A fresh copy of the checkout, named as the package is and the one that this process imports as `sailer`."""
    shutil.rmtree(parent, ignore_errors=True)
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "outputs", "*.egg-info")
    shutil.copytree(ROOT, parent / "sailer", ignore=left_out)
    if (ROOT.parent / "shared").is_dir():
        (parent / "shared").symlink_to(ROOT.parent / "shared")
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.dont_write_bytecode = True  # two changes within a second have one time stamp
    sys.path.insert(0, str(parent))
    os.chdir(parent / "sailer")
    for name in HEAVY:
        importlib.import_module(name)
    return parent / "sailer"


def run(database: WorkDB, copy: Path) -> None:
    """Try every change that has no result of today's tests, once these pass without any change."""
    today = {name: digest(tests, "tests/conftest.py") for name, tests in TESTS.items()}
    known = {job: result.output.split()[0] for job, result in database.results}
    left = [
        item for item in database.work_items if known.get(item.job_id) != today[str(item.mutations[0].module_path)]
    ]
    for name in sorted({str(item.mutations[0].module_path) for item in left}):
        noticed = noticed_by(TESTS[name])
        if noticed:
            raise SystemExit(f"error: without any change there is {noticed}")
    for number, item in enumerate(left, 1):
        change = item.mutations[0]
        name = str(change.module_path)
        original = (copy / name).read_text()
        (copy / name).write_text(mutated(change))
        noticed = noticed_by(TESTS[name])
        (copy / name).write_text(original)
        outcome = TestOutcome.KILLED if noticed else TestOutcome.SURVIVED
        result = WorkResult(WorkerOutcome.NORMAL, output=f"{today[name]} {noticed}", test_outcome=outcome)
        database.set_result(item.job_id, result)
        print(f"{number} of {len(left)}: {described(change)}: {noticed or 'NOT NOTICED'}", flush=True)


def noticed_by(tests: str) -> str:
    """The first test that fails, run in a fork of this process; "" if none does."""
    with tempfile.TemporaryFile("w+") as printed:
        child = os.fork()
        if not child:
            os.setsid()
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.alarm(TIMEOUT)
            pytest = importlib.import_module("pytest")
            status = pytest.main(["-xq", "--tb=no", "-m", "not slow", "-p", "no:cacheprovider", tests])
            sys.stdout.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # processes that it started
        printed.seek(0)
        failures = [line for line in printed.read().splitlines() if line.startswith(("FAILED", "ERROR"))]
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)} (a time-out is {int(signal.SIGALRM)})"
    return (failures or [f"status {os.WEXITSTATUS(status)} of pytest"])[0] if status else ""


def described(change: MutationSpec) -> str:
    """Where and what: the line as it was and as it becomes."""
    row = change.start_pos[0] - 1
    codes = change.module_path.read_text(), mutated(change)
    before, after = (code.splitlines()[row].strip() for code in codes)
    return f"{change.module_path}:{row + 1} `{before}` -> `{after}`"


def report(database: WorkDB) -> None:
    """What was not noticed; the share that was, by module and of all, with its interval."""
    from scipy.stats import binomtest

    results = [(item.mutations[0], result.test_outcome) for item, result in database.completed_work_items]
    for change, outcome in sorted(results, key=lambda pair: (pair[0].module_path, pair[0].start_pos)):
        if outcome == TestOutcome.SURVIVED:
            print(f"not noticed: {described(change)}")
    tried = Counter(str(change.module_path) for change, _ in results)
    noticed = Counter(str(change.module_path) for change, outcome in results if outcome == TestOutcome.KILLED)
    for name in TESTS:
        print(f"{name}: {noticed[name]} of {tried[name]}")
    interval = binomtest(noticed.total(), len(results)).proportion_ci(method="wilson")
    share = f"{noticed.total() / len(results):.1%}, 95 % interval {interval.low:.1%} to {interval.high:.1%}"
    print(f"Result: {noticed.total()} of {len(results)} noticed ({share})")


if __name__ == "__main__":
    main()
