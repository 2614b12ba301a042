"""benchmarks/gpu.py at tiny sizes on the CPU, so that nothing of it fails on the GPU that it is for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def measured(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--steps", "1", "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=500)
    return done, json.loads((folder / "gpu.json").read_text())["rows"]


@pytest.mark.slow
def test_every_system_and_encoder_is_measured(tmp_path: Path) -> None:
    done, rows = measured(tmp_path, "--profile", str(tmp_path / "profile.txt"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(rows) == 13 and not [row for row in rows if "failed" in row]
    assert done.stdout.count("| WavLM large, trained") == 5
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        assert row["gflop_per_clip"] > 0 and row["clips_per_second"] > 0, row["name"]
        assert f"{row['name']}, by self_cpu_time_total" in (tmp_path / "profile.txt").read_text()
    # One batch of 32 and four of 8 have clips of other lengths; what is compiled does what its neighbour does.
    few, compiled = (by_name[f"WavLM large, trained, 32, few lengths{end}"] for end in ("", ", compiled"))
    assert few["gflop_per_clip"] == compiled["gflop_per_clip"]
    assert few["gflop_per_clip"] > by_name["WavLM large, trained, 32"]["gflop_per_clip"]


@pytest.mark.slow
def test_a_row_that_fails_costs_none_of_the_others(tmp_path: Path) -> None:
    broken = tmp_path / "configs"
    broken.mkdir()
    for source in (SCRIPT.parents[1] / "backbone_configs").glob("*.json"):
        if source.stem != "roberta-large":
            (broken / source.name).write_text(source.read_text())
    done, rows = measured(tmp_path, "--configs", str(broken), "--only", "Whisper large-v3")
    assert done.returncode == 1
    assert [row["name"] for row in rows if "failed" in row] == ["Whisper large-v3 and RoBERTa large, frozen"]
    assert "error: not measured:\nWhisper large-v3 and RoBERTa large, frozen: OSError" in done.stderr
    assert len(rows) == 2 and rows[1]["clips_per_second"] > 0
