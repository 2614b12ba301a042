"""What stands between the towers and the outputs, in the order data flows, the outputs and the plain loss; and what an
encoder of our own is built of.

Adaptation to a speaker stands here too: how recordings, without labels, deviate from the mean voice is taken off every
frame that the head is given. What the recordings' emotions add is estimated by the system's own probabilities and left
out as far as they are one emotion, so that this does not pass for the voice."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.wavlm.modeling_wavlm import WavLMAttention
from transformers.utils import ModelOutput

UNKNOWN_LABEL = -100
# Recordings' worth of doubt about a voice: of its deviation n / (n + this) is taken off, known from n of them.
DOUBT = 2.0
FEWEST_SPEAKERS = 4  # that a mean voice is learned from
LEAST_SCORE = -30000.0  # so low that the softmax is zero, and within half precision's range
# The choices of audio_layers that normalise each layer before they become one.
NORMALIZED_LAYERS = ("weighted_norm", "concat_norm")


class LayerWeights(nn.Module):
    """Softmax-weighted sum over a tower's hidden states, each layer-normalised first if asked."""

    def __init__(self, layers: int, normalize: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers))
        self.normalize = normalize

    def forward(self, states: torch.Tensor, is_normalized: bool = False) -> torch.Tensor:
        """(batch, layers, ..., width) -> (batch, ..., width); states may be normalised already."""
        if self.normalize and not is_normalized:
            states = nn.functional.layer_norm(states, states.shape[-1:])
        weights = self.weight.softmax(0)
        return torch.einsum("l,bl...->b...", weights.to(states.dtype), states)


class LayerConcatenation(nn.Module):
    """A tower's hidden states side by side, each layer-normalised first: none is averaged away."""

    def forward(self, states: torch.Tensor, is_normalized: bool = False) -> torch.Tensor:
        """(batch, layers, ..., width) -> (batch, ..., layers * width); states may be normalised already."""
        states = states if is_normalized else nn.functional.layer_norm(states, states.shape[-1:])
        return states.movedim(1, -2).flatten(-2)


def join_layers(config: Any, width: int) -> tuple[nn.Module, int]:
    """What makes one state of the audio tower's hidden states of `width`, as `audio_layers` says, and its width."""
    layers = config.audio_config.num_hidden_layers + 1
    if config.audio_layers == "concat_norm":
        return LayerConcatenation(), layers * width
    return LayerWeights(layers, normalize=config.audio_layers in NORMALIZED_LAYERS), width


def pool_frames(states: torch.Tensor, mask: torch.Tensor, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of each `frames` consecutive frames of states (batch, frames, width), and how many of the clip's own
    frames each of them holds: the last of a clip may hold fewer, and then counts for less."""
    pooled = (states.shape[1] + frames - 1) // frames
    missing = pooled * frames - states.shape[1]
    own = nn.functional.pad(mask, (0, missing)).reshape(-1, pooled, frames)
    states = nn.functional.pad(states, (0, 0, 0, missing)).reshape(-1, pooled, frames, states.shape[-1])
    return masked_mean(states, own), own.sum(-1)


def pool_states(states: torch.Tensor, frames: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states as a model's `pooled_hidden_states`, from which it makes the same as from all frames: layers are
    normalised and frames pooled before the layers' weighted sum or concatenation, which are linear.

    Args:
        states: (batch, [layers,] frames, width) of clips of one length.
        frames: as in `pool_frames`.
        normalize: each layer, as `LayerWeights` does.

    Returns:
        means of each `frames` frames (batch, [layers,] groups, width), and how many frames each group holds (batch,
        groups).
    """
    if normalize:
        states = nn.functional.layer_norm(states, states.shape[-1:])
    rows = states.flatten(0, -3)
    pooled, counts = pool_frames(rows, torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device), frames)
    return pooled.unflatten(0, states.shape[:-2]), counts[: len(states)]


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the second to last axis, weighted by the mask; zero where that is zero."""
    mask = mask.to(states.dtype).unsqueeze(-1)
    return (states * mask).sum(-2) / mask.sum(-2).clamp(min=1)


class FrameNorm(nn.BatchNorm1d):
    """Batch normalisation, without weights, of the clips' own frames alone; padding stays as it is."""

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # masked
        """(batch, frames, width) with a mask (batch, frames) -> the same shape."""
        own = mask.bool().unsqueeze(-1)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        mean, variance = self.running_mean, self.running_var
        if self.training:
            count = own.sum()
            mean = torch.where(own, states, 0).sum((0, 1)) / count
            variance = (torch.where(own, states - mean, 0) ** 2).sum((0, 1)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                unbiased = variance * count / (count - 1).clamp(min=1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked.add_(1)
        normalised = (states - mean) * (variance + self.eps).rsqrt()
        return torch.where(own, normalised.to(states.dtype), states)


class SpeakerReference(nn.Module):
    """What a voice is compared with: the mean voice, and how far each emotion lies from a speaker's own mean.

    Buffers: `mean` (width,), the mean over speakers of the mean of their recordings; `offsets` (labels, width).
    """

    mean: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("offsets", torch.zeros(labels, width))

    def statistics(self, means: torch.Tensor, probabilities: torch.Tensor | None) -> SpeakerStatistics:
        """Those of a speaker's recordings.

        Args:
            means: (recordings, width), the means of their speech.
            probabilities: (recordings, labels) of their emotions; None where a system has no such head.
        """
        emotions = self.offsets.new_zeros(len(self.offsets)) if probabilities is None else probabilities.sum(0)
        return SpeakerStatistics((means - self.mean.to(means)).sum(0), emotions.to(means), len(means))

    def shift(self, known: SpeakerStatistics) -> torch.Tensor:
        """What is subtracted from every frame (width,): the mean deviation, shrunk to n / (n + 2) of n recordings.

        What their emotions add is left out of it, the more so the more alike they are: by 1 - H / log(labels), H the
        entropy of their mean probabilities. Of all emotions together it would be next to nothing, and what is
        estimated then is rather a voice that sounds sad than sadness.
        """
        shares = known.emotions.clamp(min=0) / max(known.count, 1)
        entropy = -torch.xlogy(shares, shares).sum()
        sameness = (1 - entropy / math.log(max(len(shares), 2))).clamp(min=0)
        return (known.total - sameness * (known.emotions @ self.offsets.to(known.emotions))) / (known.count + DOUBT)

    @torch.no_grad()
    def fit(self, means: torch.Tensor, probabilities: torch.Tensor | None, speakers: Sequence[str]) -> None:
        """Learn it from recordings (see `statistics`) of several speakers.

        Each speaker counts once in the mean. An emotion's offset is the mean of the recordings' distances from their
        speaker's mean, weighted by the emotion's probability.

        Raises:
            ValueError: fewer than four speakers.
        """
        names = sorted(set(speakers))
        if len(names) < FEWEST_SPEAKERS:
            raise ValueError(
                f"The mean voice is to be learned from {len(names)} speakers {names[:3]}: give recordings of "
                f"{FEWEST_SPEAKERS} at least, several of each."
            )
        rows = torch.tensor([names.index(speaker) for speaker in speakers])
        one_hot = nn.functional.one_hot(rows, len(names)).to(means)
        centres = one_hot.T @ means / one_hot.sum(0).unsqueeze(1)
        self.mean.copy_(centres.mean(0))
        self.offsets.zero_()
        if probabilities is not None:
            weights = probabilities / probabilities.sum(0).clamp(min=1e-6)
            self.offsets.copy_(weights.T.to(means) @ (means - centres[rows]))


@dataclass(frozen=True)
class SpeakerStatistics:
    """What is known of a voice: the sum (width,) of its recordings' deviations from the mean voice, that of their
    emotions' probabilities (labels,), and how many there are. `SpeakerReference` makes them."""

    total: torch.Tensor
    emotions: torch.Tensor
    count: int

    def without(self, some: SpeakerStatistics) -> SpeakerStatistics:
        """Those of all recordings but some."""
        return SpeakerStatistics(self.total - some.total, self.emotions - some.emotions, self.count - some.count)


class AudioProjection(nn.Sequential):
    """Three 1x1 convolutions, ReLU and dropout between: (batch, width, frames) -> (batch, hidden_size, frames)."""

    def __init__(self, width: int, hidden_size: int, dropout: float) -> None:
        layers: list[nn.Module] = []
        for inputs in (width, hidden_size, hidden_size):
            layers += [nn.Conv1d(inputs, hidden_size, kernel_size=1), nn.ReLU(), nn.Dropout(dropout)]
        super().__init__(*layers[:-2])


class PredictionHead(nn.Sequential):
    """Two-layer MLP with ReLU: (batch, width) -> (batch, outputs)."""

    def __init__(self, width: int, hidden_size: int, outputs: int) -> None:
        super().__init__(nn.Linear(width, hidden_size), nn.ReLU(), nn.Linear(hidden_size, outputs))


class FeedForward(nn.Module):
    """A transformer block's two linear layers with GELU between: (..., width) -> (..., width)."""

    def __init__(self, width: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(width, intermediate_size)
        self.intermediate_dropout = nn.Dropout(dropout)
        self.output_dense = nn.Linear(intermediate_size, width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.output_dense(self.intermediate_dropout(nn.functional.gelu(self.intermediate_dense(states))))


class FrameConv1d(nn.Conv1d):
    """A convolution over frames (batch, frames, width) that stay so.

    As an image of one row whose channels come last: on a CPU it takes less than half the time of what torch makes of
    it otherwise, transposing before and after. For clips of several lengths its kernel is laid out once.
    """

    def forward(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:  # type: ignore[override]  # not one tensor
        """(batch, frames, inputs) each -> (batch, frames, outputs) each."""
        kernel = self.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        images = [states.transpose(1, 2).unsqueeze(2) for states in clips]
        options: tuple[Any, ...] = (self.bias, (1, *self.stride), (0, *self.padding), 1, self.groups)
        images = [nn.functional.conv2d(image, kernel, *options) for image in images]
        return [image.squeeze(2).transpose(1, 2) for image in images]


def alibi_slopes(heads: int) -> list[float]:
    """Fall of the attention's score per frame of distance, by head (https://arxiv.org/abs/2108.12409).

    2^(-8 i / n) for n heads, a power of two; for other numbers those of the power below, then every other one of the
    power above.
    """
    below = 2 ** int(math.log2(heads)) if heads else 0
    slopes = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    between = [2 ** (-8 * (i + 1) / (2 * below)) for i in range(0, 2 * below, 2)]
    return slopes + between[: heads - below]


def alibi_bias(slopes: torch.Tensor, positions: int, tokens: int, own: torch.Tensor | None = None) -> torch.Tensor:
    """What is added to the attention's scores: ALiBi, falling to both sides, and nothing for padding to see.

    Args:
        slopes: (heads,).
        positions: of `tokens`, which have no place and stand first, and frames.
        own: (batch, frames), true on each clip's own; all of them by default.

    Returns:
        (batch or 1, heads, positions, positions).
    """
    place = torch.arange(positions - tokens, device=slopes.device)
    distance = (place - place.unsqueeze(1)).abs().to(slopes.dtype)
    bias = -(slopes[:, None, None] * nn.functional.pad(distance, (tokens, 0, tokens, 0))).unsqueeze(0)
    if own is None:
        return bias
    visible = nn.functional.pad(own, (tokens, 0), value=True)[:, None, None]
    return bias.masked_fill(~visible, LEAST_SCORE)


def one_below_the_other(states: torch.Tensor, sizes: list[int], longest: int) -> torch.Tensor:
    """Clips one after the other (1, all, width) -> (batch, longest, width), zeros behind each."""
    rows = states[0].split(sizes)
    return torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])


def drop_path(branch: torch.Tensor, rate: float) -> torch.Tensor:
    """A branch (batch, frames, width) without some of the clips, the others scaled so that the mean stays: stochastic
    depth (https://arxiv.org/abs/1603.09382)."""
    if rate == 0:
        return branch
    kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= rate
    return branch * kept / (1 - rate)


class FusedWavLMAttention(WavLMAttention):
    """Self-attention with WavLM's gated relative position bias (https://arxiv.org/abs/2110.13900, section 3.1).

    transformers' own asks torch for the attention weights, which keeps it from the fast kernels, and depends on the
    batch's size in Python. This one gives no weights.
    """

    def forward(  # type: ignore[override]  # no weights
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        index: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        """
        Args:
            hidden_states: (batch, frames, width).
            attention_mask: (batch, frames), 1 or true on the clip's own.
            position_bias: (heads, frames, frames), which the first layer makes for all.

        Returns:
            (batch, frames, width), no weights, and the position bias.
        """
        if position_bias is None:
            position_bias = self.compute_bias(hidden_states.shape[1], hidden_states.shape[1])
        gates = self.gru_rel_pos_linear(self._by_head(hidden_states)).unflatten(-1, (2, 4)).sum(-1)
        update, reset = gates.sigmoid().chunk(2, dim=-1)
        bias = (update * (reset * self.gru_rel_pos_const - 1) + 2) * position_bias
        query, key, value = (self._by_head(part(hidden_states)) for part in (self.q_proj, self.k_proj, self.v_proj))
        bias = bias.to(query.dtype)
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask.ne(1)[:, None, None, :], torch.finfo(bias.dtype).min)
        dropout = self.dropout if self.training else 0.0
        heard = nn.functional.scaled_dot_product_attention(query, key, value, bias, dropout)
        return self.out_proj(heard.transpose(1, 2).flatten(2)), None, position_bias

    def _by_head(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, frames, width) -> (batch, heads, frames, width of a head)."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


@dataclass
class SailerModelOutput(ModelOutput):
    """
    embeddings (batch, hidden_size [+ text width]): the fused clip embedding that the heads see.
    hidden_states: with `output_hidden_states`, the speech encoder's, (batch, frames, width) each: its input embedding
    and every layer's output, the last as the encoder gives it.
    speech_means (batch, width): of the frames that the head sees, before a speaker's deviation is taken off.
    """

    embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    speech_means: torch.Tensor | None = None


@dataclass
class SailerClassifierOutput(ModelOutput):
    """
    loss (): plain KL divergence from `labels` to softmax(logits), or cross-entropy of class ids, if labels were given.
    logits (batch, labels); secondary_logits (batch, secondary labels); attributes (batch, 3): arousal, valence and
    dominance in [0, 1]; sex_logits (batch, 2); age (batch,) in years; embeddings, hidden_states and speech_means
    as in `SailerModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    secondary_logits: torch.Tensor | None = None
    attributes: torch.Tensor | None = None
    sex_logits: torch.Tensor | None = None
    age: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    speech_means: torch.Tensor | None = None


@dataclass
class SailerEnsembleOutput(SailerClassifierOutput):
    """
    What a system gives, and what the members gave: member_logits (batch, members, labels), member_secondary_logits
    (batch, members, secondary labels), member_attributes (batch, members, 3), member_sex_logits (batch, members, 2)
    and member_age (batch, members), each of the members that have the head, in order (`config.having`).
    embeddings are the members', one after the other.
    """

    member_logits: torch.Tensor | None = None
    member_secondary_logits: torch.Tensor | None = None
    member_attributes: torch.Tensor | None = None
    member_sex_logits: torch.Tensor | None = None
    member_age: torch.Tensor | None = None


def label_probabilities(config: Any, logits: torch.Tensor, prior: str) -> torch.Tensor:
    """`SailerForAudioClassification.probabilities` of a system with this configuration."""
    if prior == "balanced":
        return logits.float().softmax(-1)
    if prior != "natural":
        raise ValueError(f"prior is {prior!r}; choose 'balanced' or 'natural'.")
    if config.label_weights is None and config.target_weighting != "none":
        raise ValueError("prior='natural' needs the training weights, which this system's configuration lacks.")
    logits = logits.float()
    if config.label_weights is not None:
        weights = torch.tensor(config.label_weights, device=logits.device)
        logits = torch.where(weights > 0, logits - weights.clamp(min=1e-12).log(), -torch.inf)
    return (logits / config.calibration_temperature).softmax(-1)


def check_adaptable(model: Any) -> None:
    """Raises ValueError, which says why, where a system cannot be adapted to speakers."""
    if not isinstance(getattr(model, "sailer", None), nn.Module):
        raise ValueError(
            f"A {type(model).__name__} cannot be adapted to speakers: a single system in torch can (backend='torch'; "
            "of an ensemble, each member by itself)."
        )


def set_reference(
    model: Any, means: torch.Tensor, probabilities: torch.Tensor | None, speakers: Sequence[str]
) -> None:
    """Give a system the mean voice, see `SpeakerReference.fit`."""
    reference = SpeakerReference(means.shape[1], len(model.config.labels))
    reference.fit(means, probabilities, speakers)
    model.sailer.speaker_reference = reference.to(model.device)
    model.config.speaker_reference = True


def reference_of(model: Any) -> SpeakerReference:
    """What a system compares voices with.

    Raises:
        ValueError: it has none, or is no single system in torch; the message says what to do.
    """
    check_adaptable(model)
    reference = getattr(model.sailer, "speaker_reference", None)
    if reference is None:
        raise ValueError(
            "This system does not know the mean voice, which speakers are compared with: call "
            "learn_mean_voice(recordings, speakers) with recordings of several speakers, no labels needed."
        )
    return reference


def fingerprint(model: Any) -> str:
    """A digest of what statistics hold for: the choice of layers, and the mean voice that they gave."""
    reference, config = reference_of(model), model.config
    digest = hashlib.sha256(json.dumps([config.audio_config.model_type, config.audio_layers, config.labels]).encode())
    weights = getattr(model.sailer, "audio_layer_weights", None)
    for tensor in (reference.mean, reference.offsets, *(weights.parameters() if weights is not None else ())):
        # As exact as half precision, in which the same system may be loaded.
        digest.update(tensor.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the known clips of the KL divergence from distributions (batch, labels), or of the cross-entropy of
    class ids (batch,)."""
    logits = logits.float()
    if labels.ndim == 1 and not labels.is_floating_point():
        try:
            total = nn.functional.cross_entropy(logits, labels.long(), ignore_index=UNKNOWN_LABEL, reduction="sum")
        except IndexError as error:
            wrong = [label for label in labels.tolist() if label != UNKNOWN_LABEL and not 0 <= label < logits.shape[1]]
            raise ValueError(
                f"labels names class {wrong[0]}; the classes are 0 to {logits.shape[1] - 1}, and {UNKNOWN_LABEL} is "
                "unknown."
            ) from error
        return total / (labels != UNKNOWN_LABEL).sum().clamp(min=1)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels has the shape {tuple(labels.shape)} ({labels.dtype}): pass distributions of shape "
            f"{tuple(logits.shape)}, or class ids of shape {tuple(logits.shape[:1])}, which are whole numbers."
        )
    known = ~labels.isnan().any(-1, keepdim=True)
    targets = labels.nan_to_num()
    divergence = torch.xlogy(targets, targets) - targets * logits.log_softmax(-1)
    return (divergence * known).sum() / known.sum().clamp(min=1)


__all__ = [
    "AudioProjection",
    "FeedForward",
    "FrameConv1d",
    "FrameNorm",
    "FusedWavLMAttention",
    "LayerWeights",
    "PredictionHead",
    "SailerClassifierOutput",
    "SailerEnsembleOutput",
    "SailerModelOutput",
    "SpeakerReference",
    "SpeakerStatistics",
    "alibi_bias",
    "alibi_slopes",
    "check_adaptable",
    "drop_path",
    "fingerprint",
    "label_probabilities",
    "masked_mean",
    "one_below_the_other",
    "plain_loss",
    "pool_frames",
    "pool_states",
    "reference_of",
    "set_reference",
]
