"""The connector of PaliGemma (Beyer et al., arXiv 2407.07726): one linear layer."""

from __future__ import annotations

from torch import Tensor, nn


class LinearProjector(nn.Module):
    """Features [B, N, in] to embeddings [B, N, out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.linear(x_BND)
