"""The towers' encoders: padding masked where that was shown to be safe, else clips of one length at a time."""

from __future__ import annotations

import inspect
import os
import pickle
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, WavLMConfig, WavLMModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.wavlm.modeling_wavlm import WavLMAttention
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    ModelOutput,
    cached_file,
    logging,
)
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .encoders_emotion2vec import Emotion2VecModel
from .layers_sailer import FusedWavLMAttention

logger = logging.get_logger(__name__)

# Their states were shown (tests/test_encoders.py) not to change with padding, if `masks_padding` holds.
MASKED = ("emotion2vec", "hubert", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-bert", "wavlm")
# Text towers that take a mask as attention wants it, and then leave it alone.
MASKED_BY_SDPA = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
# What follows their layers changes the number of frames, so that the layers' own states are weighted.
RESAMPLED = ("sew", "sew-d")
ADVICE = "Give a Hub id or a folder with config.json and model.safetensors (or pytorch_model.bin)."
HOP_LENGTH = 160  # samples between Whisper's log-mel frames
TAIL_FRAMES = 2  # of silence, which the processor puts behind a batch's longest clip

_WINDOWS = "it hears windows of one fixed length, padded without a mask"
_PART = "it is a part of a larger model and has no feature extractor of its own that gives an attention_mask"
REFUSED = {
    "audio-spectrogram-transformer": _WINDOWS,
    "audioflamingo3_encoder": _WINDOWS,
    "gemma4_audio": _PART,
    "higgs_audio_v2_tokenizer": "it is a codec",
    "moss_transcribe_diarize_audio": _WINDOWS,
    "nemotron3_5_transcribe_asr_audio": _PART,
    "nemotron3_diarization_audio": _PART,
    "qwen2_audio_encoder": _WINDOWS,
    "qwen3_asr_encoder": _WINDOWS,
    "voxtral_encoder": _WINDOWS,
    "voxtral_realtime_encoder": _PART,
}
ACCEPTED = (
    "Whisper, WavLM, wav2vec 2.0 (its Conformer and BERT too), HuBERT, UniSpeech, Data2Vec, SEW, emotion2vec and the "
    "encoders of Parakeet, LASR, Granite Speech 5 and Nemotron can be."
)


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
            hidden states of shape (batch, positions, width), of all positions that the frames make.

        Raises:
            ValueError: more frames than the encoder has positions for.
        """
        frames, positions = input_features.shape[-1], self.max_source_positions
        if frames > 2 * positions + TAIL_FRAMES:
            raise ValueError(
                f"{frames} frames of audio take {(frames + 1) // 2} encoder positions and this encoder has "
                f"{positions} ({positions / 50:.0f} s): cut the audio, or use the pipeline's chunk_length_s."
            )
        # A compiler asks; it takes a message without the count alone.
        torch._check(frames >= 4, lambda: "Too few frames of audio: give at least 4 (40 ms).")
        states = nn.functional.gelu(self.conv1(input_features.to(self.conv1.weight.dtype)))
        states = nn.functional.gelu(self.conv2(states)).transpose(1, 2)
        # Behind a full window one position is left of the processor's silence: not cut, which would make two graphs.
        index = torch.arange(states.shape[1], device=states.device).clamp(max=positions - 1)
        # As a call, so that an offloaded table is there when it is read.
        states = states + self.embed_positions(index)
        states = nn.functional.dropout(states, p=self.dropout, training=self.training)
        mask = None
        if attention_mask is not None and not attend_to_padding:
            mask = self._attention_bias(states, whisper_positions(attention_mask, states.shape[1]))

        collected = []
        for layer in self.layers:
            if output_hidden_states:
                collected.append(states)
            if not (self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop):
                states = layer(states, mask)
        states = self.layer_norm(states)
        return BaseModelOutput(states, hidden_states=(*collected, states) if output_hidden_states else None)

    def _attention_bias(self, states: torch.Tensor, own: torch.Tensor) -> Any:
        """What keeps attention off the padding, in the form that the attention kernel takes."""
        if self.config._attn_implementation not in ("eager", "sdpa"):
            return create_bidirectional_mask(self.config, states, own)
        # The values are not looked at, as transformers' own function does: that would wait for the device.
        bias = torch.zeros_like(own, dtype=states.dtype).masked_fill(~own, torch.finfo(states.dtype).min)
        return bias[:, None, None, :]


class FusedWavLMModel(WavLMModel):
    """transformers' WavLM, its weights and configuration, with `FusedWavLMAttention`."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__(config)
        for module in self.modules():
            if type(module) is WavLMAttention:
                module.__class__ = FusedWavLMAttention  # the same parts under the same names

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: torch.Tensor, add_adapter: bool | None = None
    ) -> torch.Tensor:
        """As transformers', by a comparison: its own writes into a tensor, for which the host waits."""
        own: Any = attention_mask.sum(-1)
        lengths = self._get_feat_extract_output_lengths(own, add_adapter=add_adapter)
        return torch.arange(feature_vector_length, device=lengths.device) < lengths.unsqueeze(1)


def masks_padding(config: PretrainedConfig) -> bool:
    """Whether `encode_audio` runs this speech encoder on a padded batch under a mask, all clips at once.

    Otherwise clips are encoded beside clips of their own length only, without any padding: normalisation over time
    (wav2vec2-base, wavlm-base), batch-normalised positions, convolutions that no mask reaches (Conformer, Data2Vec)
    and strided adapters all let padding into the clip.
    """
    if config.model_type == "whisper":
        return True
    return (
        config.model_type in MASKED
        and getattr(config, "feat_extract_norm", "layer") == "layer"
        and not getattr(config, "conv_pos_batch_norm", False)
        and not getattr(config, "add_adapter", False)
    )


def check_speech_encoder(config: PretrainedConfig, audio_layers: str = "last") -> None:
    """Refuse what cannot be a system's speech encoder, or not with its layers weighted.

    Raises:
        ValueError: the message names the model type, the reason, and what to use instead.
    """
    reason = REFUSED.get(config.model_type) or _reason_against(config)
    if reason is not None:
        raise ValueError(f"A {config.model_type!r} model cannot be the speech encoder: {reason}. {ACCEPTED}")
    if audio_layers != "last" and getattr(config, "subsample_layers", None):
        raise ValueError(
            f"The layers of a {config.model_type!r} encoder differ in length (subsample_layers is "
            f"{config.subsample_layers}), so that they cannot be weighted: set audio_layers to 'last'."
        )


def speech_width(config: PretrainedConfig, audio_layers: str = "last") -> int:
    """Width of the states of `encode_audio`: an adapter, which only the last state goes through, may change it."""
    adapted = audio_layers == "last" and getattr(config, "add_adapter", False)
    return config.output_hidden_size if adapted else config.hidden_size


def encode_audio(
    encoder: PreTrainedModel,
    audio: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    all_layers: bool = False,
    attend_to_padding: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of any length through a speech encoder, such that padding changes nothing.

    Args:
        encoder: a speech encoder of `build_encoder` or `load_encoder`.
        audio: Whisper's input_features (batch, mels, frames), others' (batch, frames, width), or input_values (batch,
            samples).
        attention_mask: (batch, frames or samples), 1 on the clip's own; Whisper's also over the samples behind its
            frames, which is what transformers' feature extractor gives unasked. All of them by default.
        all_layers: every layer's hidden states, not only the last one.
        attend_to_padding: let a Whisper encoder's frames see the padding.

    Returns:
        states (batch, frames, width), or (batch, layers, frames, width) with `all_layers`; and the mask (batch,
        frames) of each clip's own frames.

    Raises:
        ValueError: a mask of another length than the audio, none beside Whisper's features of full length, or an
            encoder whose layers cannot be weighted.
    """
    is_whisper = isinstance(encoder, VariableLengthWhisperEncoder)
    frames = audio.shape[-1] if is_whisper else audio.shape[1]
    if attention_mask is None:
        if is_whisper and frames >= 2 * encoder.config.max_source_positions:
            raise ValueError(
                f"Features of {frames} frames ({frames / 100:.0f} s) came without attention_mask. A feature extractor "
                "pads to that length, and padding would be taken for speech: use the SailerProcessor, or call the "
                "feature extractor with return_attention_mask=True and pass its mask on."
            )
        attention_mask = torch.ones(len(audio), frames, dtype=torch.long, device=audio.device)
    if is_whisper and attention_mask.shape[1] // HOP_LENGTH == frames:
        attention_mask = attention_mask[:, HOP_LENGTH - 1 :: HOP_LENGTH]
    if attention_mask.shape[1] != frames:
        raise ValueError(f"attention_mask has {attention_mask.shape[1]} columns for audio of length {frames}.")
    if is_whisper:
        outputs = encoder(audio, attention_mask, all_layers, attend_to_padding)
        states = all_hidden_states(outputs) if all_layers else outputs.last_hidden_state
        return states, whisper_positions(attention_mask, states.shape[-2])
    if masks_padding(encoder.config):
        states = _run(encoder, audio, attention_mask, all_layers)
        count: Any = encoder._get_feat_extract_output_lengths
        return states, _length_mask(count(attention_mask.sum(1)), states.shape[-2])
    return _encode_by_length(encoder, audio, attention_mask, all_layers)


def all_hidden_states(outputs: ModelOutput) -> torch.Tensor:
    """(batch, layers, positions, width). The last entry is the tower's output: releases differ in whether the
    recorded one is normalised."""
    return torch.stack([*outputs["hidden_states"][:-1], outputs["last_hidden_state"]], dim=1)


def whisper_positions(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """Mask over log-mel frames -> boolean mask over the first `length` encoder positions (the second convolution has
    stride 2)."""
    # Gathered: a slice that may or may not cut makes two graphs.
    return attention_mask[:, 2 * torch.arange(length, device=attention_mask.device)].bool()


def text_mask(encoder: PreTrainedModel, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mask over tokens (batch, tokens) as a text tower takes it: for those of BERT's family on a GPU what their
    attention makes of it, (batch, 1, 1, tokens), since transformers looks first whether there is padding at all, for
    which the host waits."""
    config = encoder.config
    if attention_mask.device.type == "cpu" or config.model_type not in MASKED_BY_SDPA:
        return attention_mask
    return attention_mask.bool()[:, None, None] if config._attn_implementation == "sdpa" else attention_mask


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


def keep_layers(encoder: PreTrainedModel) -> None:
    """Switch off layer dropping (in training), which would leave no state of a dropped layer to weigh. Whisper's
    encoder records what went past."""
    holders: tuple[Any, ...] = (encoder, encoder.config)
    for holder in holders:
        if not isinstance(encoder, VariableLengthWhisperEncoder) and getattr(holder, "layerdrop", None):
            holder.layerdrop = 0.0


def build_encoder(config: PretrainedConfig) -> PreTrainedModel:
    """A tower with fresh weights; raises ValueError for a configuration without an encoder."""
    encoder_class = _encoder_class(config)
    return _ready(encoder_class._from_config(config, **_encoder_options(encoder_class)))


def load_encoder(
    source: str | os.PathLike, attn_implementation: str | None, audio_layers: str | None = None
) -> PreTrainedModel:
    """A tower from a checkpoint, in float32.

    A backbone that is published as pytorch_model.bin alone is read by torch's weights-only unpickler, which builds
    tensors and runs no code; a line says so.

    Args:
        source: Hub id or folder. Of a full Whisper checkpoint only the encoder is read.
        attn_implementation: as in transformers.
        audio_layers: of a speech encoder, as in `SailerConfig`; `None` for a text encoder.

    Raises:
        ValueError: it cannot be loaded, a tensor of the encoder is not in it (the message names the tensors), or it
            cannot be a speech encoder.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        encoder_class = _encoder_class(config)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(source, error) from error
    if audio_layers is not None:
        check_speech_encoder(config, audio_layers)
    try:
        options = _encoder_options(encoder_class) | {"use_safetensors": not _is_pickled(source)}
        if config.model_type == "whisper":
            # The encoder of a full checkpoint, with or without the head's prefix; the decoder is never read.
            options["key_mapping"] = {r"^(?:model\.)?encoder\.": ""}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # unused tensors, a decoder's for one, are none of the user's concern
        try:
            loaded: Any = encoder_class.from_pretrained(
                source, dtype=torch.float32, weights_only=True, output_loading_info=True, **options
            )
        finally:
            logging.set_verbosity(verbosity)
    except pickle.UnpicklingError as error:
        reason = f"{WEIGHTS_NAME} holds more than tensors, and nothing else in a pickle is read."
        raise _unloadable(source, ValueError(reason)) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _unloadable(source, error) from error
    encoder, report = loaded
    mismatched = [entry[0] for entry in report["mismatched_keys"]]
    lost = sorted({*report["missing_keys"], *mismatched})
    if lost:
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise ValueError(
            f"The checkpoint of backbone {str(source)!r} lacks {len(lost)} of the encoder's tensors ({shown}), which "
            f"would have stayed random. {ADVICE}"
        )
    if os.path.isdir(source):
        encoder.config._name_or_path = ""  # a path on this machine is of no use to others
    return _ready(encoder)


def _ready(encoder: PreTrainedModel) -> PreTrainedModel:
    """Set up how transformers collects hidden states: at the first call, under a lock, it would break a compiled
    graph."""
    if getattr(encoder, "_can_record_outputs", None) and not isinstance(encoder, VariableLengthWhisperEncoder):
        maybe_install_capturing_hooks(encoder)
    return encoder


def _encode_by_length(
    encoder: PreTrainedModel, audio: torch.Tensor, attention_mask: torch.Tensor, all_layers: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = attention_mask.sum(1)
    encoded: dict[int, torch.Tensor] = {}
    for length in lengths.unique().tolist():
        chosen = (lengths == length).nonzero().squeeze(1)
        states = _run(encoder, audio[chosen, :length], attention_mask[chosen, :length], all_layers)
        encoded |= zip(chosen.tolist(), states, strict=True)
    rows = [encoded[row] for row in range(len(lengths))]
    frames = torch.tensor([row.shape[-2] for row in rows], device=audio.device)
    longest = int(frames.max())
    padded = [nn.functional.pad(row, (0, 0, 0, longest - row.shape[-2])) for row in rows]
    return torch.stack(padded), _length_mask(frames, longest)


def _run(
    encoder: PreTrainedModel, audio: torch.Tensor, attention_mask: torch.Tensor, all_layers: bool
) -> torch.Tensor:
    config = encoder.config
    spared = encoder.training and getattr(config, "apply_spec_augment", True) and _is_short(encoder, audio.shape[1])
    if spared:
        config.apply_spec_augment = False  # a batch shorter than one mask cannot be masked
    try:
        outputs = encoder(audio.to(encoder.dtype), attention_mask=attention_mask, output_hidden_states=all_layers)
    except RuntimeError as error:
        if "Kernel size can't be greater" not in str(error):
            raise
        raise ValueError(
            f"A clip of {audio.shape[1]} {'frames' if audio.ndim > 2 else 'samples'} is shorter than the convolutions "
            f"of a {config.model_type!r} encoder span: leave it out."
        ) from error
    finally:
        if spared:
            config.apply_spec_augment = True
    return _layer_states(config, outputs) if all_layers else outputs.last_hidden_state


def _is_short(encoder: PreTrainedModel, length: int) -> bool:
    """Whether SpecAugment's mask, where the encoder has one, is longer than what `length` samples or frames give
    before an adapter."""
    if not hasattr(encoder.config, "mask_time_length"):
        return False
    count: Any = encoder._get_feat_extract_output_lengths
    options = {"add_adapter": False} if "add_adapter" in inspect.signature(count).parameters else {}
    return int(count(torch.tensor(length), **options)) <= encoder.config.mask_time_length


def _layer_states(config: PretrainedConfig, outputs: ModelOutput) -> torch.Tensor:
    """(batch, layers, frames, width): of the layers alone where an adapter or an upsampling follows them."""
    states = outputs.get("hidden_states") or ()
    shapes = [tuple(state.shape) for state in states]
    if len(states) != config.num_hidden_layers + 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"The layers of a {config.model_type!r} encoder cannot be weighted: {config.num_hidden_layers + 1} states "
            f"of one shape are needed, and it gives {shapes or None}. Set audio_layers to 'last'."
        )
    if config.model_type in RESAMPLED or getattr(config, "add_adapter", False):
        return torch.stack(tuple(states), dim=1)
    return all_hidden_states(outputs)


def _length_mask(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)


def _reason_against(config: PretrainedConfig) -> str | None:
    if config.model_type == "whisper":
        return None
    encoder_class = _encoder_class(config)
    if encoder_class.main_input_name not in ("input_values", "input_features"):
        return f"it reads {encoder_class.main_input_name}, not speech alone"
    if re.search(r"For[A-Z]", encoder_class.__name__):
        return (
            "it is a whole recogniser; save its encoder (model.encoder.save_pretrained) with its feature extractor in "
            "a folder, and give that"
        )
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder and a decoder, of which only Whisper's encoder is read alone"
    if "attention_mask" not in inspect.signature(encoder_class.forward).parameters:
        return "it takes no attention_mask, as codecs and the audio parts of larger models do not"
    if not (hasattr(config, "hidden_size") and hasattr(config, "num_hidden_layers")):
        return "its configuration does not say how wide (hidden_size) and deep (num_hidden_layers) it is"
    return None


def _is_pickled(source: str | os.PathLike) -> bool:
    """Whether a checkpoint has its weights as a pickle and not as safetensors."""

    def has(*names: str) -> bool:
        found = (cached_file(str(source), name, _raise_exceptions_for_missing_entries=False) for name in names)
        return any(path is not None for path in found)

    if has(SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) or not has(WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        return False
    logger.warning("%s has no %s: its %s is read as tensors alone.", source, SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
    return True


def _unloadable(source: str | os.PathLike, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"The backbone {str(source)!r} cannot be loaded: {reason} {ADVICE}")


def _encoder_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    if config.model_type == "whisper":
        return VariableLengthWhisperEncoder
    if config.model_type == "emotion2vec":
        return Emotion2VecModel  # whatever code a folder brings
    if config.model_type == "wavlm":
        return FusedWavLMModel
    encoders: Any = AutoModel._model_mapping  # transformers says pairs, for what may have a slow and a fast class
    try:
        return encoders[type(config)]
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
    "check_speech_encoder",
    "encode_audio",
    "keep_layers",
    "load_encoder",
    "masks_padding",
    "speech_width",
    "transformer_layers",
    "whisper_positions",
]
