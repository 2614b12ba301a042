"""What the terminal shows of a training: a line for each log, beneath or above the Trainer's bar."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

# What the terminal shows of an evaluation; the log and metrics.json hold all of it.
SHOWN = ("loss", "macro_f1", "accuracy", "min_map", "ccc")


class LineCallback(TrainerCallback):
    """One short line per log, instead of a dictionary of fifty figures."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        line = _line(logs or {})
        if line and state.is_world_process_zero:
            self.write(line)

    def write(self, line: str) -> None:
        print(line, flush=True)


class BarCallback(LineCallback, ProgressCallback):
    """The same above the Trainer's progress bar."""

    def write(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)


def _line(logs: dict[str, float]) -> str:
    epoch = f"epoch {logs.get('epoch', 0):.4g}"
    if "loss" in logs:
        parts = [f"{name.removeprefix('loss_')} {value:.4g}" for name, value in logs.items() if "loss_" in name]
        return f"{epoch}: loss {logs['loss']:.4g}" + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
    shown = [f"{name} {logs[f'eval_{name}']:.4g}" for name in SHOWN if f"eval_{name}" in logs]
    return f"{epoch}: validation {', '.join(shown)}" if shown else ""
