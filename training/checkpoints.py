"""Checkpoints to go on from: whole or not there, without the frozen towers, and of this run or refused.

A checkpoint is written beside its place and renamed when all of it is there. `sailer_checkpoint.json` in it lists its
files with their checksums, and says of which run it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sailer.settings import Settings

logger = logging.getLogger(__name__)

MANIFEST = "sailer_checkpoint.json"
# Weights without those of frozen towers: not `model.safetensors`, which would load with towers of random weights.
TRAINED_WEIGHTS = "trained.safetensors"
STAGING = ".partial"
OPTIMIZER, SCHEDULER, STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
TERMINATED = 128 + signal.SIGTERM  # the exit status that a shell gives a process that SIGTERM ended

# Options that may differ between a run and the one that goes on with it: where it is written, how long it is, what is
# logged, and how fast it is. `data_dir` too: the corpus is compared by what it says.
NOT_COMPARED = {
    *("push_to_hub", "hub_model_id", "hub_private_repo", "seeds"),
    *("audio_backbone_id", "text_backbone_id", "corpus_license", "corpus_languages"),
    *("output_dir", "max_steps", "num_train_epochs", "resume_from_checkpoint", "data_dir"),
    *("feature_cache_dir", "preview", "disable_tqdm", "report_to", "run_name", "project"),
    *("save_steps", "save_strategy", "save_total_limit", "save_on_each_node", "save_only_model"),
    *("eval_accumulation_steps", "ddp_timeout", "ddp_backend", "skip_memory_metrics", "local_rank"),
    "restore_callback_states_from_checkpoint",
}
NOT_COMPARED_PREFIXES = ("logging_", "log_", "trackio_", "dataloader_")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or gone on from; the message names it and the way out."""


class Terminated(SystemExit):
    """Training that SIGTERM ended, after its state was saved; the process exits with status 143."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


def run_identity(settings: Settings, corpus: Mapping[str, Dataset], processes: int) -> dict[str, Any]:
    """What must be the same for a run to go on with another's checkpoint: options by name, and a digest of the corpus.

    Args:
        settings: of the run.
        corpus: its splits.
        processes: that train together.
    """
    parts = [vars(part) for part in (settings.model, settings.data, settings.augmentation, settings.objective)]
    options = {name: value for part in (*parts, settings.given) for name, value in part.items()}
    defaults = {name: getattr(settings.training, name) for name in ("seed", "data_seed", "learning_rate")}
    compared = {
        name: value
        for name, value in (defaults | options).items()
        if name not in NOT_COMPARED and not name.startswith(NOT_COMPARED_PREFIXES)
    }
    names = (settings.data.train_split, settings.data.validation_split)
    compared["corpus's clips"] = digest_of_rows(corpus[name] for name in names)
    compared["number of processes"] = processes
    return json.loads(json.dumps(compared, default=str))


def digest_of_rows(splits: Iterable[Dataset]) -> str:
    """A checksum of all that rows say but their audio: not of paths, which may differ from machine to machine."""
    digest = hashlib.sha256()
    for rows in splits:
        columns = rows.select_columns([name for name in rows.column_names if name != "audio"]).with_format("numpy")[:]
        for name, values in sorted(columns.items()):
            values = np.asarray(values)
            digest.update(name.encode())
            digest.update("\n".join(map(str, values)).encode() if values.dtype.kind in "OUT" else values.tobytes())
    return digest.hexdigest()


def seal(folder: Path, identity: Mapping[str, Any], frozen: str) -> None:
    """List the files of a finished checkpoint in it.

    Args:
        folder: the checkpoint.
        identity: see `run_identity`.
        frozen: digest of the weights that it leaves out.
    """
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"files": files, "run": identity, "frozen": frozen}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def point_to_resume_from(
    wanted: str | bool | None, output_dir: str | Path, identity: Mapping[str, Any], frozen: str
) -> Path | None:
    """The checkpoint to go on from.

    Args:
        wanted: a checkpoint's folder; True for the newest whole one below `output_dir`; None or False for none.
        output_dir: where the checkpoints of the run are.
        identity: of the run that is to go on.
        frozen: digest of its weights that are not trained.

    Returns:
        Its folder; None to start afresh, also where `wanted` is True and there is none that is whole (which is said).

    Raises:
        CheckpointError: a named checkpoint that is not there, not whole, or not of `sailer train`; one of another run
            (with the options that differ); or one without its optimizer's state.
    """
    if not wanted:
        return None
    if wanted is not True:
        check_whole(Path(wanted))
        _check_of_this_run(Path(wanted), identity, frozen)
        return Path(wanted)
    for folder in _newest_first(Path(output_dir)):
        if damage := damage_of(folder):
            logger.warning("Checkpoint %s %s: going back to the one before it.", folder, damage)
            continue
        _check_of_this_run(folder, identity, frozen)
        return folder
    logger.warning("No whole checkpoint is in %s: the run starts afresh.", output_dir)
    return None


def check_whole(folder: Path) -> None:
    """Refuse a checkpoint that was named and is not whole.

    Raises:
        CheckpointError: with what is wrong with it.
    """
    if damage := damage_of(folder):
        raise CheckpointError(
            f"Checkpoint {folder} {damage}. Name a whole one, or set resume_from_checkpoint to true: the newest whole "
            "one below output_dir is then found."
        )


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; None if it is whole.

    Raises:
        CheckpointError: all there is wrong is that the optimizer's state is missing.
    """
    if not folder.is_dir():
        return "is not there"
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"is half-written, or of another program (it has no {MANIFEST})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"has an unreadable {MANIFEST}"
    lost = [name for name in files if not (folder / name).is_file()]
    for name, entry in files.items():
        if name not in lost and (folder / name).stat().st_size != entry["bytes"]:
            return f"is half-written ({name} has {(folder / name).stat().st_size} of {entry['bytes']} bytes)"
        if name not in lost and _sha256(folder / name) != entry["sha256"]:
            return f"is damaged ({name} is not what was written)"
    stateless = [name for name in (OPTIMIZER, SCHEDULER) if not (folder / name).is_file()]
    if others := [name for name in lost if name not in stateless]:
        return f"is half-written ({others[0]} is missing)"
    if stateless:
        raise CheckpointError(
            f"Checkpoint {folder} has no {stateless[0]}: training would go on with an optimizer that starts afresh. "
            "Name a checkpoint that has it (save_only_model leaves it out), or start from the weights afresh."
        )
    return None


def trained_part(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state without the parameters that are frozen; buffers are in it. Of a model that is split it is put
    together, by all processes."""
    frozen = frozen_names(model)
    return {name: as_whole(value) for name, value in model.state_dict().items() if name not in frozen}


def frozen_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are not trained."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def digest_of_frozen(model: torch.nn.Module) -> str:
    """A checksum of the parameters that are not trained, which no checkpoint holds."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_trained(trained: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the part of a model that is trained (`trained_part`)."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in trained.items()}
    save_file(tensors, folder / TRAINED_WEIGHTS, metadata={"format": "pt"})


def load_trained(model: torch.nn.Module, folder: Path) -> None:
    """Put a checkpoint's weights into the model, whose frozen part stays as it was built.

    Raises:
        CheckpointError: weights of another model, or a file that cannot be read.
    """
    path = folder / TRAINED_WEIGHTS
    try:
        tensors = load_file(path)
        if is_split(model):
            missing, unexpected = load_whole(model, tensors)
        else:
            missing, unexpected = map(set, model.load_state_dict(tensors, strict=False))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} does not fit this system: {error}. Name one of its own checkpoints.") from error
    lacking = missing - frozen_names(model)
    if lacking or unexpected:
        names = sorted(lacking or unexpected)
        told = "lacks" if lacking else "has, and this system has not,"
        raise CheckpointError(f"{path} is of another system: it {told} {names[:3]}. Name one of its own checkpoints.")


def is_split(model: Any) -> bool:
    """Whether a model's weights are split over the processes."""
    return isinstance(model, torch.nn.Module) and any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def as_whole(value: Any) -> Any:
    """What is split, put together in every process, which call this together; anything else as it is. Of a
    dictionary or list, what is in it."""
    if isinstance(value, dict):
        return {name: as_whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [as_whole(part) for part in value]
    return value.full_tensor() if isinstance(value, DTensor) else value


def load_whole(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Put whole weights and buffers into a model that is split; all processes together.

    Returns:
        Names of the model's that are not among `tensors`, and of those that the model has not.

    Raises:
        RuntimeError: one has another shape.
    """
    own = model.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            if name in own:
                _put(value, own[name], name)
    return set(own) - set(tensors), set(tensors) - set(own)


def split_like(value: torch.Tensor, example: DTensor) -> DTensor:
    """A whole tensor, which every process has, split as one of its shape is."""
    return distribute_tensor(
        value.to(example.device),
        example.device_mesh,
        example.placements,
        src_data_rank=None,  # nothing is sent
    )


def _newest_first(output_dir: Path) -> list[Path]:
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def _put(value: torch.Tensor, place: torch.Tensor, name: str) -> None:
    if value.shape != place.shape:
        raise RuntimeError(f"{name} is {tuple(value.shape)} and should be {tuple(place.shape)}")
    if isinstance(place, DTensor):
        place.to_local().copy_(split_like(value, place).to_local())
    else:
        place.copy_(value)


def _check_of_this_run(folder: Path, identity: Mapping[str, Any], frozen: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    before = manifest["run"]
    differing = sorted(name for name in {*before, *identity} if before.get(name) != identity.get(name))
    if manifest["frozen"] != frozen:
        differing.append("weights of the frozen encoders")
    if differing:
        both = {*before, *identity}
        shown = [
            f"{name} ({before.get(name)!r} there, {identity.get(name)!r} here)" if name in both else name
            for name in differing
        ]
        raise CheckpointError(
            f"Checkpoint {folder} is of another run; what differs: {', '.join(shown)}. Go on with the same settings, "
            "or start afresh in another output_dir."
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def clear_staging(run_dir: Path) -> Path:
    """The folder that a checkpoint is written in, empty."""
    staging = run_dir / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


class TerminationCallback(TrainerCallback):
    """On SIGTERM, which schedulers send before they end a job, save after the step at hand and stop.

    Every process hears of it, so that all stop at the same step.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._previous: Any = None
        self._group: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size > 1 and self._group is None:
            # Asked on the host: a process group of the GPUs would have each step wait for the device.
            self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # After an epoch's last step its evaluation is still to come, which a run that goes on would not make up for.
        is_last = state.epoch is not None and state.epoch == int(state.epoch)
        if self._all_stop() and not is_last:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._all_stop():
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._all_stop():
            if state.is_world_process_zero:
                print(
                    f"SIGTERM: the state after step {state.global_step} is saved in {args.output_dir}; go on with "
                    "--resume_from_checkpoint true",
                    flush=True,
                )
            self.restore()
            raise Terminated

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.restore()
        if self._all_stop():
            raise Terminated

    def restore(self) -> None:
        """Give the signal back to whom it was before."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True

    def _all_stop(self) -> bool:
        if self._group is None:
            return self.is_asked
        asked = torch.tensor(int(self.is_asked))
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(asked)
