"""WavLM whose attention is one call of torch's fast kernel: equal to transformers' own, faster, and one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import WavLMConfig, WavLMModel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention


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


class FusedWavLMModel(WavLMModel):
    """transformers' WavLM, its weights and configuration, with `FusedWavLMAttention`."""

    def __init__(self, config: WavLMConfig) -> None:
        super().__init__(config)
        for module in self.modules():
            if type(module) is WavLMAttention:
                module.__class__ = FusedWavLMAttention  # the same parts under the same names


__all__ = ["FusedWavLMAttention", "FusedWavLMModel"]
