"""The towers' encoders: Whisper's at any length with padding masked; any encoder built, or loaded whole."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import ModelOutput, logging


class VariableLengthWhisperEncoder(WhisperEncoder):
    """Whisper's encoder at the clips' own lengths: any number of frames up to its positions, padding masked."""

    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        attend_to_padding: bool = False,
    ) -> BaseModelOutput:
        """
        Args:
            input_features: (batch, mels, frames) log-mel.
            attention_mask: (batch, frames), 1 on the clip's own frames; all of them by default.
            output_hidden_states: also return the embedding output and each layer's (the last one normalised).
            attend_to_padding: let the clip's frames see the padding.

        Returns:
            hidden states of shape (batch, positions, width), cut to the longest clip's own positions unless padding
            is attended to.

        Raises:
            ValueError: a clip longer than the encoder's positions.
        """
        states = nn.functional.gelu(self.conv1(input_features.to(self.conv1.weight.dtype)))
        states = nn.functional.gelu(self.conv2(states)).transpose(1, 2)
        own = None if attention_mask is None else whisper_positions(attention_mask)
        longest = states.shape[1] if own is None else int(own.sum(1).max())
        if longest > self.max_source_positions:
            raise ValueError(
                f"A clip takes {longest} encoder positions and this encoder has {self.max_source_positions} "
                f"({self.max_source_positions / 50:.0f} s): cut the audio, or use the pipeline's chunk_length_s."
            )
        length = min(states.shape[1], self.max_source_positions) if attend_to_padding else longest
        # As a call, so that an offloaded table is there when it is read.
        states = states[:, :length] + self.embed_positions(torch.arange(length, device=states.device))
        states = nn.functional.dropout(states, p=self.dropout, training=self.training)
        mask = None
        if own is not None and not attend_to_padding:
            mask = create_bidirectional_mask(self.config, states, own[:, :length])

        collected = []
        for layer in self.layers:
            if output_hidden_states:
                collected.append(states)
            if not (self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop):
                states = layer(states, mask)
        states = self.layer_norm(states)
        return BaseModelOutput(states, hidden_states=(*collected, states) if output_hidden_states else None)


def encode_audio(
    encoder: PreTrainedModel,
    audio: torch.Tensor,
    attention_mask: torch.Tensor,
    all_layers: bool = False,
    attend_to_padding: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of any length through a speech encoder, such that padding changes nothing.

    Args:
        encoder: a speech encoder of `build_encoder` or `load_encoder`.
        audio: input_features (batch, mels, frames) or input_values (batch, samples).
        attention_mask: (batch, frames or samples), 1 on the clip's own.
        all_layers: every layer's hidden states, not only the last one.
        attend_to_padding: let a Whisper encoder's frames see the padding.

    Returns:
        states (batch, frames, width), or (batch, layers, frames, width) with `all_layers`; and the mask (batch,
        frames) of each clip's own frames.
    """
    if isinstance(encoder, VariableLengthWhisperEncoder):
        outputs = encoder(audio, attention_mask, all_layers, attend_to_padding)
        states = all_hidden_states(outputs) if all_layers else outputs.last_hidden_state
        return states, whisper_positions(attention_mask)[:, : states.shape[-2]]
    if getattr(encoder.config, "feat_extract_norm", "layer") == "group":
        return _encode_by_length(encoder, audio, attention_mask, all_layers)
    return _encode_waveforms(encoder, audio, attention_mask, all_layers)


def all_hidden_states(outputs: ModelOutput) -> torch.Tensor:
    """(batch, layers, positions, width). The last entry is the tower's output: releases differ in whether the
    recorded one is normalised."""
    states: Sequence[torch.Tensor] = (*outputs.hidden_states[:-1], outputs.last_hidden_state)
    return torch.stack(states, dim=1)


def whisper_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Mask over log-mel frames -> boolean mask over encoder positions (the second convolution has stride 2)."""
    return attention_mask[:, ::2].bool()


def transformer_layers(encoder: PreTrainedModel) -> nn.ModuleList:
    """A speech encoder's transformer layers, the first on its input's side.

    Raises:
        ValueError: they are not where transformers' speech encoders have them.
    """
    layers = getattr(getattr(encoder, "encoder", encoder), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"The layers of a {encoder.config.model_type!r} encoder cannot be told apart: leave "
            "trainable_audio_layers out."
        )
    return layers


def build_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """A tower with fresh weights; raises ValueError for a configuration without an encoder."""
    encoder_class = _encoder_class(config)
    return encoder_class._from_config(config, **_encoder_options(encoder_class))


def load_encoder(source: str | os.PathLike, attn_implementation: str | None) -> PreTrainedModel:
    """A tower from a checkpoint, in float32.

    Args:
        source: Hub id or folder. Of a full Whisper checkpoint only the encoder is read.
        attn_implementation: as in transformers.

    Raises:
        ValueError: it cannot be loaded, or a tensor of the encoder is not in it (the message names the tensors).
    """
    advice = "Give a Hub id or a folder with config.json and model.safetensors (pickled weights are refused)."
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        encoder_class = _encoder_class(config)
        options = _encoder_options(encoder_class)
        if config.model_type == "whisper":
            # The encoder of a full checkpoint, with or without the head's prefix; the decoder is never read.
            options["key_mapping"] = {r"^(?:model\.)?encoder\.": ""}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # unused tensors, a decoder's for one, are none of the user's concern
        try:
            encoder, report = encoder_class.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
        finally:
            logging.set_verbosity(verbosity)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The backbone {str(source)!r} cannot be loaded: {reason} {advice}") from error
    mismatched = [entry[0] for entry in report["mismatched_keys"]]
    lost = sorted({*report["missing_keys"], *mismatched})
    if lost:
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise ValueError(
            f"The checkpoint of backbone {str(source)!r} lacks {len(lost)} of the encoder's tensors ({shown}), which "
            f"would have stayed random. {advice}"
        )
    if os.path.isdir(source):
        encoder.config._name_or_path = ""  # a path on this machine is of no use to others
    return encoder


def _encode_waveforms(
    encoder: PreTrainedModel, waveforms: torch.Tensor, attention_mask: torch.Tensor, all_layers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    config = encoder.config
    lengths = attention_mask.sum(1)
    if hasattr(encoder, "_get_feat_extract_output_lengths"):
        lengths = encoder._get_feat_extract_output_lengths(lengths)
    augmented = getattr(config, "apply_spec_augment", False)
    if augmented and int(lengths.max()) <= config.mask_time_length:
        config.apply_spec_augment = False  # a batch shorter than one mask cannot be masked
    try:
        outputs = encoder(waveforms.to(encoder.dtype), attention_mask=attention_mask, output_hidden_states=all_layers)
    finally:
        if augmented:
            config.apply_spec_augment = True
    states = all_hidden_states(outputs) if all_layers else outputs.last_hidden_state
    return states, _length_mask(lengths, states.shape[-2])


def _encode_by_length(
    encoder: PreTrainedModel, waveforms: torch.Tensor, attention_mask: torch.Tensor, all_layers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    # Group-normalised encoders (wav2vec2-base, wavlm-base) normalise over time, padding included: clips are
    # encoded beside clips of their own length only.
    lengths = attention_mask.sum(1)
    rows: list[torch.Tensor | None] = [None] * len(lengths)
    for length in lengths.unique().tolist():
        chosen = (lengths == length).nonzero().squeeze(1)
        states, _ = _encode_waveforms(encoder, waveforms[chosen, :length], attention_mask[chosen, :length], all_layers)
        for row, state in zip(chosen.tolist(), states, strict=True):
            rows[row] = state
    frames = torch.tensor([row.shape[-2] for row in rows], device=waveforms.device)
    longest = int(frames.max())
    padded = [nn.functional.pad(row, (0, 0, 0, longest - row.shape[-2])) for row in rows]
    return torch.stack(padded), _length_mask(frames, longest)


def _length_mask(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)


def _encoder_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    if config.model_type == "whisper":
        return VariableLengthWhisperEncoder
    try:
        return AutoModel._model_mapping[type(config)]
    except KeyError:
        raise ValueError(f"{config.model_type!r} backbones have no encoder in transformers' AutoModel.") from None


def _encoder_options(encoder_class: type[PreTrainedModel]) -> dict[str, Any]:
    # A pooler would be an unused, often missing, part of the text tower.
    accepts = inspect.signature(encoder_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepts else {}


__all__ = [
    "VariableLengthWhisperEncoder",
    "all_hidden_states",
    "build_encoder",
    "encode_audio",
    "load_encoder",
    "transformer_layers",
    "whisper_positions",
]
