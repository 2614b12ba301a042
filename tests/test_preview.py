"""A preview's files: waveforms as the plan says, targets beside them, and a chart."""

import json

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure

from sailer.data.augmentation import AugmentationSettings
from sailer.data.preview import preview
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import build_dataset

NEUTRAL, FEAR = 5, 3


@pytest.fixture
def rows(tmp_path):
    names = ["n0", "n1", "n2", "f0"]
    for index, name in enumerate(names):
        soundfile.write(tmp_path / f"{name}.wav", np.full(1600 * (index + 2), 0.1), 16000, subtype="FLOAT")
    return build_dataset(
        {
            "id": names,
            "audio": [{"path": str(tmp_path / f"{name}.wav"), "bytes": None} for name in names],
            "transcript": ["one", "two", "three", "help"],
            "votes": np.eye(9)[[NEUTRAL, NEUTRAL, NEUTRAL, FEAR]] * 4,
            "attributes": [[0.5, 0.5, np.nan]] * 4,
            "label": [NEUTRAL, NEUTRAL, NEUTRAL, FEAR],
        }
    )


def test_preview(rows, tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **b: figures.append(figure) or save(figure, *a, **b))
    dataset = PlannedDataset(rows, AugmentationSettings(mixing_probability=1), seed=0)
    folder = preview(dataset, 3, tmp_path / "preview")
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["000.wav", "001.wav", "002.wav", "class_distribution.png", "targets.json"]
    described = json.loads((folder / "targets.json").read_text())
    seconds = {"n0": 0.2, "n1": 0.3, "n2": 0.4, "f0": 0.5}
    for entry, name in zip(described, ["n0", "n1", "n2"], strict=True):
        assert sorted(entry["clips"]) == ["f0", name]
        assert entry["target"]["Neutral"] == entry["target"]["Fear"] == 0.5
        assert entry["attribute_target"] == {"arousal": 0.5, "valence": 0.5}
        assert entry["secondary_target"] == {}
        assert sorted(entry["transcript"].split()) == sorted(["help", rows["transcript"][int(name[1])]])
        overlap = min(entry["overlap_seconds"], 0.5, seconds[name])
        expected = seconds[name] + 0.5 + entry["silence_seconds"] - overlap
        wave, rate = soundfile.read(folder / entry["file"])
        assert len(wave) / rate == pytest.approx(expected, abs=2e-4)
        assert wave.sum() == pytest.approx(0.1 * 16000 * (seconds[name] + 0.5), rel=1e-2)  # both are heard whole
    assert (folder / "class_distribution.png").read_bytes().startswith(b"\x89PNG")
    before, after = ([bar.get_height() for bar in bars] for bars in figures[0].axes[0].containers)
    assert before == pytest.approx([0, 0, 0, 25, 0, 75, 0, 0, 0])
    assert after == pytest.approx([0, 0, 0, 62.5, 0, 37.5, 0, 0, 0])  # a half of each of the three mixes is Fear


def test_changed_clips_come_before_others_and_all_is_the_most(rows, tmp_path):
    dataset = PlannedDataset(rows, AugmentationSettings(text_dropout=0.5), seed=2)
    dropped = [dataset[index]["drop_text"] for index in range(4)]
    assert 0 < sum(dropped) < 4
    described = json.loads((preview(dataset, 10, tmp_path / "preview") / "targets.json").read_text())
    assert [entry["transcript"] == "" for entry in described] == sorted(dropped, reverse=True)
