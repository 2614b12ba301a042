"""Canonical rows or planned items in, a padded batch with every target the model has a head for out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sailer.configuration_sailer import HEADS, SEX_LABELS
from sailer.data.labels import distribution
from sailer.data.rendering import Item, RenderingKey, clips_of, render, rendering_key, transcript_of
from sailer.data.schema import LabelSet
from sailer.processing_sailer import SailerProcessor

UNKNOWN_SEX = -100
TEXT_INPUTS = ("input_ids", "text_attention_mask")


class KeptStates(Protocol):
    """What keeps frozen towers' hidden states, such as `sailer.training.features.FeatureStore`."""

    def inputs(self, keys: Sequence[RenderingKey], transcripts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The model's inputs for renderings and their transcripts, of those towers that are kept."""
        ...


@dataclass
class SailerCollator:
    """Makes a batch; clips of validation and test pass through as they are, training items as their plan says.

    A batch holds the model's inputs, and the target of each head: `labels` (batch, labels) the distribution of
    votes, `secondary_labels` (batch, 17), `attribute_labels` (batch, 3) and `age_labels` (batch,), NaN where unknown
    (a clip without votes has no distribution and counts for the other heads alone), and `sex_labels` (batch,), -100
    where unknown; for rows of validation and test also `consensus` (batch,), the corpus' own label, to score against.
    A mix keeps its speakers' sex and age where the two agree. Training clips that a teacher has judged have
    `teacher_labels` (batch, labels) too.

    Args:
        processor: makes the inputs; its sampling rate is that of the clips.
        label_set: the primary label set of the rows.
        heads: outputs of the model, of "primary", "secondary", "attributes", "sex" and "age".
        max_seconds: longest clip; of a longer one the beginning is used, of a longer mix each clip's share.
        hard_targets: one-hot consensus labels as `labels` (NaN without consensus), for the objective "ce".
        features: hidden states of frozen towers, which then replace those towers' inputs.
        log_mel: make log-mel features where the model takes such; False leaves `waveforms` in the batch, of which
            `SailerProcessor.log_mel` makes them on another device (SailerTrainer does).

    Raises:
        ValueError: an unknown head.
        CorpusError: on a call, a clip that cannot be decoded or is too short; the message names it.
    """

    processor: SailerProcessor
    label_set: LabelSet
    heads: Sequence[str]
    max_seconds: float = 15.0
    hard_targets: bool = False
    features: KeptStates | None = None
    log_mel: bool = True

    def __post_init__(self) -> None:
        unknown = [head for head in self.heads if head not in HEADS]
        if unknown:
            raise ValueError(f"Unknown heads {unknown}; a model may have {list(HEADS)}.")

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        batch = self._inputs(items)
        if not any("clips" in item for item in items):
            batch["consensus"] = torch.tensor([item["label"] for item in items])
        if "primary" in self.heads:
            batch["labels"] = _floats([self._primary(item) for item in items])
            if all("teacher_target" in item for item in items):
                batch["teacher_labels"] = _floats([item["teacher_target"] for item in items])
        if "secondary" in self.heads:
            batch["secondary_labels"] = _floats([_secondary(item) for item in items])
        if "attributes" in self.heads:
            batch["attribute_labels"] = _floats([_attributes(item) for item in items])
        if "sex" in self.heads:
            known: dict[object, int] = {label: position for position, label in enumerate(SEX_LABELS)}
            batch["sex_labels"] = torch.tensor([known.get(_shared(item, "sex"), UNKNOWN_SEX) for item in items])
        if "age" in self.heads:
            batch["age_labels"] = _floats([np.nan if (age := _shared(item, "age")) is None else age for item in items])
        return batch

    def _inputs(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        transcripts = [transcript_of(item) for item in items]
        cached: dict[str, torch.Tensor] = {}
        if self.features is not None:
            cached = self.features.inputs([rendering_key(item) for item in items], transcripts)
        uses_tokens = self.processor.tokenizer is not None and "text_hidden_states" not in cached
        if {"audio_hidden_states", "pooled_hidden_states"} & set(cached):
            return cached | (self.processor.tokenize(transcripts, len(transcripts)) if uses_tokens else {})
        rate = self.processor.sampling_rate
        waveforms = [render(item, rate, self.max_seconds) for item in items]
        if not self.log_mel and self.processor.makes_log_mel:
            tokens = self.processor.tokenize(transcripts, len(transcripts)) if uses_tokens else {}
            return self.processor.waveforms(waveforms, sampling_rate=rate) | tokens | cached
        inputs = self.processor(audio=waveforms, text=transcripts if uses_tokens else None, sampling_rate=rate)
        return {name: value for name, value in inputs.items() if uses_tokens or name not in TEXT_INPUTS} | cached

    def _primary(self, item: Item) -> np.ndarray:
        if "clips" in item:
            return item["hard_target" if self.hard_targets else "target"]
        if not self.hard_targets:
            return distribution(item["votes"])
        labels = np.arange(len(self.label_set.labels))
        return np.where(item["label"] < 0, np.nan, labels == item["label"])


def _floats(values: Sequence) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _secondary(item: Item) -> np.ndarray:
    return item["secondary_target"] if "clips" in item else distribution(item["secondary_votes"])


def _attributes(item: Item) -> np.ndarray:
    return item["attribute_target"] if "clips" in item else item["attributes"]


def _shared(item: Item, column: str) -> str | float | None:
    """A speaker's property that all clips of an item have; None where they differ or it is unknown (NaN)."""
    values = {clip[column] for clip in clips_of(item)[0]}
    value = values.pop()
    return None if values or value != value else value
