"""Systems on a labelled split: each by itself, the mean of several, and what the natural prior changes."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scipy.special import softmax
from transformers.trainer_utils import PredictionOutput

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.data.schema import PRIMARY_LABELS, LabelSet
from sailer.training.calibration import natural_probabilities
from sailer.training.evaluation import calibrate, calibration_report, evaluate_models
from sailer.training.metrics import distribution_metrics, emotion_report


@pytest.fixture
def corpus(tmp_path: Path, different_clips: list[np.ndarray]) -> Path:
    """A table of eight clips, each of another emotion."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = ["audio,label,split"]
    for index, clip in enumerate(different_clips):
        soundfile.write(folder / f"{index}.wav", clip, 16000, subtype="FLOAT")
        lines.append(f"{index}.wav,{PRIMARY_LABELS[index]},test")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def other(tiny_speech_sailer: Path, tmp_path: Path) -> Path:
    """A second system, which takes each class for the next one."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_speech_sailer, folder)
    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    last = model.heads["primary"][-1]
    last.weight.data, last.bias.data = last.weight.data.roll(1, 0), last.bias.data.roll(1, 0)
    model.save_pretrained(folder)
    return folder


def probabilities(folder: Path, clips: list[np.ndarray]) -> np.ndarray:
    model = SailerForAudioClassification.from_pretrained(folder).eval()
    processor = SailerProcessor.from_pretrained(folder)
    with torch.no_grad():
        return model(**processor(clips, sampling_rate=16000)).logits.double().softmax(-1).numpy()


def test_an_ensemble_is_the_mean_of_its_systems_probabilities(
    corpus: Path, tiny_speech_sailer: Path, other: Path, different_clips: list[np.ndarray], tmp_path: Path, capsys
) -> None:
    out = evaluate_models([tiny_speech_sailer, other], "manifest", corpus, output_dir=tmp_path / "out", batch_size=3)
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = {str(folder): probabilities(folder, different_clips) for folder in (tiny_speech_sailer, other)}
    mean = np.mean(list(own.values()), axis=0)
    np.testing.assert_allclose([[float(row[label]) for label in PRIMARY_LABELS] for row in rows], mean, atol=1e-5)
    assert [row["decision"] for row in rows] == [PRIMARY_LABELS[index] for index in mean[:, :8].argmax(axis=1)]
    assert [row["label"] for row in rows] == list(PRIMARY_LABELS[:8])
    figures = json.loads((out / "metrics.json").read_text())
    for name, values in {**own, "ensemble": mean}.items():
        expected = emotion_report(np.log(values), np.eye(9)[:8], np.arange(8), LabelSet())
        assert {key: figures[name][key] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert len({round(values["kl"], 3) for values in figures.values()}) == 3
    assert capsys.readouterr().out.count("8 scored clips") == 3


def test_systems_with_other_labels_are_refused(tiny_speech_sailer: Path, other: Path) -> None:
    settings = json.loads((other / "config.json").read_text())
    settings["labels"] = [*PRIMARY_LABELS[1:], PRIMARY_LABELS[0]]
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"Member 1 \(other\) has the labels \['Contempt', .*, the ensemble \['Angry', 'Contempt'"
    ):
        evaluate_models([tiny_speech_sailer, other], "manifest")


def test_the_natural_prior_is_fitted_and_reported(tiny_speech_sailer: Path) -> None:
    random = np.random.default_rng(0)
    distributions = random.dirichlet(np.linspace(0.5, 3, 9), size=200)
    weights = 1 / (9 * distributions.mean(axis=0))
    # As a model trained on re-weighted targets has them, and three times overconfident.
    logits = 3 * np.log(distributions) + np.log(weights)
    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    model.config.label_weights = weights.tolist()
    consensus = distributions.argmax(axis=1)
    prediction = PredictionOutput({"logits": logits}, {"labels": distributions, "consensus": consensus}, {})
    unknown, none = np.full((2, 9), np.nan), np.full(2, -1)
    with_unknown = PredictionOutput(
        {"logits": np.vstack([logits, np.eye(9)[:2]])},
        {"labels": np.vstack([distributions, unknown]), "consensus": np.append(consensus, none)},
        {},
    )
    calibrate(model, with_unknown)
    assert model.config.calibration_temperature == pytest.approx(3, rel=1e-3)
    scored = int((consensus < 8).sum())
    assert model.config.conformal["clips"] == scored and set(model.config.conformal["scores"]) == {
        "balanced",
        "natural",
    }
    report = calibration_report(model, prediction)
    sets = {name: report.pop(name) for name in list(report) if name.startswith("set90_")}
    # The clips on which they were fitted have the coverage that was asked for, and one that none was kept of.
    assert 0.9 <= sets["set90_coverage"] <= 0.92 and sets["set90_by_class_coverage"] >= 0.9 and len(sets) == 4
    sharp = distribution_metrics(natural_probabilities(logits, weights), distributions)
    assert report == pytest.approx(
        {"natural_kl": 0, "natural_js": 0, "natural_ece": 0}
        | {f"natural_uncalibrated_{name}": value for name, value in sharp.items()},
        abs=1e-4,
    )
    assert sharp["kl"] > 0.1
    balanced = distribution_metrics(softmax(logits, axis=1), distributions)
    assert abs(balanced["kl"] - sharp["kl"]) > 0.05
    calibrate(model, PredictionOutput({"logits": logits[:2]}, {"labels": unknown, "consensus": none}, {}))
    assert model.config.calibration_temperature == pytest.approx(3, rel=1e-3), "nothing is known of these clips"
    assert model.config.conformal is None
    assert calibration_report(model, PredictionOutput({"age": logits[:, 0]}, {}, {})) == {}
