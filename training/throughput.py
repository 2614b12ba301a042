"""What a training run gets through, and what memory it takes: a line at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from sailer.training.shelf import readable

if TYPE_CHECKING:
    from accelerate import Accelerator

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Throughput:
    """Counts the clips that a process trains on and the time that this takes, evaluations left out.

    Args:
        device: whose memory is told: that of a CUDA device, or else of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.clips = device, 0
        self._started, self._paused = time.perf_counter(), 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time is not counted."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started

    def told(self, accelerator: Accelerator) -> str:
        """A line on all processes together, which call this together: their clips, and the most memory of one."""
        seconds = time.perf_counter() - self._started - self._paused
        figures = torch.tensor([[self.clips, seconds, self.peak_bytes()]], dtype=torch.float64)
        if accelerator.num_processes > 1:
            dtype = torch.float32 if self.device.type == "mps" else torch.float64
            figures = accelerator.gather(figures.to(self.device, dtype)).cpu()
        clips, slowest, most = int(figures[:, 0].sum()), figures[:, 1].max().item(), figures[:, 2].max().item()
        where = "GPU memory" if self.device.type == "cuda" else "memory"
        each = f" of each of {len(figures)} processes at most" if len(figures) > 1 else ""
        return (
            f"Trained on {clips} clips in {slowest:.1f} s without evaluations: {clips / max(slowest, 1e-9):.1f} "
            f"clips/s; peak {where}{each} {readable(most)}"
        )

    def peak_bytes(self) -> int:
        """The most memory so far: of the CUDA device since this was made, else of the process since it started."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if resource is None:
            return psutil.Process().memory_info().rss
        unit = 1 if psutil.MACOS else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
