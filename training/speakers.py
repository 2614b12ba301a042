"""What a trained system keeps of the voices that it was trained on, so that it can be adapted to others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from sailer.data.rendering import changed_speed
from sailer.layers_sailer import FEWEST_SPEAKERS, set_reference
from sailer.training.trainer import SailerTrainer

logger = logging.getLogger(__name__)

MOST_CLIPS = 2000  # more would move the mean voice by less than clips' own spread / sqrt(2000)


def learn_mean_voice(trainer: SailerTrainer, rows: Dataset, seed: int = 0) -> bool:
    """Give the trainer's model the mean voice of its training speakers (`SpeakerReference`), of up to 2,000 clips.

    Args:
        trainer: after training; what its collator keeps of frozen towers is not encoded again.
        rows: the training clips, without augmentation.
        seed: of the choice among more clips. Every process makes the same one.

    Returns:
        Whether there is one: of fewer than four known speakers none is learned, which is logged, nor that of a base
        model kept.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    speakers = np.array(rows["speaker"][:])
    known = np.flatnonzero(speakers != "")
    if len(np.unique(speakers[known])) < FEWEST_SPEAKERS:
        logger.info("The training clips are of fewer than %d known speakers: no mean voice is kept.", FEWEST_SPEAKERS)
        if model.config.speaker_reference:
            model.config.speaker_reference = False
            del model.sailer.speaker_reference
        return False
    chosen = np.sort(np.random.default_rng(seed).permutation(known)[:MOST_CLIPS])
    if len(np.unique(speakers[chosen])) < FEWEST_SPEAKERS:  # nearly all are of a few speakers
        chosen = known
    means, logits = heard(trainer, rows, [(int(row), 1.0) for row in chosen], "Learning the mean voice")
    set_reference(model, means, None if logits is None else logits.softmax(-1), speakers[chosen].tolist())
    return True


def heard(
    trainer: SailerTrainer, rows: Dataset, renderings: Sequence[tuple[int, float]], title: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a trainer's model makes of clips, each at a speed, in float32 on the CPU.

    Args:
        trainer: what its collator keeps of frozen towers is not encoded again.
        rows: in the canonical row.
        renderings: row and speed of each.
        title: of the progress bar.

    Returns:
        the means of their speech (renderings, width) and the primary logits (renderings, labels), None without them.
    """
    collator: Any = trainer.evaluation_collator
    collator = replace(collator, heads=())
    held = np.ones(len(renderings), dtype=bool)
    if collator.features is not None:  # a clip that every plan mixes with another is not kept alone
        ids, texts = rows["id"][:], rows["transcript"][:]
        held = np.array(
            [collator.features.holds((ids[row], *changed_speed(speed)), texts[row]) for row, speed in renderings]
        )
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    means, logits = [], []
    order = [*np.flatnonzero(held).tolist(), *np.flatnonzero(~held).tolist()]
    progress = tqdm(total=len(order), desc=title, unit="clip", leave=False, disable=trainer.args.disable_tqdm)
    for part, collate in ((order[: held.sum()], collator), (order[held.sum() :], replace(collator, features=None))):
        for start in range(0, len(part), trainer.args.eval_batch_size):
            chosen = [renderings[place] for place in part[start : start + trainer.args.eval_batch_size]]
            batch = collate([{"clips": [rows[row]], "gap": 0.0, "speed": speed} for row, speed in chosen])
            with torch.no_grad(), trainer.compute_loss_context_manager():
                outputs = model(**trainer._prepare_inputs(batch), output_hidden_states=False, return_dict=True)
            progress.update(len(outputs.speech_means))
            means.append(outputs.speech_means.float().cpu())
            if outputs.logits is not None:
                logits.append(outputs.logits.float().cpu())
    progress.close()
    back = torch.tensor(order).argsort()
    return torch.cat(means)[back], torch.cat(logits)[back] if logits else None
