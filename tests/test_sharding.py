"""Weights split over processes (FSDP2): the launcher's configuration in, the system that one process trains out."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sailer import SailerForAudioClassification
from sailer.training.arguments import SPLIT_WEIGHTS, SailerTrainingArguments
from sailer.training.sharding import check_splittable, is_asked_for
from sailer.training.tiny_backbones import make_tiny_wavlm

CONFIGURATION = Path(__file__).resolve().parents[1] / "examples" / "accelerate" / "fsdp2.yaml"
OPTIONS = {
    "corpus_options": "{train_clips: 32, validation_clips: 12, test_clips_per_class: 1, speakers: 6}",
    "audio_backbone": "tiny-whisper",
    "freeze_text": "true",
    "conv_dropout": 0,  # each process draws its own
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "shuffled_label_baseline": "false",
    "disable_tqdm": "true",
}
# Runs `sailer train`, says how many of the weights that are trained a process holds, and asks itself to stop at the
# given step.
TRAIN = """
import os, signal, sys
from sailer.cli import main
from sailer.training.trainer import SailerTrainer

stop, calls, compute = int(sys.argv[1]), 0, SailerTrainer.compute_loss

def compute_loss(self, model, *arguments, **options):
    global calls
    calls += model.training
    if calls == 1 and model.training:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        own = [getattr(parameter, "to_local", lambda: parameter)() for parameter in trained]
        print(f"holds {sum(part.numel() for part in own)} of {sum(part.numel() for part in trained)}", flush=True)
    if calls == stop:
        os.kill(os.getpid(), signal.SIGTERM)
    return compute(self, model, *arguments, **options)

SailerTrainer.compute_loss = compute_loss
sys.exit(main(["train", "demo", *sys.argv[2:]]))
"""


def train(folder: Path, processes: int = 2, stop: int = -1, **options: object) -> subprocess.CompletedProcess:
    script = folder.parent / "train_and_tell.py"
    script.write_text(TRAIN)
    given = OPTIONS | {"per_device_train_batch_size": 8 // processes, "output_dir": folder} | options
    command = [str(script), str(stop), *(f"--{name}={value}" for name, value in given.items())]
    if processes > 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATION), "--num_processes", "2"]
        command = [*launcher, "--mixed_precision", "no", "--main_process_port", port, *command]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500)


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "training_log.json").read_text())
    return [entry[name] for entry in log for name in ("loss", "eval_loss", "grad_norm") if name in entry]


def largest_difference(ours: Path, theirs: Path) -> float:
    both = [load_file(folder / "model.safetensors") for folder in (ours, theirs)]
    assert both[0].keys() == both[1].keys()
    return max((value - both[1][name]).abs().max().item() for name, value in both[0].items())


@pytest.mark.slow
def test_split_weights_train_the_system_that_one_process_trains_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs espeakng-loader (the demo extra)")
    one, split, stopped = (tmp_path / name for name in ("one", "split", "stopped"))
    done = train(one, processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    done = train(split)
    assert done.returncode == 0, done.stderr[-3000:]
    held, of = map(int, re.search(r"holds (\d+) of (\d+)", done.stdout).groups())
    assert 0.49 * of < held < 0.52 * of
    assert "peak memory of each of 2 processes at most" in done.stdout
    assert losses(split) == pytest.approx(losses(one), rel=1e-4) and len(losses(one)) == 6
    assert largest_difference(split, one) < 1e-3  # the optimizer's first steps have the size of the rate

    # The folder is one that anyone can load, and says the same.
    models = [SailerForAudioClassification.from_pretrained(folder).eval() for folder in (one, split)]
    batch = {"input_features": torch.randn(2, 80, 200), "attention_mask": torch.ones(2, 200, dtype=torch.long)}
    batch |= {"input_ids": torch.tensor([[5, 6, 7]] * 2), "text_attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with torch.no_grad():
        logits = [model(**batch).logits for model in models]
    assert (logits[0] - logits[1]).abs().max() < 1e-3

    done = train(stopped, stop=6)
    assert done.returncode != 0 and "the state after step 6 is saved" in done.stdout, done.stderr[-3000:]
    done = train(stopped, resume_from_checkpoint="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert largest_difference(stopped, split) < 1e-6
    assert losses(stopped)[-2:] == pytest.approx(losses(split)[-2:], rel=1e-5)


@pytest.mark.slow
def test_a_wavlm_that_drops_layers_is_split_in_bfloat16_with_its_own_rate(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs espeakng-loader (the demo extra)")
    backbone = make_tiny_wavlm(tmp_path / "wavlm")
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(config | {"layerdrop": 0.5}))
    options = {"audio_backbone": backbone, "text_backbone": "null", "audio_layers": "last", "bf16": "true"}
    done = train(tmp_path / "out", num_train_epochs=1, backbone_learning_rate=1e-4, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "layerdrop is off: under FSDP" in done.stderr and "view tensor" not in done.stderr
    assert all(map(torch.isfinite, map(torch.tensor, losses(tmp_path / "out"))))
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.slow
def test_frozen_encoders_are_not_split(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason="the synthetic corpus needs espeakng-loader (the demo extra)")
    done = train(tmp_path / "out", freeze_audio="true")
    assert done.returncode != 0 and "FSDP splits an encoder that is trained, and here both are frozen" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FSDP_VERSION", "1"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "True"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT"),
    ],
)
def test_what_is_not_done_of_a_launchers_configuration_is_refused(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"configuration has {variable.lower()}: {value}, and .*fsdp2.yaml does"):
        SailerTrainingArguments(str(tmp_path))
    assert not is_asked_for()


def test_the_trainer_does_what_the_launcher_asks_of_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SPLIT_WEIGHTS, "false")
    assert not is_asked_for()
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    SailerTrainingArguments(str(tmp_path))
    assert is_asked_for() and "ACCELERATE_USE_FSDP" not in os.environ


class Arguments:
    torch_compile = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"freeze_audio": True, "freeze_text": True}, "both are frozen: start it with .*several_gpus.yaml"),
        ({"freeze_audio": False, "frame_norm": True}, "FSDP and frame_norm do not go together"),
        ({"freeze_audio": False}, None),
    ],
)
def test_what_cannot_be_split_is_refused(
    change: dict, message: str | None, tiny_whisper: Path, tiny_wavlm: Path
) -> None:
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, **change)
    if message is None:
        check_splittable(model, Arguments())
        compiled = Arguments()
        compiled.torch_compile = True
        with pytest.raises(ValueError, match="FSDP and torch_compile do not go together"):
            check_splittable(model, compiled)
        other = SailerForAudioClassification.from_audio_text_pretrained(tiny_wavlm, freeze_audio=False)
        check_splittable(other, Arguments())
        other.sailer.audio_encoder.config.feat_extract_norm = "group"
        with pytest.raises(ValueError, match="'wavlm' encoder hears clips of one length at a time"):
            check_splittable(other, Arguments())
    else:
        with pytest.raises(ValueError, match=message):
            check_splittable(model, Arguments())
