"""A system that was saved as adapters in, the whole system out: it needs neither peft nor the backbones any more."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from sailer.adapters_sailer import lora_of
from sailer.data.atomic import replacing_folder
from sailer.modeling_sailer import SailerForAudioClassification
from sailer.processing_sailer import SailerProcessor

# What training writes beside a system and is as true of the merged one.
TOLD = ("README.md", "recipe.yaml", "metrics.json", "training_log.json", "*.png")


def merge(
    adapters: str | os.PathLike,
    folder: str | os.PathLike,
    audio_backbone: str | None = None,
    text_backbone: str | None = None,
) -> Path:
    """Merge a system's adapters into its encoders and save all of it.

    Args:
        adapters: folder or Hub id of a system that was saved as adapters.
        folder: where the whole system goes; it must not exist.
        audio_backbone, text_backbone: where its frozen encoders are now, by default where they were in training.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is there already.
        OSError, ValueError: the adapters or a backbone cannot be loaded, or there is nothing to merge.
        ImportError: peft is not installed.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: name another folder, or remove it.")
    moved = {"audio": audio_backbone, "text": text_backbone}
    backbones = {tower: {"source": place} for tower, place in moved.items() if place is not None}
    options: dict[str, Any] = {"backbones": backbones} if backbones else {}
    model = SailerForAudioClassification.from_pretrained(adapters, dtype=torch.float32, **options)
    if not lora_of(model.config):
        raise ValueError(f"{adapters} has no adapters: it is whole as it is.")
    processor = SailerProcessor.from_pretrained(adapters)
    with replacing_folder(folder) as beside:
        model.merge_lora().save_pretrained(beside)
        processor.save_pretrained(beside)
        for path in (path for name in TOLD for path in Path(adapters).glob(name)):
            shutil.copy(path, beside)
    return folder
