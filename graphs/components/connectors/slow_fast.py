"""Two pathways over the embeddings of a video's frames (SlowFast-LLaVA, Xu et al., arXiv 2407.15841), without weights.

Shape suffixes: T frames, L frames of the slow pathway, N embeddings of a frame, P cells of the fast pathway, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def windows(size: int, cells: int) -> Tensor:
    """Weights [cells, size] of an adaptive average: a cell's window begins at a floor and ends at a ceiling."""
    weights = torch.zeros(cells, size)
    for cell in range(cells):
        start, stop = cell * size // cells, -(-(cell + 1) * size // cells)
        weights[cell, start:stop] = 1 / (stop - start)
    return weights


class SlowFastPool(nn.Module):
    """Embeddings [T, N, D] of square frames and which are seen in detail [L] (int64) to [1, L * (N / 2) + T * P, D].

    In detail, every two embeddings that follow each other become their maximum; all frames become `side` x `side`
    means. The means are a product with a table: windows that overlap, where `side` does not divide the grid, have no
    operator on every target.
    """

    means: Tensor

    def __init__(self, grid: int, side: int) -> None:
        super().__init__()
        self.grid, self.side = grid, side
        self.register_buffer("means", self.tables()["means"])

    @property
    def slow_tokens(self) -> int:
        """Embeddings of a frame seen in detail."""
        return self.grid**2 // 2

    def tables(self) -> dict[str, Tensor]:
        """The value of the buffer; asked for again where the module was built on fake tensors."""
        line_GS = windows(self.grid, self.side)
        return {"means": torch.kron(line_GS, line_GS)}

    def forward(self, x_TND: Tensor, slow_L: Tensor) -> Tensor:
        width = x_TND.shape[-1]
        detailed_LND = x_TND.index_select(0, slow_L)[:, : 2 * self.slow_tokens]
        pairs = detailed_LND.reshape(-1, 2, width)
        slow = torch.maximum(pairs[:, 0], pairs[:, 1])
        fast = (self.means @ x_TND).reshape(-1, width)
        return torch.cat([slow, fast]).unsqueeze(0)
