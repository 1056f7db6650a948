"""The pre-norm block with RMS norms and a gated MLP, as Pixtral's and AIMv2's towers have it.

Shape suffixes: B batch, T tokens, D width, A heads, K head width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.text.rotary import rotate


class GatedEncoderConfig(Protocol):
    """What a block must know; the configurations of towers have it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...


class GatedEncoderAttention(nn.Module):
    """Multi-head attention of tokens to themselves, turned by cosines and sines [T, K] where they are given."""

    def __init__(self, config: GatedEncoderConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, width, bias)
        self.v_proj = nn.Linear(width, width, bias)
        self.out_proj = nn.Linear(width, width, bias)

    def forward(self, x_BTD: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        q_BATK, k_BATK, v_BATK = (
            proj(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if turn is not None:
            q_BATK, k_BATK = rotate(q_BATK, *turn), rotate(k_BATK, *turn)
        out_BATK = F.scaled_dot_product_attention(q_BATK, k_BATK, v_BATK, attn_mask=mask)
        return self.out_proj(out_BATK.transpose(1, 2).flatten(2))


class GatedEncoderMLP(nn.Module):
    """The gated feed-forward network (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: GatedEncoderConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class GatedEncoderLayer(nn.Module):
    """A pre-norm block; `mask` is added to scores, `turn` are cosines and sines of rotary positions."""

    def __init__(self, config: GatedEncoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = GatedEncoderAttention(config)
        self.norm2 = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedEncoderMLP(config)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, turn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD), mask, turn)
        return x_BTD + self.mlp(self.norm2(x_BTD))


def layer_parameters(config: GatedEncoderConfig) -> int:
    """Parameters of one block."""
    width, inner = config.hidden_size, config.intermediate_size
    biases = 4 * width * config.attention_bias + (2 * inner + width) * config.mlp_bias
    return 4 * width * width + 3 * width * inner + biases + 2 * width
