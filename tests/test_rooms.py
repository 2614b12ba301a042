"""Who may import whom (the rules of the house), read off the sources without running them."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HUB_FILES = {path.stem for path in [*ROOT.glob("*_sailer.py"), *ROOT.glob("encoders_*.py")]}
# A Hub file may import these besides other Hub files: what a machine that loads a model has. Readers and resamplers
# only inside try/except, because a bare import is checked when the class is loaded.
TRAVELS_WITH = {"torch", "transformers", "numpy", "accelerate", "huggingface_hub", "safetensors"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, also for types alone; ours by their place, as "data.labels"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "sailer" else [module]
        else:
            continue
        found |= {name.removeprefix("sailer.") for name in names}
    return found


def below(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


# Public names that `from sailer import X` loads, by where they come from.
PUBLIC = {"SailerTrainer": "training", "SailerTrainingArguments": "training"}
MODELS = {name for name in HUB_FILES if name.startswith(("modeling", "encoders", "pipeline", "layers"))}
MODELS |= {"SailerModel", "SailerForAudioClassification", "SpeechEmotionPipeline"}


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("data", {"training", "inference", "hub", "train", "cli", *MODELS, *PUBLIC}),
        ("training", {"inference", "train", "cli"}),
        ("inference", {"training", "train", "cli", *PUBLIC}),
        ("hub", {"inference", "train", "cli"}),
    ],
)
def test_a_room_keeps_to_its_own(room: str, forbidden: set[str]) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert len(files) > 1
    found = {f"{path.relative_to(ROOT)}: {name}" for path in files for name in imports(path) if below(name, forbidden)}
    assert found == set()


@pytest.mark.parametrize("name", sorted(HUB_FILES))
def test_a_hub_file_imports_only_what_travels(name: str) -> None:
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    guarded = {id(node) for handler in ast.walk(tree) if isinstance(handler, ast.Try) for node in ast.walk(handler)}
    relative = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}
    assert relative <= HUB_FILES, "only `from .name import X` of another Hub file is followed when files are copied"
    for node in ast.walk(tree):
        if id(node) in guarded or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for module in modules if not getattr(node, "level", 0) else []:
            top = module.split(".")[0]
            assert top in TRAVELS_WITH or top in sys.stdlib_module_names, module


def test_the_root_holds_seventeen_python_files_at_most_and_no_file_is_over_500_lines() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 17
    rooms = (
        path
        for room in ("data", "hub", "inference", "training", "tests", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
    )
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (*ROOT.glob("*.py"), *rooms)}
    assert {name: lines for name, lines in sizes.items() if lines > 500} == {}
