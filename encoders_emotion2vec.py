"""emotion2vec (https://arxiv.org/abs/2312.15185) with FunASR's numbers: any clips make a batch, each as if alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    BatchFeature,
    PretrainedConfig,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from .layers_sailer import (
    FeedForward,
    FrameConv1d,
    SailerClassifierOutput,
    alibi_bias,
    alibi_slopes,
    drop_path,
    masked_mean,
    one_below_the_other,
    plain_loss,
)
from .linear_sailer import tower_kernels

if TYPE_CHECKING:
    # So that a classifier's pipeline and processor, which import this file, are saved with it.
    from .pipeline_sailer import SpeechEmotionPipeline  # noqa: F401

AUTO_MAP = {
    "AutoConfig": "encoders_emotion2vec.Emotion2VecConfig",
    "AutoModel": "encoders_emotion2vec.Emotion2VecModel",
    "AutoModelForAudioClassification": "encoders_emotion2vec.Emotion2VecForAudioClassification",
    "AutoFeatureExtractor": "encoders_emotion2vec.Emotion2VecFeatureExtractor",
}
PIPELINE = {"impl": "pipeline_sailer.SpeechEmotionPipeline", "pt": ["AutoModelForAudioClassification"]}
CONVOLUTIONS = ("conv_dim", "conv_kernel", "conv_stride")
# Options that are whole numbers, and the least that each may be.
COUNTS = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), 1),
    **dict.fromkeys((*CONVOLUTIONS, "conv_pos_kernel", "conv_pos_groups", "conv_pos_layers", "sampling_rate"), 1),
    **dict.fromkeys(("prenet_layers", "num_extra_tokens", "alibi_heads"), 0),
}


class Emotion2VecConfig(PretrainedConfig):
    r"""Configuration of an emotion2vec encoder and of the classifier on it; the defaults are those of base size.

    Args:
        hidden_size, num_attention_heads, intermediate_size (`int`): of every block.
        num_hidden_layers (`int`, defaults to 12): all the blocks, those of the prenet among them.
        prenet_layers (`int`, defaults to 4): how many of the first blocks are the prenet's; they differ in training.
        layer_norm_eps (`float`), layer_norm_affine (`bool`): of the blocks' norms.
        conv_dim, conv_kernel, conv_stride (sequences of `int`): of the waveform's convolutions.
        conv_pos_kernel, conv_pos_groups, conv_pos_layers (`int`): of the convolutions that give the positions.
        num_extra_tokens (`int`, defaults to 10): learned tokens in front of the frames.
        alibi_heads (`int`, *optional*): heads whose attention falls with distance; all by default.
        alibi_scale_per_head, alibi_scale_per_layer, alibi_scale_learned (`bool`): whether each head and each block has
            a scale of its own, and whether fine-tuning changes them.
        hidden_dropout, attention_dropout, activation_dropout, feed_forward_dropout, prenet_dropout, input_dropout,
            layerdrop, prenet_layerdrop (`float`), drop_path_rates (one a block; zeros by default): in training.
        do_normalize (`bool`, defaults to `True`): whether the feature extractor layer-normalises each whole waveform.
        unused_labels (sequence of `str`): classes that no clip is given.
        max_seconds (`float`, defaults to 30.0): longest audio that the pipeline hears at once.
        sampling_rate (`int`, defaults to 16000): of the waveforms, in Hz.

    Raises:
        ValueError: an option outside its range, or two that do not fit; the message names them.
    """

    model_type = "emotion2vec"
    # What SpeechEmotionPipeline asks of a system: this one has emotions alone, and no transcripts.
    heads = ("primary",)
    secondary_labels = ()
    sex_labels = ()
    text_dropout = 0.0

    hidden_size: int = 768
    num_hidden_layers: int = 12
    prenet_layers: int = 4
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-5
    layer_norm_affine: bool = True
    conv_dim: Sequence[int] = (512,) * 7
    conv_kernel: Sequence[int] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: Sequence[int] = (5, 2, 2, 2, 2, 2, 2)
    conv_pos_kernel: int = 19
    conv_pos_groups: int = 16
    conv_pos_layers: int = 5
    num_extra_tokens: int = 10
    alibi_heads: int | None = None
    alibi_scale_per_head: bool = True
    alibi_scale_per_layer: bool = False
    alibi_scale_learned: bool = True
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    feed_forward_dropout: float = 0.1
    prenet_dropout: float = 0.1
    input_dropout: float = 0.0
    layerdrop: float = 0.05
    prenet_layerdrop: float = 0.05
    drop_path_rates: Sequence[float] | None = None
    do_normalize: bool = True
    unused_labels: Sequence[str] = ()
    max_seconds: float = 30.0
    sampling_rate: int = 16000

    def __post_init__(self, **kwargs: Any) -> None:
        # Always this folder's own code: a name that a loader prefixed with a repository must not be saved again.
        super().__post_init__(**(kwargs | {"auto_map": dict(AUTO_MAP)}))
        for option, least in COUNTS.items():
            value = getattr(self, option)
            for number in value if option in CONVOLUTIONS else [value]:
                if option == "alibi_heads" and number is None:
                    continue
                if isinstance(number, bool) or not isinstance(number, int) or number < least:
                    raise ValueError(f"{option} is {value!r}; it is a whole number from {least}.")
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) > 0:
            raise ValueError(f"{', '.join(CONVOLUTIONS)} have one number for each convolution.")
        for option in ("num_attention_heads", "conv_pos_groups"):
            if self.hidden_size % getattr(self, option):
                raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {option} {getattr(self, option)}.")
        for option, most in (("prenet_layers", "num_hidden_layers"), ("alibi_heads", "num_attention_heads")):
            if (getattr(self, option) or 0) > getattr(self, most):
                raise ValueError(f"{option} is {getattr(self, option)}, and {most} {getattr(self, most)}.")
        if self.drop_path_rates is not None and len(self.drop_path_rates) != self.num_hidden_layers:
            raise ValueError(f"drop_path_rates has {len(self.drop_path_rates)} rates, not num_hidden_layers.")

    @property
    def labels(self) -> list[str]:
        """Emotions in the order of the logits."""
        return [label for _, label in sorted((self.id2label or {}).items())]

    @property
    def scored_labels(self) -> list[str]:
        """Emotions among which a decision is taken: all but the unused ones."""
        return [label for label in self.labels if label not in self.unused_labels]

    @property
    def audio_config(self) -> Self:
        return self  # the speech encoder's


class Emotion2VecFeatureExtractor(Wav2Vec2FeatureExtractor):
    """Waveforms at 16 kHz, each layer-normalised over its own samples (`do_normalize`), padded, with their mask."""

    def __init__(self, do_normalize: bool = True, return_attention_mask: bool = True, **kwargs: Any) -> None:
        super().__init__(do_normalize=do_normalize, return_attention_mask=return_attention_mask, **kwargs)

    def __call__(self, *args: Any, return_attention_mask: bool | None = None, **kwargs: Any) -> BatchFeature:
        """As `Wav2Vec2FeatureExtractor`'s: `input_values` (batch, samples) and `attention_mask` of the same shape."""
        inputs = super().__call__(*args, **(kwargs | {"return_attention_mask": True}))
        if not (self.return_attention_mask if return_attention_mask is None else return_attention_mask):
            inputs.pop("attention_mask", None)
        return inputs

    @staticmethod
    def zero_mean_unit_var_norm(
        input_values: list[np.ndarray], attention_mask: Any, padding_value: float = 0.0
    ) -> list[np.ndarray]:
        """Layer norm over each clip's own samples; the mask is all ones where there is none."""
        lengths = [len(x) for x in input_values] if attention_mask is None else np.asarray(attention_mask).sum(-1)
        normalized = []
        for values, length in zip(input_values, lengths, strict=True):
            # In torch, as FunASR does: the encoder may make ten times as much of the last digit.
            own = torch.as_tensor(values[:length], dtype=torch.float32)
            row = np.full(len(values), padding_value, dtype=np.float32)
            row[:length] = nn.functional.layer_norm(own, own.shape)
            normalized.append(row)
        return normalized


class Emotion2VecConvLayer(nn.Module):
    """One convolution over waveforms: (batch, frames, width) each -> (batch, fewer frames, width)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = FrameConv1d(inputs, outputs, kernel, stride=stride, bias=False)
        self.layer_norm = nn.LayerNorm(outputs)

    def forward(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:
        return [nn.functional.gelu(self.layer_norm(states)) for states in self.conv(clips)]


class Emotion2VecPositions(nn.Module):
    """Positions relative to the neighbours: grouped convolutions, each with a norm without weights and GELU."""

    def __init__(self, config: Emotion2VecConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.conv_pos_kernel
        self.convs = nn.ModuleList(
            FrameConv1d(width, width, kernel, padding=kernel // 2, groups=config.conv_pos_groups)
            for _ in range(config.conv_pos_layers)
        )

    def forward(self, clips: list[torch.Tensor], own: torch.Tensor | None) -> list[torch.Tensor]:
        """states (batch, frames, width) each, and of padded ones the mask (batch, frames) of their own -> states."""
        sizes = [states.shape[1] for states in clips]
        for conv in self.convs:
            # A clip alone ends in the convolution's zeros: beside longer clips it must see the same, at every layer.
            clips = conv(clips if own is None else [states * own.unsqueeze(-1).to(states.dtype) for states in clips])
            clips = [states[:, :size] for states, size in zip(clips, sizes, strict=True)]  # an even kernel adds one
            clips = [nn.functional.gelu(nn.functional.layer_norm(states, states.shape[-1:])) for states in clips]
        return clips


class Emotion2VecAttention(nn.Module):
    """Self-attention with a bias on the scores."""

    def __init__(self, config: Emotion2VecConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_dropout
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, states: torch.Tensor, bias: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
        """As `Emotion2VecEncoder.forward`, with one bias."""
        parts = [
            projection(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        ]
        attend: Any = nn.functional.scaled_dot_product_attention
        if sizes is None:
            attended = attend(*parts, bias, self.dropout if self.training else 0.0).transpose(1, 2)
            if torch.compiler.is_exporting():  # what attention is taken apart into lies otherwise in memory
                attended = attended.clone(memory_format=torch.contiguous_format)
        else:
            clips = zip(*(part.split(sizes, dim=2) for part in parts), sizes, strict=True)
            attended = [attend(*clip, bias[..., :size, :size]).transpose(1, 2) for *clip, size in clips]
            attended = torch.cat(attended, dim=1)
        return self.out_proj(attended.reshape(states.shape))


class Emotion2VecLayer(GradientCheckpointingLayer):
    """One block: attention and feed-forward, each added to its input and then normalised."""

    def __init__(self, config: Emotion2VecConfig, index: int) -> None:
        super().__init__()
        self.attention = Emotion2VecAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layer_norm = _norm(config)
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.activation_dropout)
        self.output_dropout = nn.Dropout(config.feed_forward_dropout)
        self.final_layer_norm = _norm(config)
        self.drop_path_rate = config.drop_path_rates[index] if config.drop_path_rates else 0.0

    def forward(self, states: torch.Tensor, bias: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
        """As `Emotion2VecEncoder.forward`, with one bias."""
        rate = self.drop_path_rate if self.training else 0.0
        attended = self.dropout(self.attention(states, bias, sizes))
        states = self.layer_norm(states + drop_path(attended, rate))
        return self.final_layer_norm(states + drop_path(self.output_dropout(self.feed_forward(states)), rate))


class Emotion2VecEncoder(nn.Module):
    """The blocks, those of the prenet first."""

    def __init__(self, config: Emotion2VecConfig) -> None:
        super().__init__()
        self.config = config
        self.layer_norm = _norm(config)
        self.prenet_dropout = nn.Dropout(config.prenet_dropout)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.layers = nn.ModuleList(Emotion2VecLayer(config, index) for index in range(config.num_hidden_layers))

    def forward(
        self, states: torch.Tensor, biases: Sequence[torch.Tensor], sizes: list[int] | None = None
    ) -> list[torch.Tensor]:
        """
        Args:
            states: (batch, positions, width); or the clips' own positions one after the other, (1, all, width).
            biases: (batch or 1, heads, positions, positions) each, one for all blocks or one a block; of clips one
                after the other that of the longest, (1, heads, positions, positions).
            sizes: of clips one after the other, their numbers of positions.

        Returns:
            the normalised input and each block's output, of the shape of `states`.
        """
        config, collected = self.config, [self.prenet_dropout(self.layer_norm(states))]
        with tower_kernels("auto", self):
            for index, layer in enumerate(self.layers):
                states = self.input_dropout(collected[-1]) if index == config.prenet_layers else collected[-1]
                drop = config.prenet_layerdrop if index < config.prenet_layers else config.layerdrop
                if not (self.training and drop > 0 and torch.rand([]) < drop):
                    states = layer(states, biases[index if len(biases) > 1 else 0], sizes)
                collected.append(states)
        return collected


class Emotion2VecPreTrainedModel(PreTrainedModel):
    """What encoder and classifier share: how they are initialised, loaded (from safetensors alone) and saved."""

    config: Emotion2VecConfig
    config_class = Emotion2VecConfig
    base_model_prefix = "emotion2vec"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Emotion2VecLayer"]  # noqa: RUF012 - transformers' own form

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv1d | nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, Emotion2VecModel):
            nn.init.ones_(module.alibi_scale)
            if module.extra_tokens is not None:
                nn.init.normal_(module.extra_tokens)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', from safetensors only: a pickle can run code when it is loaded, and is refused."""
        return super().from_pretrained(pretrained_model_name_or_path, *args, **(kwargs | {"use_safetensors": True}))

    def _get_feat_extract_output_lengths(self, input_lengths: torch.Tensor) -> torch.Tensor:
        """Samples -> frames."""
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            input_lengths = torch.div(input_lengths - kernel, stride, rounding_mode="floor") + 1
        return input_lengths.clamp(min=0)


class Emotion2VecModel(Emotion2VecPreTrainedModel):
    """emotion2vec's encoder: waveforms in, a state every 20 ms out."""

    def __init__(self, config: Emotion2VecConfig) -> None:
        super().__init__(config)
        inputs = [1, *config.conv_dim]
        shapes = zip(inputs, config.conv_dim, config.conv_kernel, config.conv_stride, strict=False)
        self.feature_extractor = nn.ModuleList(Emotion2VecConvLayer(*shape) for shape in shapes)
        width = config.conv_dim[-1]
        self.feature_projection = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.hidden_size))
        self.positions = Emotion2VecPositions(config)
        layers = config.num_hidden_layers if config.alibi_scale_per_layer else 1
        heads = config.num_attention_heads if config.alibi_heads is None else config.alibi_heads
        self.alibi_slopes = alibi_slopes(heads)
        self.alibi_scale = nn.Parameter(torch.ones(layers, heads if config.alibi_scale_per_head else 1))
        tokens = config.num_extra_tokens
        self.extra_tokens = nn.Parameter(torch.zeros(tokens, config.hidden_size)) if tokens else None
        self.encoder = Emotion2VecEncoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """
        Args:
            input_values: (batch, samples) waveforms, normalised and padded by the feature extractor.
            attention_mask: (batch, samples), 1 on each clip's own; all of them by default.
            output_hidden_states: also return the blocks' input and each one's output; the configuration's by default.
            return_dict: False returns a tuple.

        Returns:
            last_hidden_state (batch, frames, width), and hidden_states of the same shape each. What stands beyond a
            clip's own frames means nothing.
        """
        sizes = None
        if attention_mask is not None and self._is_packed(input_values):
            lengths = attention_mask.sum(1).tolist()
            clips = self._embed([row[None, :length] for row, length in zip(input_values, lengths, strict=True)])
            sizes = [clip.shape[1] for clip in clips]
            states, biases = torch.cat(clips, dim=1), self._biases(max(sizes), None)
        else:
            own = None if attention_mask is None else self.own_frames(attention_mask)
            (states,) = self._embed([input_values], own)
            biases = self._biases(states.shape[1], own)
        collected = self.encoder(states, biases, sizes)
        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        returned = collected if collect else collected[-1:]
        if sizes is not None:
            longest = int(self._get_feat_extract_output_lengths(torch.tensor(input_values.shape[1])))
            returned = [
                one_below_the_other(states, sizes, longest + self.config.num_extra_tokens) for states in returned
            ]
        returned = [states[:, self.config.num_extra_tokens :] for states in returned]
        return BaseModelOutput(returned[-1], hidden_states=tuple(returned) if collect else None)

    def own_frames(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Mask (batch, samples) over samples -> boolean mask (batch, frames) over frames."""
        frames = attention_mask.shape[1]
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride, strict=True):
            frames = (frames - kernel) // stride + 1
        lengths = self._get_feat_extract_output_lengths(attention_mask.sum(1))
        return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)

    def _is_packed(self, input_values: torch.Tensor) -> bool:
        """Whether the clips go one after the other, without padding, which on a CPU would take as long as speech."""
        is_eager = not torch.compiler.is_compiling() and not torch.jit.is_tracing()
        return is_eager and input_values.device.type == "cpu" and not self.training

    def _embed(self, waveforms: list[torch.Tensor], own: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Waveforms, (batch, samples) each -> the extra tokens and the frames with their positions."""
        clips = [waveform.to(self.dtype).unsqueeze(-1) for waveform in waveforms]
        for layer in self.feature_extractor:
            clips = layer(clips)
        clips = [self.feature_projection(states) for states in clips]
        clips = [states + place for states, place in zip(clips, self.positions(clips, own), strict=True)]
        if self.extra_tokens is None:
            return clips
        return [torch.cat([self.extra_tokens.expand(states.shape[0], -1, -1), states], dim=1) for states in clips]

    def _biases(self, positions: int, own: torch.Tensor | None) -> list[torch.Tensor]:
        """What is added to the attention's scores, for all blocks or each; see `alibi_bias`."""
        config = self.config
        scale = self.alibi_scale if config.alibi_scale_learned else self.alibi_scale.detach()
        slopes = scale.float().clamp(min=0) * torch.tensor(self.alibi_slopes, device=scale.device)
        slopes = nn.functional.pad(slopes, (0, config.num_attention_heads - len(self.alibi_slopes)))
        return [alibi_bias(slope, positions, config.num_extra_tokens, own).to(self.dtype) for slope in slopes]


class Emotion2VecForAudioClassification(Emotion2VecPreTrainedModel):
    """emotion2vec with a linear layer over the mean of a clip's frames."""

    def __init__(self, config: Emotion2VecConfig) -> None:
        super().__init__(config)
        config.custom_pipelines = {"audio-classification": PIPELINE | {"type": "multimodal"}}
        self.emotion2vec = Emotion2VecModel(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> SailerClassifierOutput:
        """
        Args:
            input_values, attention_mask, output_hidden_states, return_dict: see `Emotion2VecModel.forward`.
            labels: (batch,) class ids, -100 is unknown; or (batch, labels) float distributions.

        Returns:
            logits (batch, labels), those of unused classes so low that their probability is zero; embeddings (batch,
            width), the means over each clip's frames.
        """
        outputs = self.emotion2vec(input_values, attention_mask, output_hidden_states)
        states = outputs.last_hidden_state
        mask = torch.ones_like(input_values) if attention_mask is None else attention_mask
        embeddings = masked_mean(states, self.emotion2vec.own_frames(mask))
        logits = self.classifier(embeddings)
        unused = torch.tensor([x in self.config.unused_labels for x in self.config.labels], device=logits.device)
        logits = logits.masked_fill(unused, torch.finfo(logits.dtype).min)
        return SailerClassifierOutput(
            loss=None if labels is None else plain_loss(logits, labels),
            logits=logits,
            embeddings=embeddings,
            hidden_states=outputs.hidden_states,
        )

    def probabilities(self, logits: torch.Tensor, prior: str = "balanced") -> torch.Tensor:
        """softmax(logits) of logits (batch, labels).

        Raises:
            ValueError: another prior than "balanced": how the classes were weighted in training is not known.
        """
        if prior != "balanced":
            raise ValueError(f"prior is {prior!r}, but how this model's training weighted the classes is not known.")
        return logits.float().softmax(-1)


def _norm(config: Emotion2VecConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=config.layer_norm_affine)


# So that a system with this encoder, or a backbone's folder, loads with these classes and runs no other code.
AutoConfig.register(Emotion2VecConfig.model_type, Emotion2VecConfig, exist_ok=True)
for auto, own in (
    (AutoFeatureExtractor, Emotion2VecFeatureExtractor),
    (AutoModel, Emotion2VecModel),
    (AutoModelForAudioClassification, Emotion2VecForAudioClassification),
):
    auto.register(Emotion2VecConfig, own, exist_ok=True)
    own.register_for_auto_class(auto.__name__)
Emotion2VecConfig.register_for_auto_class()

__all__ = [
    "Emotion2VecConfig",
    "Emotion2VecFeatureExtractor",
    "Emotion2VecForAudioClassification",
    "Emotion2VecModel",
]
