"""Learned queries that attend to a tower's features, then a plain MLP: the connector of Aria (arXiv 2410.05993).

Shape suffixes: P pictures, N patches, Q queries, D width, A heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import gelu_tanh
from graphs.components.vision.clip import ClipVisionConfig


class QueryAttention(nn.Module):
    """Queries [P, Q, D] attend to features [P, N, D], each projected twice; `mask` [P, 1, 1, N] adds to the scores."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.layer_norm, self.layer_norm_kv = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_in, self.k_in, self.v_in, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.linear = nn.Linear(width, width)

    def forward(self, query_PQD: Tensor, x_PND: Tensor, mask: Tensor) -> Tensor:
        query_PQD, x_PND = self.layer_norm(query_PQD), self.layer_norm_kv(x_PND)
        projections = (
            (self.q_proj, self.q_in, query_PQD),
            (self.k_proj, self.k_in, x_PND),
            (self.v_proj, self.v_in, x_PND),
        )
        q_PAQK, k_PANK, v_PANK = (
            second(first(tokens)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for first, second, tokens in projections
        )
        out_PAQK = F.scaled_dot_product_attention(q_PAQK, k_PANK, v_PANK, attn_mask=mask)
        return self.linear(self.out_proj(out_PAQK.transpose(1, 2).flatten(2)))


class QueryMLP(nn.Module):
    """Two linear layers without biases around the tanh approximation of GELU."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(in_features, out_features, bias=False)
        self.linear_out = nn.Linear(out_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(gelu_tanh(self.linear_in(x)))


class QueryProjector(nn.Module):
    """Features [P, N, D] and their mask [P, 1, 1, N] to embeddings [P, Q, out]."""

    def __init__(self, config: ClipVisionConfig, queries: int, out_features: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, config.hidden_size))
        self.cross_attn = QueryAttention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.feed_forward = QueryMLP(config.hidden_size, out_features)

    def forward(self, x_PND: Tensor, mask: Tensor) -> Tensor:
        # Not expanded: Core ML cannot by an unknown number of pictures.
        query_PQD = x_PND[:, :1] * 0 + self.query
        return self.feed_forward(self.layer_norm(self.cross_attn(query_PQD, x_PND, mask)))
