"""SpeechEmotionPipeline: recordings in, labelled probabilities out."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Pipeline

from .processing_sailer import load_audio


class SpeechEmotionPipeline(Pipeline):
    """Emotion probabilities of recordings."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(self, top_k: int | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        return {}, {}, {"top_k": top_k}

    def preprocess(self, inputs: Any) -> dict[str, torch.Tensor]:
        text = ""
        if isinstance(inputs, dict) and "audio" in inputs:
            text, inputs = inputs.get("text", ""), inputs["audio"]
        audio = load_audio(inputs, self.processor.sampling_rate)
        return self.processor(
            audio, text=text if self.processor.tokenizer else None, sampling_rate=self.processor.sampling_rate
        )

    def _forward(self, model_inputs: dict[str, torch.Tensor]) -> Any:
        return self.model(**model_inputs)

    def postprocess(self, model_outputs: Any, top_k: int | None = None) -> list[dict[str, Any]]:
        probabilities = self.model.probabilities(model_outputs.logits)[0]
        scores, ids = probabilities.sort(descending=True)
        return [
            {"label": self.model.config.id2label[i], "score": s}
            for s, i in zip(scores.tolist()[:top_k], ids.tolist()[:top_k], strict=True)
        ]
