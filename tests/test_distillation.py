"""Distillation: the loss by hand, what a teacher says of each clip, its share in a mix, unlabelled clips, refusals."""

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from sailer import SailerEnsemble, SailerForAudioClassification, SailerProcessor
from sailer.cli import main
from sailer.data import load_corpus
from sailer.data.augmentation import AugmentationSettings
from sailer.data.collator import SailerCollator
from sailer.data.labels import shuffle_labels
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import LabelSet
from sailer.processing_sailer import SailerEnsembleProcessor
from sailer.settings import Settings, load_recipe, resolve
from sailer.train import build_system, fit, prepare
from sailer.training import teaching
from sailer.training.losses import ObjectiveSettings, SailerObjective, TeacherLoss
from sailer.training.teaching import taught

from .sounds import noise


def test_the_teachers_loss_by_hand() -> None:
    # At T = 2 the probabilities 0.64 and 0.36 are 0.8 and 0.6, so 4/7 and 3/7; logits 0 and 2 log 3 give 1/4 and 3/4.
    loss = TeacherLoss(2.0)(torch.tensor([[0.0, 2 * math.log(3)]]), torch.tensor([[0.64, 0.36]]))
    expected = 4 * (4 / 7 * math.log(4 / 7 * 4) + 3 / 7 * math.log(3 / 7 * 4 / 3))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    logits = torch.randn(5, 4)
    assert TeacherLoss(3.0)(logits, logits.softmax(-1)).item() == pytest.approx(0, abs=1e-6)
    impossible = torch.tensor([[1.0, 0.0]])
    assert TeacherLoss(1.0)(torch.zeros(1, 2), impossible).item() == pytest.approx(math.log(2), rel=1e-5)


def test_labels_and_teacher_share_the_primary_loss() -> None:
    settings = ObjectiveSettings("distil", "none", teacher="t", distil_weight=0.25, distil_temperature=1.0)
    objective = SailerObjective(settings)
    outputs = {"logits": torch.zeros(2, 2)}
    # The second clip has no votes: the teacher's part alone is left of it.
    targets = {
        "labels": torch.tensor([[1.0, 0.0], [math.nan, math.nan]]),
        "teacher_labels": torch.tensor([[0.5, 0.5]] * 2),
    }
    losses = objective(outputs, targets)
    assert losses["primary"].item() == pytest.approx(math.log(2) / 2) and losses["teacher"].item() == pytest.approx(0)
    assert losses["loss"].item() == pytest.approx(0.75 * math.log(2) / 2)
    targets["teacher_labels"] = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    both = objective(outputs, targets)
    assert both["loss"].item() == pytest.approx(0.75 * math.log(2) / 2 + 0.25 * math.log(2) / 2)
    objective.eval()
    assert set(objective(outputs, {"labels": targets["labels"]})) == {"primary", "loss"}
    objective.train()
    with pytest.raises(ValueError, match="objective is 'distil' but the batch has no 'teacher_labels'"):
        objective(outputs, {"labels": targets["labels"]})


@pytest.mark.parametrize(
    ("options", "prior"),
    [
        ({"target_weighting": "product"}, "balanced"),
        ({"target_weighting": "none"}, "natural"),
        ({"target_weighting": "none", "logit_adjustment_train": 1.0}, "balanced"),
    ],
)
def test_the_teacher_speaks_in_the_students_terms(options: dict, prior: str) -> None:
    assert ObjectiveSettings("distil", teacher="t", **options).teacher_prior == prior


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "distil"}, "objective is 'distil' and teacher is None: name a system or an ensemble"),
        ({"teacher": "a"}, "objective is 'kl' and teacher is 'a': set objective to distil"),
        ({"objective": "distil", "teacher": "a", "distil_temperature": 0}, "distil_temperature is 0; it must be more"),
        (
            {"objective": "distil", "teacher": "a", "distil_weight": 0},
            "distil_weight is 0; it is a share, above 0 to 1",
        ),
        ({"objective": "distil", "teacher": "a", "distil_weight": 1.5}, "distil_weight is 1.5; it is a share"),
    ],
)
def test_settings_out_of_their_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveSettings(**options)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 20 clips of noise; every other training clip has neither label nor votes."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["audio,split,votes,transcript,speaker"]
    for number in range(20):
        soundfile.write(folder / f"{number}.wav", noise(0.3 + 0.02 * number, number), 16000)
        split = "train" if number < 12 else ("validation", "test")[number % 2]
        votes = "" if split == "train" and number % 2 else f"{('Happy;Happy', 'Sad;Sad')[number // 2 % 2]};Neutral"
        lines.append(f"{number}.wav,{split},{votes},so it is,{split}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder / "clips.csv"


@pytest.fixture(scope="module")
def teacher(tiny_sailer: Path, tiny_speech_sailer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of two systems, of which one reads transcripts."""
    folder, systems = tmp_path_factory.mktemp("teacher"), [tiny_sailer, tiny_speech_sailer]
    SailerEnsemble.from_pretrained(systems).save_pretrained(folder)
    SailerEnsembleProcessor.from_pretrained(systems).save_pretrained(folder)
    return folder


@pytest.fixture
def options(corpus: Path, teacher: Path, tiny_whisper: Path, tmp_path: Path) -> dict:
    return {
        **{"corpus": "manifest", "data_dir": str(corpus), "corpus_options": {}},
        **{"audio_backbone": str(tiny_whisper), "text_backbone": None, "heads": ["primary"]},
        **{"hidden_size": 32, "mixing_probability": 0.0, "annotation_dropout": 0.0, "learning_rate": 1e-2},
        **{"num_train_epochs": 1, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
        **{"output_dir": str(tmp_path / "out"), "shuffled_label_baseline": False, "metric_for_best_model": "kl"},
        **{"objective": "distil", "teacher": str(teacher), "freeze_audio": True},
    }


def settings(options: dict, **changes: object) -> Settings:
    return resolve(load_recipe("demo"), options | changes)


def test_each_clip_is_judged_once_and_that_is_kept(options: dict, teacher: Path, corpus: Path, monkeypatch) -> None:
    given, label_set = settings(options), LabelSet()
    rows = load_corpus("manifest", corpus)["train"]
    judged = taught(rows, given, label_set)
    assert judged.column_names == [*rows.column_names, "teacher"] and judged["id"] == rows["id"]
    model = SailerEnsemble.from_pretrained(teacher).eval()
    processor = SailerEnsembleProcessor.from_pretrained(teacher)
    for row, said in zip(rows, judged["teacher"], strict=True):
        wave = soundfile.read(row["audio"]["path"], dtype="float32")[0]
        with torch.no_grad():
            outputs = model(**processor(wave, text=row["transcript"], sampling_rate=16000))
        expected = model.probabilities(outputs.logits)[0].numpy()
        np.testing.assert_allclose(said, expected, atol=1e-5)
    assert np.ptp(np.array(judged["teacher"]), axis=0).max() > 0.1

    def no_more(*_: object) -> None:
        raise AssertionError("asked again")

    kept = teaching._judged
    monkeypatch.setattr(teaching, "_judged", no_more)
    assert taught(rows, given, label_set)["teacher"] == judged["teacher"]
    with pytest.raises(AssertionError, match="asked again"):
        taught(rows.select(range(11)), given, label_set)
    with pytest.raises(AssertionError, match="asked again"):
        taught(rows, settings(options, target_weighting="none"), label_set)
    save_file({"other": torch.zeros(1)}, Path(given.training.output_dir) / teaching.FILE)
    monkeypatch.setattr(teaching, "_judged", kept)
    assert taught(rows, given, label_set)["teacher"] == judged["teacher"]


def test_labels_in_another_order_are_put_right(options: dict, corpus: Path) -> None:
    names = list(reversed(LabelSet().labels))
    rows = load_corpus("manifest", corpus)["train"]
    usual = taught(rows, settings(options), LabelSet())["teacher"]
    turned = taught(rows, settings(options, labels=names), LabelSet(names))["teacher"]
    assert [list(reversed(said)) for said in turned] == usual


def test_a_mix_has_the_mean_of_its_clips_and_a_batch_the_targets(corpus: Path, tiny_speech_sailer: Path) -> None:
    rows = load_corpus("manifest", corpus)["train"]
    said = np.random.default_rng(0).dirichlet(np.ones(9), len(rows)).astype(np.float32)
    rows = rows.add_column("teacher", list(said))
    augmentation = AugmentationSettings(mixing_probability=1.0, mixing_mode="same_emotion")
    planned = PlannedDataset(rows, augmentation)
    plan = planned.plan(0)
    assert any(partner >= 0 for partner in plan["partner"]) and any(partner < 0 for partner in plan["partner"])
    for row in plan:
        own, other = said[row["index"]], said[row["partner"]]
        np.testing.assert_allclose(row["teacher_target"], (own + other) / 2 if row["partner"] >= 0 else own, rtol=1e-6)
    collator = SailerCollator(SailerProcessor.from_pretrained(tiny_speech_sailer), LabelSet(), ["primary"])
    batch = collator([planned[0], planned[1]])
    np.testing.assert_allclose(batch["teacher_labels"], [planned[i]["teacher_target"] for i in (0, 1)])
    assert "teacher_labels" not in collator([rows.remove_columns("teacher")[0]])
    moved = shuffle_labels(rows, seed=1)
    assert not np.allclose(moved["teacher"], said) and sorted(moved["teacher"]) == sorted(said.tolist())


@pytest.mark.slow
def test_a_student_comes_near_its_teacher(options: dict) -> None:
    """More of the teacher alone: closer to what it says than to the votes, which half of the clips do not have."""
    changes = {
        "distil_weight": 1.0,
        "num_train_epochs": 40,
        "distil_temperature": 1.0,
        "load_best_model_at_end": False,
    }
    job = prepare(settings(options, **changes, save_strategy="no", eval_strategy="no", conv_dropout=0.0))
    assert job.system.model.config.label_weights is None  # as the teacher's configuration has it
    trainer = fit(job)
    said = np.array(job.train_rows["teacher"])
    ours = torch.from_numpy(trainer.predict(job.train_rows).predictions["logits"]).softmax(-1).numpy()
    chance = np.abs(said - said.mean(axis=0)).mean()
    assert np.abs(ours - said).mean() < 0.7 * chance
    logged = [entry for entry in trainer.state.log_history if "loss_teacher" in entry]
    assert logged[-1]["loss_teacher"] < 0.5 * logged[0]["loss_teacher"]


def test_clips_without_any_votes_teach_with_the_teacher_alone(options: dict, corpus: Path, tmp_path: Path) -> None:
    lines = corpus.read_text().splitlines()
    bare = [
        line.replace("Happy;Happy;Neutral", "").replace("Sad;Sad;Neutral", "") if ",train," in line else line
        for line in lines
    ]
    path = corpus.with_name("bare.csv")
    path.write_text("\n".join(bare) + "\n")
    options["data_dir"] = str(path)
    with pytest.raises(ValueError, match=r"No clip of 'train' has annotators' votes.*set distil_weight to 1"):
        prepare(settings(options))
    job = prepare(settings(options, distil_weight=1.0))
    mean = np.array(job.train_rows["teacher"]).mean(axis=0)
    np.testing.assert_allclose(job.system.model.config.label_prior, mean / mean.sum(), rtol=1e-5)
    assert "loss_teacher" in fit(job).state.log_history[0]
    assert build_system(settings(options), LabelSet(), job.train_rows).label_prior == job.system.label_prior


def test_a_distilled_system_from_the_command_line(options: dict, tmp_path: Path, capsys) -> None:
    given = {name: value for name, value in options.items() if not isinstance(value, dict | list | None)}
    given |= {"text_backbone": "null", "heads": "[primary]", "corpus_options": "{}", "mixing_probability": 0.5}
    given["mixing_mode"] = "same_emotion"
    assert main(["train", "demo", *(f"--{name}={value}" for name, value in given.items())]) == 0
    printed = capsys.readouterr().out
    assert f"The teacher {options['teacher']} judges 12 clips" in printed and ", teacher " in printed
    model = SailerForAudioClassification.from_pretrained(tmp_path / "out")
    assert len(model.config.label_weights) == 9 and not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": ["Happy", "Neutral", "Sad"]},
            r"has the labels \['Angry', .* and the recipe \['Happy', 'Neutral', 'Sad'\]",
        ),
        ({"teacher": "/nowhere"}, "teacher '/nowhere' cannot be read"),
        ({"teacher": "BACKBONE"}, "is no SAILER system or ensemble that predicts primary emotions"),
        ({"heads": ["attributes"]}, "objective is 'distil', which teaches primary emotions: add primary to heads"),
    ],
)
def test_teachers_that_cannot_be_are_refused_before_anything_is_heard(
    changes: dict, message: str, options: dict, tiny_whisper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {name: str(tiny_whisper) if value == "BACKBONE" else value for name, value in changes.items()}
    monkeypatch.setattr("sailer.train.read_corpus", None)
    with pytest.raises(ValueError, match=message):
        prepare(settings(options, metric_for_best_model="macro_f1", **changes))


def test_natural_probabilities_that_a_teacher_cannot_give(options: dict, tiny_sailer: Path, tmp_path: Path) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer)
    model.config.target_weighting = "product"
    model.save_pretrained(tmp_path / "teacher")
    SailerProcessor.from_pretrained(tiny_sailer).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"which this system's configuration lacks.*learns from its balanced"):
        prepare(settings(options, teacher=str(tmp_path / "teacher"), target_weighting="none"))
