"""The connector of Idefics 2 (arXiv 2405.02246): a gated projection, then a perceiver resampler (Flamingo, 2204.14198).

Shape suffixes: P pictures, N patches, L latents, D width, A heads, G key-value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.stack import AlikeLayers


@dataclass(frozen=True)
class PerceiverConfig:
    """Field names are those of an Idefics2PerceiverConfig's JSON."""

    hidden_size: int = 4096
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    resampler_n_latents: int = 64
    resampler_depth: int = 3
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    num_key_value_heads: int = 4


class GatedProjection(nn.Module):
    """The gated feed-forward network (Shazeer, arXiv 2002.05202) between widths, without biases."""

    def __init__(self, in_features: int, inner: int, out_features: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_features, inner, bias=False)
        self.up_proj = nn.Linear(in_features, inner, bias=False)
        self.down_proj = nn.Linear(inner, out_features, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class PerceiverAttention(nn.Module):
    """Latents [P, L, D] attend to `context` [P, N, D] and to themselves; `mask` [P, 1, 1, N + L] adds to the scores."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        width, self.head_width = config.hidden_size, config.resampler_head_dim
        self.groups = config.resampler_n_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(width, config.resampler_n_heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(config.resampler_n_heads * self.head_width, width, bias=False)

    def forward(self, latents_PLD: Tensor, context_PND: Tensor, mask: Tensor) -> Tensor:
        seen_PND = torch.cat([context_PND, latents_PLD], dim=1)
        q_PLAK, k_PNGK, v_PNGK = (
            proj(tokens).unflatten(-1, (-1, self.head_width))
            for proj, tokens in ((self.q_proj, latents_PLD), (self.k_proj, seen_PND), (self.v_proj, seen_PND))
        )
        # Repeated before heads go first: behind that, tracing would ask how many keys there are.
        k_PNAK, v_PNAK = (torch.stack([t] * self.groups, dim=3).flatten(2, 3) for t in (k_PNGK, v_PNGK))
        q_PALK, k_PANK, v_PANK = (t.transpose(1, 2) for t in (q_PLAK, k_PNAK, v_PNAK))
        out_PALK = F.scaled_dot_product_attention(q_PALK, k_PANK, v_PANK, attn_mask=mask)
        return self.o_proj(out_PALK.transpose(1, 2).flatten(2))


class PerceiverLayer(nn.Module):
    """A pre-norm block over latents."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_latents_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.input_context_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.self_attn = PerceiverAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.mlp = GatedProjection(width, 4 * width, width, config.hidden_act)

    def forward(self, latents_PLD: Tensor, context_PND: Tensor, mask: Tensor) -> Tensor:
        context_PND = self.input_context_norm(context_PND)
        latents_PLD = latents_PLD + self.self_attn(self.input_latents_norm(latents_PLD), context_PND, mask)
        return latents_PLD + self.mlp(self.post_attention_layernorm(latents_PLD))


class PerceiverResampler(AlikeLayers):
    """Any number of features [P, N, D] to L latents [P, L, D]; `mask` [P, 1, 1, N] adds to the scores of features."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.ones(config.resampler_n_latents, config.hidden_size))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.resampler_depth))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, context_PND: Tensor, mask: Tensor) -> Tensor:
        latents_PLD = self.latents.unsqueeze(0).expand(context_PND.shape[0], -1, -1)
        mask = F.pad(mask, (0, self.latents.shape[0]))  # latents are always seen
        for layer in self.layers:
            latents_PLD = layer(latents_PLD, context_PND, mask)
        return self.norm(latents_PLD)
