"""The towers' float32 products on a CPU: by oneDNN, where that is faster than the library which torch takes for them.

torch gives float32 matrix products to MKL, which on some processors (AMD's above all) runs at half the rate of oneDNN,
which torch carries too. `onednn_linear` has every `torch.nn.functional.linear` within it done by oneDNN. The modules
stay as they are: quantised, LoRA-wrapped, offloaded and compiled ones, copies and saved files know nothing of it.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

ONEDNN_LINEAR = ("auto", "on", "off")
VARIABLE = "SAILER_ONEDNN"  # of the environment: what "auto" means in this process
# Fewer rows (frames of a batch, or tokens) are done as fast by either.
LEAST_ROWS = 64
# oneDNN is taken where it is so many times faster: near 1 noise would decide, one way here and the other way there.
LEAST_GAIN = 1.2

_plain = nn.functional.linear
_measuring = threading.Lock()
_within = threading.local()


def tower_kernels(choice: str, tower: nn.Module) -> AbstractContextManager:
    """Within it a tower runs with the kernels that suit it: on a CPU see `onednn_linear`; on a GPU attention is not
    cuDNN's, which makes a plan for every new shape: clips and transcripts of all lengths then take three times as long
    (an H100, torch 2.11; benchmarks/gpu.py).
    """
    # First, so that a compiler sees nothing of what follows.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return nullcontext()
    if any(parameter.device.type == "cuda" for parameter in tower.parameters()):
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return onednn_linear(choice, tower)


def onednn_linear(choice: str, tower: nn.Module) -> AbstractContextManager:
    """Within it this thread's linear layers are done by oneDNN, where that is possible and `choice` wants it.

    What the outermost says holds: within it an encoder that asks for "auto" by itself is not asked.

    Possible it is on dense float32 tensors on a CPU with at least `LEAST_ROWS` rows; anything else goes on as it
    would. Nothing is done while torch compiles, exports or traces, under autocast and torch.func's transforms, and
    where gradient checkpointing would run the layers a second time outside.

    Args:
        choice: "on", "off", or "auto": what the environment's SAILER_ONEDNN says, and without it whether oneDNN is
            faster here, which takes some 30 ms to find out, once per process.
        tower: the module that will run.

    Raises:
        ValueError: another choice, by the option's or the variable's name.
        RuntimeError: "on", and this torch has no oneDNN.
    """
    # First, so that a compiler sees nothing of what follows.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return nullcontext()
    if getattr(_within, "decided", False):
        return nullcontext()
    return _decided(_mode(choice, tower))


def _mode(choice: str, tower: nn.Module) -> AbstractContextManager:
    if choice == "auto":
        choice = _one_of(VARIABLE, os.environ.get(VARIABLE) or "auto")
    else:
        _one_of("onednn_linear", choice)
    if choice == "off" or torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
        return nullcontext()
    if torch.is_grad_enabled() and any(getattr(part, "gradient_checkpointing", False) for part in tower.modules()):
        return nullcontext()
    if not is_available():
        if choice == "on":
            raise RuntimeError("onednn_linear is 'on', but this torch has no oneDNN: set it to 'auto'.")
        return nullcontext()
    if choice == "auto" and not _is_faster():
        return nullcontext()
    return _OneDNNLinear()


def is_available() -> bool:
    """Whether this torch has oneDNN's product, and has not been told to do without oneDNN."""
    return (
        torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def measured_gain() -> float:
    """How many times faster oneDNN's product is than torch's own, with as many threads as torch has now.

    Measured once per process: the best of many products of 192 frames with a layer of Whisper base's size, the two
    taking turns, so that what else the machine does has little say. It takes some 30 ms, on a busy machine 100.
    """
    with _measuring:
        return _gain(torch.get_num_threads())


@contextmanager
def _decided(mode: AbstractContextManager) -> Iterator[None]:
    _within.decided = True
    try:
        with mode:
            yield
    finally:
        _within.decided = False


def _is_faster() -> bool:
    return measured_gain() >= LEAST_GAIN


@functools.cache
def _gain(threads: int) -> float:
    # Not random: whoever set torch's seed counts on what comes next.
    x, weight = (torch.full((rows, 512), 0.5, dtype=torch.float32, device="cpu") for rows in (192, 512))
    best = {_plain: float("inf"), _product: float("inf")}
    with torch.inference_mode():
        began = time.perf_counter()
        for turn in range(25):
            if turn > 4 and time.perf_counter() - began > 0.1:
                break
            for multiply in best:
                start = time.perf_counter()
                multiply(x, weight, None)
                if turn > 0:  # the first one sets things up
                    best[multiply] = min(best[multiply], time.perf_counter() - start)
    return best[_plain] / best[_product]


class _OneDNNLinear(TorchFunctionMode):
    """Holds for the thread that entered it, and, as modes do, not for what runs inside of its own functions."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _plain and not torch.compiler.is_compiling():
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, whose parameters have these names."""
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not all(map(_is_dense, tensors)) or weight.ndim != 2 or input.numel() < LEAST_ROWS * weight.shape[1]:
        return _plain(input, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        # On rows: of more dimensions its output would be a view of its own making, which nothing may change in place,
        # as SpecAugment does in training. What is viewed here may be.
        return _LinearFunction.apply(input.flatten(0, -2), weight, bias).view(*input.shape[:-1], len(weight))
    return _product(input, weight, bias)


def _is_dense(tensor: Any) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
    )


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """input @ weight.T + bias."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


class _LinearFunction(torch.autograd.Function):
    """The product of rows (2-D) with gradients, which are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        # Gradients of gradients are wanted where gradients are enabled here: those only torch's own product has.
        multiply = _plain if torch.is_grad_enabled() else _product
        (rows,) = gradients
        of_input = multiply(rows, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = multiply(rows.t(), input.t()) if ctx.needs_input_grad[1] else None
        return of_input, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _one_of(option: str, value: str) -> str:
    if value not in ONEDNN_LINEAR:
        raise ValueError(f"{option} is {value!r}; choose one of {list(ONEDNN_LINEAR)}.")
    return value


__all__ = ["is_available", "measured_gain", "onednn_linear", "tower_kernels"]
