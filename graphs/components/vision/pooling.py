"""From the features of a tower to one vector a picture.

Shape suffixes: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphs.components.encoder import EncoderAttention, EncoderConfig, EncoderMLP


class ClassPool(nn.Module):
    """States [B, T, D] to the normed class token [B, D], as CLIP pools (arXiv 2103.00020)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.post_layernorm(x_BTD[:, 0])


class AttentionPool(nn.Module):
    """Features [B, T, D] to [B, D]: a learned probe attends to all of them, as SigLIP pools (arXiv 2303.15343)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.probe = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.attention = EncoderAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = EncoderMLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        probe_B1D = self.probe.expand(x_BTD.shape[0], -1, -1)
        pooled_B1D = self.attention(probe_B1D, seen=self.post_layernorm(x_BTD))
        return (pooled_B1D + self.mlp(self.layernorm(pooled_B1D)))[:, 0]
