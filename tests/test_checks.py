"""Settings that would bite late are refused through the command line, before a clip is decoded or an encoder runs."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer.cli import main
from sailer.data import corpora
from sailer.settings import resolve

OPTIONS = {"audio_backbone": "tiny-whisper", "text_backbone": "null", "text_dropout": "0", "use_cpu": "true"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A manifest of 12 silent clips with labels and votes; nothing else is annotated."""
    lines = ["audio,split,label,votes,speaker"]
    for number in range(12):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(4800), 16000)
        label, split = ("Happy", "Sad")[number % 2], ("train", "validation", "test")[number // 4]
        lines.append(f"{number}.wav,{split},{label},{label};{label},{split}")
    path = tmp_path / "clips.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """The one line on stderr of a run that must end before anything is heard."""

    def no_sound(*_: object) -> None:
        raise AssertionError("a clip was decoded")

    def run(recipe: str = "demo", **options: str) -> str:
        monkeypatch.setattr("sailer.data.collator.render", no_sound)
        monkeypatch.setattr("sailer.data.preview.render", no_sound)
        given = {"corpus": "manifest", "data_dir": str(corpus), "output_dir": str(tmp_path / "out"), **OPTIONS}
        given |= {"corpus_options": "{}", "mixing_probability": "0", **options}
        assert main(["train", recipe, *(f"--{name}={value}" for name, value in given.items())]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and not (tmp_path / "out" / "model.safetensors").exists()
        return error

    return run


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_train_epochs", "0", "num_train_epochs is 0.0: it must be more than 0"),
        ("gradient_accumulation_steps", "0", "gradient_accumulation_steps is 0: it must be at least 1"),
        ("hidden_size", "0", "hidden_size is 0: it must be at least 1"),
        ("conv_dropout", "-0.1", "conv_dropout is -0.1: it must be at least 0"),
        ("remove_unused_columns", "true", "the collator needs every column"),
        ("batch_eval_metrics", "true", "the metrics want all clips at once"),
        ("hub_token", "hf_mine", "a command line or recipe is no place for it"),
        ("validation_split", "train", "validation_split is 'train', which the system is trained on"),
        ("validation_split", "test", "load_best_model_at_end to false"),
        ("train_split", "test", "which is among the test splits"),
        ("metric_for_best_model", "macro_f2", "not in the report of this system (did you mean 'macro_f1'?)"),
        ("metric_for_best_model", "f1_Calm", "not in the report of this system"),
        ("data_seed", "-1", "data_seed is -1: it must be at least 0"),
        ("weight_decay", "-1", "weight_decay is -1.0: it must be at least 0"),
        ("save_steps", "0", "save_steps is 0"),
        (
            "train_sampling_strategy",
            "by_length",
            "is 'by_length', which is none; choose 'random' or 'group_by_length'",
        ),
        ("report_to", "wandbb", "report_to is 'wandbb'; choose of"),
        ("lr_scheduler_kwargs", "{bogus: 1}", "lr_scheduler_type is linear, lr_scheduler_kwargs {'bogus': 1}: "),
        ("lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler_type is cosine_with_min_lr"),
        ("resume_from_checkpoint", "nowhere/checkpoint-1", "Checkpoint nowhere/checkpoint-1 is not there"),
        ("max_seconds", "31", "tiny-whisper hears 30 s at most: set max_seconds to 30 or less"),
    ],
)
def test_a_setting_that_bites_late_is_refused_before_the_corpus_is_read(
    option: str, value: str, message: str, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sailer.train.load_corpus", lambda *_, **__: pytest.fail("the corpus was read"))
    assert message in refused(**{option: value})


def test_a_library_that_is_not_there_is_missed_first(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sailer.train.load_corpus", lambda *_, **__: pytest.fail("the corpus was read"))
    monkeypatch.setattr("sailer.training.checks.get_available_reporting_integrations", list)
    assert "report_to is 'wandb', which is not installed: pip install wandb" in refused(report_to="wandb")
    if importlib.util.find_spec("bitsandbytes") is None:
        assert "optim is adamw_bnb_8bit: You need to install `bitsandbytes`" in refused(optim="adamw_bnb_8bit")


def test_a_base_models_heads_say_which_metrics_there_are(refused, tiny_sailer: Path) -> None:
    """With all heads, `ccc` is in its report; the recipe's own heads do not count."""
    base = {"base_model": str(tiny_sailer), "audio_backbone": "null", "labels": "null", "text_dropout": "0"}
    error = refused(**base, metric_for_best_model="macro_f2")
    assert "not in the report of this system (did you mean 'macro_f1'?)" in error and " ccc, " in error
    assert "which the clips of 'validation' do not define" in refused(**base, metric_for_best_model="ccc")


def test_a_metric_that_the_validation_clips_do_not_define_is_refused(refused) -> None:
    error = refused(metric_for_best_model="ccc")
    assert "metric_for_best_model is 'ccc', which the clips of 'validation' do not define" in error
    # A class that does not occur has no key at all.
    assert "not in the report" in refused(metric_for_best_model="f1_Angry")


def test_a_corpus_without_annotators_is_pointed_to_its_labels(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_REGISTERED", {**corpora._REGISTERED})

    @corpora.corpus("unvoted", reads_folder=False)
    def load(path, *, label_set, audio, strict, report):
        def columns(split: str) -> dict:
            audio = [{"path": "nowhere.wav", "bytes": None}] * 2
            return {"id": [f"{split}{number}" for number in range(2)], "label": [1, 5], "audio": audio}

        return {split: columns(split) for split in ("train", "validation", "test")}

    error = refused(corpus="unvoted", data_dir="null")
    assert "No clip of 'train' has annotators' votes" in error and "they have labels: set objective to ce" in error


def test_a_readme_of_the_users_is_not_overwritten(refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    assert "README.md is none that a run wrote" in refused()
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_shorter_encoder_says_how_much_it_hears(refused, tmp_path: Path, tiny_whisper: Path) -> None:
    folder = shutil.copytree(tiny_whisper, tmp_path / "short")
    config = json.loads((folder / "config.json").read_text()) | {"max_source_positions": 500}
    (folder / "config.json").write_text(json.dumps(config))
    assert "hears 10 s at most" in refused(audio_backbone=str(folder))


def test_a_test_split_may_stand_in_where_nothing_is_selected_on_it() -> None:
    options = {"audio_backbone": "tiny-whisper", "validation_split": "test", "load_best_model_at_end": False}
    assert resolve(options).data.validation_split == "test"
