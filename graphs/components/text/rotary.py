"""Rotary position embeddings (Su et al., arXiv 2104.09864), the half-split layout that Hugging Face weights use.

Shape suffixes: C positions, S tokens, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """Positions [S] (int64) to cosines and sines [S, K], looked up.

    A table rather than arithmetic in the graph: an angle computed in fp16 is off by a radian at position 2000.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, positions: int, theta: float) -> None:
        super().__init__()
        self.head_width, self.positions, self.theta = head_width, positions, theta
        for name, table_CK in self.tables().items():
            self.register_buffer(name, table_CK)

    def tables(self) -> dict[str, Tensor]:
        """The values of the buffers; asked for again where the module was built on fake tensors."""
        exponent = torch.arange(0, self.head_width, 2, dtype=torch.float64) / self.head_width
        angle = torch.outer(torch.arange(self.positions, dtype=torch.float64), self.theta**-exponent)
        angle_CK = torch.cat([angle, angle], dim=1)
        return {"cos": angle_CK.cos().float(), "sin": angle_CK.sin().float()}

    def forward(self, position_S: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos.index_select(0, position_S), self.sin.index_select(0, position_S)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + K/2) of the last axis of `x` by the angles whose cosines and sines broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
