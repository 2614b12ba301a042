"""The example scripts, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer import SailerForAudioClassification

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RATE = 16000


def run(script: str, *arguments: Path | str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"HF_HOME": str(cwd / "hf")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for label in ("calm", "angry"):
        (tmp_path / "clips" / label).mkdir(parents=True)
        for number in range(6):
            noise = generator.normal(size=RATE // 2) * (0.02 if label == "calm" else 0.4)
            soundfile.write(tmp_path / "clips" / label / f"{number}.wav", noise.clip(-1, 1), RATE)
    return tmp_path / "clips"


@pytest.mark.slow
def test_fine_tuning_with_nothing_but_transformers(recordings: Path, tiny_speech_sailer: Path, tmp_path: Path) -> None:
    assert "import sailer" not in (EXAMPLES / "fine_tune_with_trainer.py").read_text()
    out = tmp_path / "out"
    options = ["--epochs", "2", "--batch_size", "4"]
    done = run("fine_tune_with_trainer.py", tiny_speech_sailer, recordings, out, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "accuracy on 2 held-out recordings" in done.stdout
    assert "'eval_loss'" in done.stdout and "'eval_accuracy'" in done.stdout
    model = SailerForAudioClassification.from_pretrained(out)
    assert model.config.labels == model.config.scored_labels == ["angry", "calm"]
    before = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    assert (model.heads["primary"][0].weight != before.heads["primary"][0].weight).any()
    frozen = zip(model.sailer.audio_encoder.parameters(), before.sailer.audio_encoder.parameters(), strict=True)
    assert all((ours == theirs).all() for ours, theirs in frozen)


@pytest.mark.slow
def test_fine_tuning_says_what_a_folder_lacks(recordings: Path, tiny_speech_sailer: Path, tmp_path: Path) -> None:
    done = run("fine_tune_with_trainer.py", tiny_speech_sailer, recordings / "calm", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2 and "needs a subfolder of recordings for each of at least two classes" in done.stderr
