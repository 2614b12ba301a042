"""Training with the weights split over the processes (FSDP2, torch's `fully_shard`): each holds a part of every weight
that is trained, of its gradient and of the optimizer's state.

Accelerate's launcher asks for it (`examples/accelerate/fsdp2.yaml`), and the trainer does it, on GPUs and on a CPU:
Accelerate itself does it on GPUs alone. Frozen weights stay whole in each process. Before and after training the model
is as it ever is, and checkpoints hold whole weights.
"""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer
from transformers.utils import logging

from sailer.adapters_sailer import lora_of
from sailer.encoders_sailer import masks_padding
from sailer.training.arguments import SPLIT_WEIGHTS
from sailer.training.checkpoints import OPTIMIZER, SCHEDULER, as_whole, is_split, split_like
from sailer.training.compilation import repeated_layers

logger = logging.get_logger(__name__)


def is_asked_for() -> bool:
    """Whether the launcher's configuration asked for split weights."""
    return os.environ.get(SPLIT_WEIGHTS) == "true"


def check_splittable(model: Any, args: Any) -> None:
    """Refuse what cannot be trained so.

    Raises:
        ValueError: the message says why, and what to do instead.
    """
    instead = "start it with examples/accelerate/several_gpus.yaml, which does not split weights."
    config = model.config
    towers = _trained_towers(model)
    if not towers:
        raise ValueError(f"FSDP splits an encoder that is trained, and here both are frozen: {instead}")
    if lora_of(config):
        raise ValueError(f"FSDP and LoRA do not go together, whose encoders stay frozen: {instead}")
    if config.frame_norm:
        raise ValueError(f"FSDP and frame_norm do not go together: each process would count other frames; {instead}")
    if args.torch_compile:
        raise ValueError("FSDP and torch_compile do not go together: leave one of them out.")
    audio = towers.get("audio_encoder")
    if audio is not None and not masks_padding(audio.config):
        raise ValueError(
            f"This {audio.config.model_type!r} encoder hears clips of one length at a time, so that processes "
            f"would wait for each other for ever under FSDP: {instead}"
        )


class ShardedTrainer(Trainer):
    """Trainer whose checkpoints hold whole weights and a whole optimizer's state, where the model's are split too."""

    optimizer: Any
    lr_scheduler: Any

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_split(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = as_whole(self.optimizer.state_dict())  # all processes take part
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_split(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", weights_only=True)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, kept in state["state"].items():
            for name, value in kept.items():
                if value.shape == parameters[index].shape:  # not the count of steps
                    kept[name] = split_like(value, parameters[index])
        self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))


@contextmanager
def split_weights(trainer: Trainer) -> Iterator[None]:
    """Within it the trainer's model is one whose trained weights are split; then its own one has what was learned.

    All processes enter and leave it together.
    """
    whole: Any = trainer.model
    check_splittable(whole, trainer.args)
    split = _split(whole, trainer.args.device)
    for parameter in whole.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)  # until it is known what was learned
    trainer.model = trainer.model_wrapped = split
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.prepare_model(split, device_placement=False, evaluation_mode=True)  # autocast
    split._is_accelerate_prepared = True  # else it would be copied to each process whole
    with warnings.catch_warnings():  # of outputs that are views, which nothing here writes into
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield
    learned = dict(split.named_parameters())
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            parameter.data = as_whole(learned[name].detach())
    buffers = dict(split.named_buffers())
    for name, buffer in whole.named_buffers():
        buffer.copy_(buffers[name])
    trainer.model = trainer.model_wrapped = whole
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()


def _split(whole: nn.Module, device: torch.device) -> Any:
    """A model like `whole`, which shares its frozen weights, with the others split: by layer, and the rest at once."""
    for tensor in (*whole.parameters(), *whole.buffers()):  # new heads may be others in each process
        torch.distributed.broadcast(tensor.data, src=0)
    model = copy.deepcopy(whole, {id(parameter): parameter for parameter in whole.parameters()})
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for tower in _trained_towers(model).values():
        for holder, name in itertools.product((tower, tower.config), ("layerdrop", "prenet_layerdrop")):
            if getattr(holder, name, 0):
                logger.warning("%s is off: under FSDP all processes have to run the same layers.", name)
                setattr(holder, name, 0.0)
        for layer in repeated_layers(tower):
            if any(parameter.requires_grad for parameter in layer.parameters()):
                fully_shard(layer, mesh=mesh, ignored_params=frozen)
    return fully_shard(model, mesh=mesh, ignored_params=frozen)


def _trained_towers(model: Any) -> dict[str, Any]:
    towers = {name: getattr(model.sailer, name, None) for name in ("audio_encoder", "text_encoder")}
    return {
        name: tower
        for name, tower in towers.items()
        if tower is not None and any(parameter.requires_grad for parameter in tower.parameters())
    }
