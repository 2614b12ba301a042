import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from sailer.cli import main
from sailer.settings import SettingsError

HEAVY = ("torch", "transformers", "datasets", "evaluate", "sklearn", "matplotlib", "soxr", "pandas", "pydantic")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """Stand-ins for the functions that do the work; each call is noted as (function, arguments by their name)."""
    noted: list = []

    def stand_in(module: str, result: object, name: str) -> None:
        real = importlib.import_module(f"sailer.{module}")
        signature = inspect.signature(getattr(real, name))

        def note(*values: object, **options: object) -> object:
            noted.append((name, signature.bind(*values, **options).arguments))
            return result

        monkeypatch.setattr(real, name, note)

    stand_in("train", Path("out"), "run")
    stand_in("training.evaluation", Path("figures"), "evaluate_models")
    stand_in("inference.predict", 3, "main")
    stand_in("hub.conversion", Path("converted"), "convert")
    stand_in("hub.merging", Path("merged"), "merge")
    stand_in("hub.publishing", "https://huggingface.co/me/it", "push")
    return noted


def run_python(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("argument", ["--help", "recipes"])
def test_help_and_the_list_of_recipes_load_nothing_heavy(argument: str, tmp_path: Path) -> None:
    code = f"""
import sys
from sailer.cli import main
try:
    main(["{argument}"])
finally:
    print("loaded:", [name for name in {HEAVY} if name in sys.modules])
"""
    done = run_python(code, tmp_path)
    assert "loaded: []" in done.stdout
    if argument == "recipes":
        return
    for command in ("train", "evaluate", "predict", "listen", "convert", "data", "push", "recipes"):
        assert f"    {command} " in done.stdout


def test_recipes_lists_names_with_their_first_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines][:1] == ["demo"]
    assert all("#" not in line and len(line.split()) > 3 for line in lines)


def test_train_passes_recipe_and_options(calls: list) -> None:
    assert main(["train", "recipes/demo.yaml", "--learning_rate", "5e-4", "--heads", "primary", "age", "--bf16"]) == 0
    options = {"learning_rate": "5e-4", "heads": ["primary", "age"], "bf16": True}
    assert calls == [("run", {"recipe": "recipes/demo.yaml", "overrides": options})]


def test_train_without_a_recipe_is_the_demo(calls: list) -> None:
    assert main(["train", "--seed", "3"]) == 0
    assert calls == [("run", {"recipe": "recipes/demo.yaml", "overrides": {"seed": 3}})]


def test_evaluate(calls: list, capsys: pytest.CaptureFixture) -> None:
    line = "evaluate a b --corpus ravdess --data_dir d --split validation --output_dir o --batch_size 4"
    assert main([*line.split(), "--corpus_options", "{test_actors: 21-24}"]) == 0
    named = {"corpus": "ravdess", "data_dir": "d", "split": "validation", "output_dir": Path("o"), "batch_size": 4}
    named |= {"models": ["a", "b"], "corpus_options": {"test_actors": "21-24"}, "bootstrap": 1000}
    named |= {"embed_audio": False, "submission": None, "file_list": None}
    assert calls == [("evaluate_models", named)]
    assert capsys.readouterr().out.splitlines()[-1] == "Result: figures"


def test_evaluate_refuses_corpus_options_that_are_no_mapping(calls: list, capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "a", "--corpus", "ravdess", "--corpus_options", "21"]) == 2
    assert "--corpus_options is '21', expected a mapping" in capsys.readouterr().err
    assert not calls


def test_predict_gives_its_own_exit_status(calls: list) -> None:
    assert main(["predict", "model", "a.wav", "folder", "--min_confidence", "0.5", "--timeline"]) == 3
    ((_, named),) = calls
    arguments = named["command"]
    assert (arguments.model, arguments.paths) == ("model", ["a.wav", "folder"])
    assert (arguments.min_confidence, arguments.timeline, arguments.prior) == (0.5, True, "balanced")


def test_convert_and_push(calls: list, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", "me/theirs", "mine", "--audio_backbone", "b"]) == 0
    assert main(["push", "mine", "me/it", "--private"]) == 0
    assert main(["merge", "adapters", "whole", "--audio_backbone", "b"]) == 0
    merged = {"adapters": "adapters", "folder": Path("whole"), "audio_backbone": "b", "text_backbone": None}
    assert calls.pop() == ("merge", merged)
    assert calls == [
        ("convert", {"source": "me/theirs", "destination": Path("mine"), "audio_backbone": "b", "lora": "auto"}),
        ("push", {"folder": Path("mine"), "repo_id": "me/it", "private": True}),
    ]
    assert capsys.readouterr().out.splitlines() == [
        *("Result: converted", "Result: https://huggingface.co/me/it", "Result: merged"),
    ]


def test_data_describes_a_corpus_and_saves_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from datasets import load_from_disk

    small = ["--train_clips", "40", "--validation_clips", "20", "--test_clips_per_class", "1", "--audio", "false"]
    four = ["--labels", "Angry", "Happy", "Neutral", "Sad"]
    assert main(["data", "synthetic", *small, *four, "--output_dir", str(tmp_path / "rows")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"Result: {tmp_path / 'rows'}"
    table = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert table["Happy"] and "Contempt" not in table and "40" in table["All"]
    rows = load_from_disk(str(tmp_path / "rows"))
    assert {name: len(split) for name, split in rows.items()} == {"train": 40, "validation": 20, "test": 4}
    assert len(rows["train"][0]["votes"]) == 4 and list((tmp_path / "rows").glob("*.png"))


def test_data_refuses_before_the_long_work(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["data", "synthetic", "--output_dir", str(tmp_path)]) == 2
    assert "holds other files (mine.txt" in capsys.readouterr().err
    assert main(["data", "synthetic", "--transcriber", "openai/whisper-tiny"]) == 2
    assert "--transcriber needs --output_dir" in capsys.readouterr().err


def test_data_help_lists_corpora_and_their_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "ravdess", "--help"])
    assert ended.value.code == 0
    assert "  ravdess: train_actors, validation_actors, test_actors" in capsys.readouterr().out


def test_train_help_lists_the_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "demo", "-h"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--mixing_probability  float, default 0.0" in text
    assert "probability p_a with which a clip is mixed with another one." in text


@pytest.mark.parametrize(
    "error", [SettingsError("no such thing"), FileNotFoundError("no such thing"), ImportError("no such thing")]
)
def test_an_expected_error_is_one_line_and_status_2(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*ignored: object) -> None:
        raise error

    monkeypatch.setattr("sailer.train.run", fail)
    assert main(["train", "demo"]) == 2
    assert capsys.readouterr().err == "error: no such thing\n"
    monkeypatch.setenv("SAILER_DEBUG", "1")
    with pytest.raises(type(error), match="no such thing"):
        main(["train", "demo"])


def test_an_interruption_is_status_130_and_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*ignored: object) -> None:
        raise KeyboardInterrupt

    def broken(*ignored: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("sailer.train.run", interrupted)
    assert main(["train"]) == 130
    monkeypatch.setattr("sailer.train.run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "error: Recipe nowhere.yaml does not exist"),
        (["train", "demo", "--learnin_rate", "1"], "did you mean 'learning_rate'?"),
        (["data", "ravdess", "nowhere"], "error: The folder nowhere of corpus 'ravdess' does not exist"),
        (["push", "nowhere", "me/it"], "error: nowhere is not a folder"),
    ],
)
def test_wrong_input_is_told_by_the_module_that_finds_it(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["trian"], ["convert", "source"], ["evaluate", "model"], ["recipes", "--all"]),
        ["evaluate", "model", "--corpus", "ravdess", "--corpora", "ravdess=folder"],
    ],
)
def test_a_wrong_command_line_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: sailer" in capsys.readouterr().err
