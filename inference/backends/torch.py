"""Trained systems and ensembles in PyTorch, as from_pretrained gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sailer.ensemble_sailer import load_system

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "float64")


def load_torch(source: str | Path, precision: str | None = None, **located: Any) -> tuple[Any, Any]:
    """A system or ensemble and its processor.

    Args:
        source: folder or Hub id.
        precision: of its weights and products; as saved by default.
        located: options of `from_pretrained` that say where it is: `revision`, `token`.

    Raises:
        OSError, ValueError: see `SailerForAudioClassification.from_pretrained`.
    """
    return load_system(source, dtype=precision or "auto", **located)
