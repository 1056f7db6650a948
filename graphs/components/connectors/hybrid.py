"""The connector of DeepSeek-VL's larger model (arXiv 2403.05525), which joins two towers of as many tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HybridProjector(nn.Module):
    """Features [B, N, in] and [B, N, high] to embeddings [B, N, out]: a half from each, the high one first, mixed."""

    def __init__(self, in_features: int, high_features: int, out_features: int) -> None:
        super().__init__()
        self.vision_proj = nn.Linear(in_features, out_features // 2)
        self.high_res_vision_proj = nn.Linear(high_features, out_features // 2)
        self.proj = nn.Linear(out_features // 2 * 2, out_features)

    def forward(self, x_BND: Tensor, high_BNE: Tensor) -> Tensor:
        halves = torch.cat([self.high_res_vision_proj(high_BNE), self.vision_proj(x_BND)], dim=-1)
        return self.proj(F.gelu(halves))
