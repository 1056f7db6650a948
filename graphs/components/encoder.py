"""The pre-norm transformer block of CLIP's and SigLIP's towers, picture and text alike, named as Hugging Face does.

Shape suffixes: B batch, T tokens, D width, A heads, K head width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS


class AttentionConfig(Protocol):
    """What attention must know."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...


class EncoderConfig(AttentionConfig, Protocol):
    """What a block must know; the configurations of towers have it."""

    @property
    def intermediate_size(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


class EncoderAttention(nn.Module):
    """Multi-head attention of tokens to themselves or to `seen`, biases everywhere; `mask` is added to the scores."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        seen = x_BTD if seen is None else seen
        q_BATK, k_BATK, v_BATK = (
            proj(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj, tokens in ((self.q_proj, x_BTD), (self.k_proj, seen), (self.v_proj, seen))
        )
        out_BATK = F.scaled_dot_product_attention(q_BATK, k_BATK, v_BATK, attn_mask=mask)
        return self.out_proj(out_BATK.transpose(1, 2).flatten(2))


class EncoderMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_BTD)))


class EncoderLayer(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = EncoderAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = EncoderMLP(config)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD), mask)
        return x_BTD + self.mlp(self.layer_norm2(x_BTD))
