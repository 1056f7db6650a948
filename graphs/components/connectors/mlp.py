"""The two-layer projector of LLaVA 1.5 (Liu et al., arXiv 2310.03744)."""

from __future__ import annotations

from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS


class MLPProjector(nn.Module):
    """Features [B, N, in] to embeddings [B, N, out]: linear, activation, linear."""

    def __init__(self, in_features: int, out_features: int, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features, bias)
        self.linear_2 = nn.Linear(out_features, out_features, bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x_BND)))
