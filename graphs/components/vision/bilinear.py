"""Feature maps resized to a fixed size, as products with constant matrices, which every target computes alike.

Shape suffixes: C channels, S and T sides before and after.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BilinearResize(nn.Module):
    """Maps [B, C, S, S] to [B, C, T, T] by bilinear interpolation between the centres of pixels, without smoothing."""

    weight_TS: Tensor

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after
        self.register_buffer("weight_TS", self.tables()["weight_TS"])

    def tables(self) -> dict[str, Tensor]:
        """How much of each pixel is in each new one, along one axis."""
        place = (torch.arange(self.after, dtype=torch.float64) + 0.5) * self.before / self.after - 0.5
        place = place.clamp(0, self.before - 1)
        distance = (place.unsqueeze(1) - torch.arange(self.before, dtype=torch.float64)).abs()
        return {"weight_TS": (1 - distance).clamp(min=0).float()}

    def forward(self, x_BCSS: Tensor) -> Tensor:
        return self.weight_TS @ x_BCSS @ self.weight_TS.transpose(0, 1)
