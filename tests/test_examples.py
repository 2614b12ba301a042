"""The example scripts, run as a user runs them."""

import os
import socket
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


@pytest.mark.slow
@pytest.mark.parametrize(("name", "launches"), [("several_gpus", 1), ("several_machines", 2)])
def test_an_accelerate_configuration_trains_one_system_by_two_processes(
    name: str, launches: int, tmp_path: Path
) -> None:
    """On the CPU; of two machines each start is one."""
    pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs espeakng-loader (the demo extra)")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
    launcher += ["--config_file", str(EXAMPLES / "accelerate" / f"{name}.yaml"), "--main_process_port", port]
    corpus = "{train_clips: 32, validation_clips: 12, test_clips_per_class: 1, speakers: 6}"
    options = ["--corpus_options", corpus, "--num_train_epochs", "1", "--shuffled_label_baseline", "false"]
    options += ["--disable_tqdm", "true", "--output_dir", str(tmp_path / "out")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            [*launcher, "--machine_rank", str(rank), str(EXAMPLES.parent / "train.py"), "demo", *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(launches)
    ]
    printed = [run.communicate(timeout=400)[0] for run in started]
    assert [run.returncode for run in started] == [0] * launches, printed[0][-3000:]
    assert "".join(printed).count("peak memory of each of 2 processes at most") == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()
