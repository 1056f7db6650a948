"""Squares of patches as one wider token, then a projector: the connectors of Idefics 3 and of InternVL.

Idefics 3 (arXiv 2408.12637) projects by one layer, InternVL 1.5 and later (arXiv 2404.16821) by a norm and two.
"""

from __future__ import annotations

from torch import Tensor, nn

from graphs.components.connectors.mlp import MLPProjector


class PixelShuffle(nn.Module):
    """Features [P, G * G, D] of P square tiles to [1, P * (G / factor)^2, factor^2 * D], tile by tile, row by row.

    The channels of a square stand row by row, patch by patch.
    """

    def __init__(self, grid: int, factor: int, in_features: int) -> None:
        super().__init__()
        self.side, self.factor = grid // factor, factor
        self.line, self.width = in_features * factor, in_features * factor**2

    def forward(self, x_PND: Tensor) -> Tensor:
        lines = x_PND.reshape(-1, self.factor, self.side, self.line)  # rows of squares of all tiles, one after another
        return lines.transpose(1, 2).reshape(1, -1, self.width)


class PixelShuffleProjector(nn.Module):
    """Features [P, G * G, D] of P square tiles to embeddings [1, P * (G / factor)^2, out], tile by tile, row by row."""

    def __init__(self, grid: int, factor: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.shuffle = PixelShuffle(grid, factor, in_features)
        self.proj = nn.Linear(self.shuffle.width, out_features, bias=False)

    def forward(self, x_PND: Tensor) -> Tensor:
        return self.proj(self.shuffle(x_PND))


class PixelShuffleMLP(nn.Module):
    """As `PixelShuffleProjector`, but by a layer norm and two layers around an activation."""

    def __init__(self, grid: int, factor: int, in_features: int, out_features: int, activation: str) -> None:
        super().__init__()
        self.shuffle = PixelShuffle(grid, factor, in_features)
        self.layer_norm = nn.LayerNorm(self.shuffle.width)
        self.mlp = MLPProjector(self.shuffle.width, out_features, activation)

    def forward(self, x_PND: Tensor) -> Tensor:
        return self.mlp(self.layer_norm(self.shuffle(x_PND)))
