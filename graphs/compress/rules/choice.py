"""Shared parts of rules: choosing tokens by constant or computed indices, always in raster order.

Shape suffixes: N tokens, M kept, D width. Everything is `topk`, `argmax`, `index_select` and arithmetic with constant
sizes, which all targets take; ties go to the earlier token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Keep(nn.Module):
    """A rule that keeps `keep` of `count` tokens; `place` int64 [1, N] is 0, 1, ..., N - 1."""

    place: Tensor

    def __init__(self, count: int, keep: int) -> None:
        super().__init__()
        self.count = count
        self.keep = keep
        self.register_buffer("place", torch.arange(count)[None])

    def places(self, count: int) -> Tensor:
        """The first `count` places; a slice of all would leave an operator behind that Core ML lacks."""
        return self.place if count == self.count else self.place[:, :count]

    def raster(self, chosen_1N: Tensor, keep: int) -> Tensor:
        """Indices int64 [keep] of the first `keep` true elements, ascending; there may be fewer than `count` of all."""
        count = chosen_1N.shape[1]
        return torch.topk(chosen_1N.to(torch.int64) * (count - self.places(count)), keep).indices.flatten()

    def highest(self, scores_1N: Tensor, keep: int) -> Tensor:
        """Which elements are the `keep` highest, as bool [1, N]; more of them where the lowest is tied."""
        return scores_1N >= torch.topk(scores_1N, keep).values[:, -1:]


class KeepConstant(nn.Module):
    """Tokens [1, N, D] to those at `index` int64 [M], fixed at compile time."""

    index: Tensor

    def __init__(self, index_M: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index_M)

    def forward(self, x_1ND: Tensor) -> Tensor:
        return torch.index_select(x_1ND, 1, self.index)
