"""Training with torch.compile by Inductor, through the command line: the same losses, and few graphs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .small_runs import run_options, write_corpus

# Dropout's numbers are torch's, and what was compiled is told at the end.
SCRIPT = """
import sys
import torch
torch._inductor.config.fallback_random = True
from sailer.cli import main
code = main(sys.argv[1:])
counters = torch._dynamo.utils.counters
print("graphs", counters["aot_autograd"]["ok"], "breaks", len(counters["graph_break"]))
sys.exit(code)
"""
VARIED = {"mixing_probability": "0.5", "mixing_mode": "same_emotion", "num_train_epochs": "3"}
SYSTEMS = {
    "whisper": {"freeze_audio": "false"},
    "wavlm and text": {
        **{"audio_backbone": "tiny-wavlm", "audio_layers": "weighted", "freeze_audio": "false"},
        **{"text_backbone": "tiny-text", "freeze_text": "false"},
    },
}


def train(corpus: Path, folder: Path, **options: str) -> tuple[list[float], list[str]]:
    """The logged losses of a run, and the lines that it printed."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *run_options(corpus, folder, **VARIED | options)],
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    log = json.loads((folder / "training_log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry], run.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_inductor_gives_the_same_losses(tmp_path: Path, system: str) -> None:
    corpus, options = write_corpus(tmp_path / "corpus"), SYSTEMS[system]
    plain, printed = train(corpus, tmp_path / "plain", **options)
    assert printed[-1] == "graphs 0 breaks 0"
    losses, printed = train(corpus, tmp_path / "compiled", **options, torch_compile="true")
    assert losses == pytest.approx(plain, rel=1e-4) and len(losses) == 3
    _, graphs, _, breaks = printed[-1].split()
    assert 2 <= int(graphs) <= 12 and breaks == "0"
    assert [line for line in printed if line.startswith("torch_compile: the towers' ")]
