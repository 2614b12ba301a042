"""Trained systems, ensembles and emotion2vec's classifiers in PyTorch, as from_pretrained gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sailer.encoders_emotion2vec import Emotion2VecForAudioClassification
from sailer.ensemble_sailer import load_system
from sailer.inference.export import system_class
from sailer.processing_sailer import SailerProcessor

PRECISIONS = ("auto", "float32", "bfloat16", "float16", "float64")


def load_torch(source: str | Path, precision: str | None = None, **located: Any) -> tuple[Any, Any]:
    """A system or ensemble and its processor; LoRA is merged into the encoders, which then run as fast as others.

    Args:
        source: folder or Hub id.
        precision: of its weights and products; as saved by default.
        located: options of `from_pretrained` that say where it is: `revision`, `token`.

    Raises:
        OSError, ValueError: see `SailerForAudioClassification.from_pretrained`.
    """
    if system_class(source, **located) is Emotion2VecForAudioClassification:
        model = Emotion2VecForAudioClassification.from_pretrained(source, dtype=precision or "auto", **located)
        return model, SailerProcessor.from_pretrained(source, **located)
    model, processor = load_system(source, dtype=precision or "auto", **located)
    for system in getattr(model, "members", [model]):
        system.merge_lora()
    return model, processor
