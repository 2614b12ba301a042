"""torch.compile in training: the towers' transformer layers, one graph for all of a kind.

Not the whole model: Inductor (torch 2.13) makes a graph of a one-dimensional convolution's gradient for each length of
the clips (`convolution_backward_lowering` guards it), and gives up after eight. Whisper's and WavLM's first layers and
the head are such convolutions; nearly all of the work is in the layers between them. One layer's graph does for all
that are like it (https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

# Graphs of one kind of layer before torch goes on without more: a layer is frozen or not, the first or a later one
# (WavLM's), in training or evaluation, with one clip or several.
GRAPHS = 32


class LayerCompilation(TrainerCallback):
    """Has the towers' layers compiled while a model trains; afterwards they are as they were.

    Args:
        plugin: what accelerate and the training arguments say of torch.compile.
    """

    def __init__(self, plugin: TorchDynamoPlugin) -> None:
        # Lengths are free from the first batch on: a graph of its length alone would be of no use to the next.
        self.options: dict[str, Any] = {"dynamic": True} | plugin.to_kwargs()
        self._layers: list[nn.Module] = []
        self._recorders: list[tuple[nn.Module, int, Any]] = []
        self._limit: int | None = None

    @classmethod
    def asked_for(cls, args: TrainingArguments) -> LayerCompilation | None:
        """As the training arguments (`torch_compile` and those beside it) or accelerate's launcher want it."""
        plugin = TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        return None if plugin.backend == DynamoBackend.NO else cls(plugin)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.restore()
        self._layers = list(compilable_layers(model))
        if not self._layers:
            raise ValueError("torch_compile is set, but no tower has layers that could be compiled: leave it out.")
        dynamo: Any = torch._dynamo.config
        self._limit, dynamo.recompile_limit = dynamo.recompile_limit, max(GRAPHS, dynamo.recompile_limit)
        for layer in self._layers:
            self._take_recorders_off(layer)
            # Not the module's call: hooks, which collect hidden states, stay outside, as with gradient checkpointing.
            layer.forward = torch.compile(layer.forward, **self.options)
        if state.is_world_process_zero:
            print(
                f"torch_compile: the towers' {len(self._layers)} transformer layers are compiled; convolutions and "
                "heads are not, which would take a graph for every length",
                flush=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Leave the layers as they were."""
        for layer in self._layers:
            vars(layer).pop("forward", None)
        for part, key, hook in self._recorders:
            part._forward_hooks[key] = hook
        self._layers, self._recorders = [], []
        if self._limit is not None:
            dynamo: Any = torch._dynamo.config
            dynamo.recompile_limit, self._limit = self._limit, None

    def _take_recorders_off(self, layer: nn.Module) -> None:
        """Those within a layer record attention weights, which no training asks for, and would break its graph."""
        for part in layer.modules():
            for key, hook in list(part._forward_hooks.items()):
                if part is not layer and hook.__module__ == output_capturing.__name__:
                    self._recorders.append((part, key, hook))
                    del part._forward_hooks[key]


def compilable_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer layers of a system's towers, but those with convolutions in them."""
    for name, tower in model.named_modules():
        if name.rpartition(".")[2] in ("audio_encoder", "text_encoder"):
            for layer in repeated_layers(tower):
                if not any(isinstance(part, nn.Conv1d | nn.Conv2d) for part in layer.modules()):
                    yield layer


def repeated_layers(tower: nn.Module) -> list[nn.Module]:
    """Those of a speech or text encoder, by the class that transformers gives to what is repeated."""
    return [part for part in tower.modules() if isinstance(part, GradientCheckpointingLayer)]
