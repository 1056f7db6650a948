"""KOSMOS-2's resampler (arXiv 2306.14824): latent queries attend once to a picture's features and to themselves.

Shape suffixes: B batch, T tokens of the tower, Q queries, D width of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphs.components.dual import unit
from graphs.components.encoder import AttentionConfig, EncoderAttention, EncoderConfig


class LatentResampler(nn.Module):
    """Last states [B, T, C] of a tower to embeddings [B, Q, D]: normed to unit length, resampled, times `scale`.

    `text`: the decoder, whose width and heads attention has.
    """

    def __init__(self, vision: EncoderConfig, text: AttentionConfig, queries: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, vision.layer_norm_eps)
        self.dense = nn.Linear(vision.hidden_size, text.hidden_size)
        self.latent_query = nn.Parameter(torch.zeros(queries, text.hidden_size))
        self.x_attn = EncoderAttention(text)

    def forward(self, x_BTC: Tensor) -> Tensor:
        features_BTD = self.dense(unit(self.post_layernorm(x_BTC)))
        query_BQD = self.latent_query.expand(x_BTC.shape[0], -1, -1)
        resampled_BQD = self.x_attn(query_BQD, seen=torch.cat([features_BTD, query_BQD], dim=1))
        return resampled_BQD * self.scale
