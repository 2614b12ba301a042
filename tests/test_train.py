"""The main job on a small synthetic corpus: what it leaves, what it prints, that it learns, and how it refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.cli import main
from sailer.data import load_corpus
from sailer.data.labels import shuffle_labels
from sailer.settings import load_recipe, resolve
from sailer.train import build_system, fit, prepare, run, try_out
from sailer.training.evaluation import evaluate_models

pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs espeakng-loader (the demo extra)")

SMALL = {"train_clips": 60, "validation_clips": 24, "test_clips_per_class": 2, "speakers": 12}
OPTIONS = {
    "corpus_options": SMALL,
    "num_train_epochs": 2,
    "hidden_size": 32,
    "disable_tqdm": True,
    "use_cpu": True,
}
LEFT = {
    *("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md", "recipe.yaml"),
    *("metrics.json", "training_log.json", "training_curve.png", "confusion_matrix.png"),
    *(path.name for path in Path(__file__).resolve().parents[1].glob("*_sailer.py")),
} - {"ensemble_sailer.py"}  # which travels with ensembles alone


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that one small run left and what it printed, in a process of its own as a user starts it."""
    folder = tmp_path_factory.mktemp("run") / "small"
    options = [f"--corpus_options.{name}={value}" for name, value in SMALL.items()]
    options += [f"--{name}={value}" for name, value in OPTIONS.items() if name != "corpus_options"]
    script = Path(__file__).resolve().parents[1] / "train.py"
    finished = subprocess.run(
        [sys.executable, str(script), "--output_dir", str(folder), "--preview", "2", *options],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env=os.environ | {"HF_HOME": str(folder.parent / "hf")},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder, finished.stdout


@pytest.mark.slow
def test_the_main_job_leaves_one_folder(result: tuple[Path, str]) -> None:
    folder, printed = result
    assert {path.name for path in folder.iterdir() if path.is_file()} >= LEFT
    assert not (folder / "checkpoints").exists()
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".small")]
    assert {path.suffix for path in (folder / "preview").iterdir()} == {".wav", ".json", ".png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    test = metrics["test"]
    assert test["scored_clips"] == 16 and 0 <= test["macro_f1"] <= 1
    assert test["baseline_majority_macro_f1"] == pytest.approx(2 * 2 / 18 / 8)  # recall 1, precision 1/8, one class
    assert {"baseline_shuffled_macro_f1", "natural_ece", "natural_uncalibrated_ece"} <= test.keys()
    assert metrics["validation"]["calibration_temperature"] > 0
    log = json.loads((folder / "training_log.json").read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    trained = [entry for entry in log if "loss" in entry]
    assert [entry["epoch"] for entry in trained] == [1, 2] == [entry["epoch"] for entry in log if "eval_loss" in entry]
    assert all(entry["grad_norm"] > 0 and entry["loss_primary"] and entry["learning_rate"] >= 0 for entry in trained)
    assert printed.count("synthetic-0-test-") == 3 and "trained on shuffled labels" in printed
    assert str(folder) in printed.strip().splitlines()[-1]


@pytest.mark.slow
def test_the_config_keeps_what_the_scores_mean(result: tuple[Path, str]) -> None:
    config = SailerForAudioClassification.from_pretrained(result[0]).config
    prior, weights = np.array(config.label_prior), np.array(config.label_weights)
    assert prior.sum() == pytest.approx(1) and (prior * weights).sum() == pytest.approx(1)
    np.testing.assert_allclose(weights[prior > 0], 1 / ((prior > 0).sum() * prior[prior > 0]))
    assert config.target_weighting == "product" and config.calibration_temperature != 1.0
    assert config.conformal["clips"] > 0 and set(config.conformal["scores"]) == {"balanced", "natural"}
    metrics = json.loads((result[0] / "metrics.json").read_text())
    groups = json.loads((result[0] / "groups.json").read_text())["test"]["groups"]
    assert sum(row["scored"] for row in groups["sex"]) == metrics["test"]["scored_clips"] and "agreement" in groups
    assert "## By group" in (result[0] / "README.md").read_text() and (result[0] / "groups.png").is_file()
    assert metrics["validation"]["set90_coverage"] >= 0.9 and metrics["test"]["set90_size"] >= 1
    assert config.audio_config._name_or_path == ""


@pytest.mark.slow
def test_the_resolved_recipe_runs_again(result: tuple[Path, str]) -> None:
    settings = resolve(load_recipe(result[0] / "recipe.yaml"))
    assert settings.data.corpus_options["train_clips"] == 60 and settings.model.hidden_size == 32
    assert settings.training.num_train_epochs == 2


@pytest.mark.slow
def test_evaluating_the_folder_gives_its_own_figures(result: tuple[Path, str], tmp_path: Path) -> None:
    folder = result[0]
    out = evaluate_models([folder, folder], "synthetic", output_dir=tmp_path / "e", corpus_options=SMALL)
    figures = json.loads((out / "metrics.json").read_text())
    own = json.loads((folder / "metrics.json").read_text())["test"]
    for key in ("macro_f1", "accuracy", "min_map", "kl", "ccc"):
        assert figures[str(folder)][key] == pytest.approx(own[key], abs=1e-5)
    assert figures["ensemble"]["macro_f1"] == pytest.approx(own["macro_f1"])  # the mean of two equal systems
    lines = (out / "predictions.csv").read_text().splitlines()
    assert len(lines) == 17 and lines[0].startswith("id,label,decision,Angry")
    assert (out / "confusion_matrix.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_baseline_starts_afresh_in_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Cut after training, a run goes on with its last epoch; in mid-epoch see tests/test_resume.py."""
    import sailer.train

    options = OPTIONS | {"output_dir": str(tmp_path / "run"), "shuffled_label_baseline": True}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sailer.train, "calibrate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        small = {f"corpus_options.{name}": value for name, value in options.pop("corpus_options").items()}
        run("demo", options | small | {"num_train_epochs": 1})
    capsys.readouterr()
    arguments = ["train", "demo", "--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "run")]
    arguments += [f"--corpus_options.{name}={value}" for name, value in SMALL.items()]
    arguments += [f"--{name}={value}" for name, value in OPTIONS.items() if name != "corpus_options"]
    assert main(arguments) == 0
    system, baseline = capsys.readouterr().out.split("Baseline: the same system")
    assert "epoch 1: loss" not in system and "epoch 2: loss" in system
    assert "epoch 1: loss" in baseline and "epoch 2: loss" in baseline


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["off", "memory", "disk"])
def test_two_processes_count_every_clip_once(tmp_path: Path, kept: str) -> None:
    small = SMALL | {"validation_clips": 25}  # odd: one process has a clip less
    options = [f"--corpus_options.{name}={value}" for name, value in small.items()]
    options += ["--num_train_epochs=1", "--shuffled_label_baseline=false", "--use_cpu", "--disable_tqdm"]
    options += [f"--cache_features={kept}", "--augmentation_variants=2", "--freeze_audio=true", "--freeze_text=true"]
    script = Path(__file__).resolve().parents[1] / "train.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    finished = subprocess.run(
        [*command, "demo", "--output_dir", str(tmp_path / "two"), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf")},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["validation"]["clips"] == 25 and metrics["test"]["clips"] == 16
    assert finished.stdout.count("The system, its card and its figures are in") == 1
    assert finished.stderr.count("Features of") == (kept != "off")
    shards = list((tmp_path / "two" / "features").glob("states-*.safetensors"))
    assert len(shards) == (4 if kept == "disk" else 0), "each process one of sounds and one of transcripts"


def test_shuffled_labels_keep_audio_and_counts() -> None:
    rows = load_corpus("synthetic", audio=False, **SMALL)["train"]
    shuffled = shuffle_labels(rows, seed=0)
    assert shuffled["id"] == rows["id"] and shuffled["transcript"] == rows["transcript"]
    assert sorted(shuffled["label"]) == sorted(rows["label"]) and shuffled["label"] != rows["label"]
    # votes, label and attributes of one clip stay together
    together = {(tuple(row["votes"]), row["label"], tuple(row["attributes"])) for row in rows}
    assert {(tuple(row["votes"]), row["label"], tuple(row["attributes"])) for row in shuffled} == together
    assert shuffled.features == rows.select_columns(shuffled.column_names).features


def small_settings(tmp_path: Path, **options):
    return resolve(load_recipe("demo"), OPTIONS | {"output_dir": str(tmp_path)} | options)


@pytest.mark.slow
def test_cached_features_train_to_the_same_system(tmp_path: Path) -> None:
    """Frozen towers: with and without kept features, the same weights come out."""
    states = []
    for cache in ("off", "memory"):
        settings = small_settings(
            tmp_path / cache,
            freeze_audio=True,
            freeze_text=True,
            conv_dropout=0.0,
            augmentation_variants=2,
            cache_features=cache,
            save_strategy="no",
            load_best_model_at_end=False,
            num_train_epochs=1,
            shuffled_label_baseline=False,
        )
        job = prepare(settings)
        assert (job.features is None) == (cache == "off")
        before = job.system.model.heads["primary"][-1].weight.detach().clone()
        fit(job)
        assert (job.system.model.heads["primary"][-1].weight - before).abs().max() > 1e-3
        states.append(job.system.model.state_dict())
    for name, value in states[0].items():
        np.testing.assert_allclose(value.numpy(), states[1][name].numpy(), atol=2e-5, err_msg=name)


def test_trying_the_result_fails_no_finished_run(
    tmp_path: Path, tiny_sailer: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    """A clip without a transcript ended a night's training with exit status 2."""
    rows = load_corpus("synthetic", **SMALL)["test"]
    silent = rows.map(lambda row: {"transcript": ""})
    try_out(tiny_sailer, silent)
    assert "could not be tried on unseen clips: " in caplog.text and str(tiny_sailer) in capsys.readouterr().out
    caplog.clear()
    try_out(tmp_path / "nothing", rows)
    assert "could not be tried on unseen clips: " in caplog.text
    caplog.clear()
    try_out(tiny_sailer, rows)
    assert caplog.text == "" and capsys.readouterr().out.count("synthetic-0-test-") == 3


@pytest.mark.slow
def test_another_label_set_runs_through(tmp_path: Path, capsys) -> None:
    """Four classes as in IEMOCAP: training, metrics, checkpoint; then the checkpoint meets a corpus of nine."""
    four = ["Neutral", "Happy", "Sad", "Angry"]
    options = OPTIONS | {"labels": four, "majority_labels": ["Neutral"], "output_dir": str(tmp_path / "four")}
    options |= {"num_train_epochs": 1, "shuffled_label_baseline": False}
    folder = run("demo", options)
    config = SailerForAudioClassification.from_pretrained(folder).config
    assert config.labels == four and config.majority_labels == ["Neutral"] and config.scored_labels == four
    test = json.loads((folder / "metrics.json").read_text())["test"]
    assert test["scored_clips"] == 8 and {key for key in test if key.startswith("f1_")} == {f"f1_{x}" for x in four}
    arguments = ["train", "demo", "--base_model", str(folder), "--output_dir", str(tmp_path / "nine")]
    assert main([*arguments, *(f"--corpus_options.{name}={value}" for name, value in SMALL.items())]) == 2
    error = capsys.readouterr().err
    assert str(four) in error and "'Contempt'" in error


def test_a_base_model_with_other_labels_is_refused(tmp_path: Path, tiny_sailer: Path) -> None:
    settings = small_settings(tmp_path, base_model=str(tiny_sailer), labels=["Angry", "Happy"], majority_labels=[])
    rows = load_corpus("synthetic", audio=False, label_set=settings.data.label_set(), **SMALL)["train"]
    with pytest.raises(ValueError, match=r"has the labels \['Angry', 'Contempt'.*recipe \['Angry', 'Happy'\]"):
        build_system(settings, settings.data.label_set(), rows)


def test_a_base_model_goes_on(tmp_path: Path, tiny_sailer: Path) -> None:
    settings = small_settings(tmp_path, base_model=str(tiny_sailer))
    rows = load_corpus("synthetic", audio=False, **SMALL)["train"]
    system = build_system(settings, settings.data.label_set(), rows)
    assert isinstance(system.processor, SailerProcessor) and system.model.config.label_weights is not None


def test_a_base_model_trains_what_the_settings_do_not_freeze(tmp_path: Path, tiny_sailer: Path) -> None:
    """Its towers were frozen; without the options they stay so."""
    rows = load_corpus("synthetic", audio=False, **SMALL)["train"]
    base = tmp_path / "base"
    SailerForAudioClassification.from_pretrained(tiny_sailer, freeze_audio=True, freeze_text=True).save_pretrained(
        base
    )
    SailerProcessor.from_pretrained(tiny_sailer).save_pretrained(base)

    def trained(**options: Any) -> set[str]:
        options = {"base_model": str(base), "freeze_audio": True, "freeze_text": True} | options
        settings = small_settings(tmp_path, **options)
        model = build_system(settings, settings.data.label_set(), rows).model
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        return {name.split("encoder.")[1] for name in names if "encoder." in name}

    assert not trained()
    last = trained(freeze_audio=False, trainable_audio_layers=1, cache_features="off")
    assert last and {name.split(".")[1] for name in last} == {"1"}, "of two layers"
    everything = trained(freeze_audio=False, cache_features="off")
    assert last < everything and any(name.startswith("conv1") for name in everything)
    assert any(name.startswith("embeddings") for name in trained(freeze_text=False))
    with pytest.raises(ValueError, match="trainable_audio_layers is a whole number from 1 to 2"):
        trained(freeze_audio=False, trainable_audio_layers=3, cache_features="off")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--audio_backbone", "no/such-backbone"], "The backbone 'no/such-backbone' cannot be loaded"),
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--validation_split", "dev"], "no split 'dev'; it has"),
        (["--corpus", "ravdess", "--data_dir", "/no/such/folder", "--corpus_options", "{}"], "/no/such/folder"),
    ],
)
def test_a_wrong_option_is_one_line(options: list[str], message: str, capsys, tmp_path: Path) -> None:
    small = [f"--corpus_options.{name}={value}" for name, value in SMALL.items()]
    assert main(["train", "demo", "--output_dir", str(tmp_path), *small, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_folder_without_weights_is_named(tmp_path: Path, tiny_whisper: Path, capsys) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(tiny_whisper / "config.json", folder)
    small = [f"--corpus_options.{name}={value}" for name, value in SMALL.items()]
    arguments = ["train", "demo", "--audio_backbone", str(folder), "--output_dir", str(tmp_path / "out"), *small]
    assert main(arguments) == 2
    assert f"The backbone '{folder}' cannot be loaded" in capsys.readouterr().err


def test_a_corpus_of_bad_files_names_them(tmp_path: Path) -> None:
    import soundfile

    folder = tmp_path / "Actor_01"
    folder.mkdir()
    with pytest.raises(ValueError, match=str(tmp_path)):
        run("ravdess_whisper_base", {"data_dir": str(tmp_path), "output_dir": str(tmp_path / "out")})
    clip = folder / "03-01-05-01-01-01-01.wav"
    soundfile.write(clip, np.zeros(160), 16000)
    with pytest.raises(ValueError, match=r"03-01-05-01-01-01-01\.wav.*0\.1"):
        run("ravdess_whisper_base", {"data_dir": str(tmp_path), "output_dir": str(tmp_path / "out")})
    clip.write_bytes(b"")
    with pytest.raises(ValueError, match=r"03-01-05-01-01-01-01\.wav"):
        run("ravdess_whisper_base", {"data_dir": str(tmp_path), "output_dir": str(tmp_path / "out")})
