"""What a trained system keeps of the voices that it was trained on, so that it can be adapted to others."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from sailer.layers_sailer import FEWEST_SPEAKERS, set_reference
from sailer.training.arguments import TARGETS
from sailer.training.trainer import CONSENSUS, SailerTrainer

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
    collator: Any = trainer.evaluation_collator
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
    held = np.ones(len(chosen), dtype=bool)
    if getattr(collator, "features", None) is not None:  # a clip that every plan mixes with another is not kept alone
        items = list(zip(rows["id"], rows["transcript"], strict=True))
        held = np.array([collator.features.holds((items[row][0],), items[row][1]) for row in chosen])
    means, probabilities = [], []
    model.eval()
    parts = [(chosen[held], collator)]
    if not held.all():
        parts.append((chosen[~held], replace(collator, features=None)))
    for part, collate in parts:
        for batch in torch.utils.data.DataLoader(
            rows.select(part), batch_size=trainer.args.eval_batch_size, collate_fn=collate
        ):
            inputs = trainer._prepare_inputs(batch)
            inputs = {name: value for name, value in inputs.items() if name not in (*TARGETS, CONSENSUS)}
            with torch.no_grad(), trainer.compute_loss_context_manager():
                outputs = model(**inputs, output_hidden_states=False, return_dict=True)
            means.append(outputs.speech_means.float().cpu())
            if outputs.logits is not None:
                probabilities.append(outputs.logits.float().softmax(-1).cpu())
    said = torch.cat(probabilities) if probabilities else None
    order = [*chosen[held], *chosen[~held]]
    set_reference(model, torch.cat(means), said, speakers[order].tolist())
    return True
