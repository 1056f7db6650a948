"""Numbers on a line with prefix sums: what a set of levels costs them is exact, in time that grows with the levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distribution:
    """Sorted values [N] (float32) and running sums [N + 1] (float64) of weight, weight * x and weight * x^2."""

    values: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None = None) -> Distribution:
        """Of `values` of any shape, each counting once or as `weights` of that shape say."""
        ordered, order = values.detach().float().flatten().sort()
        exact = ordered.double()
        mass = torch.ones_like(exact) if weights is None else weights.flatten()[order].double()
        return cls(ordered, running(mass), running(mass * exact), running(mass * exact.square()))

    def cells(self, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, weight * x and weight * x^2 of what is nearest to each of the ascending `levels` [L], float64."""
        middles = (levels[1:] + levels[:-1]) / 2
        inner = torch.searchsorted(self.values, middles.to(self.values.dtype))
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(self.values))])
        return tuple(sums[edges[1:]] - sums[edges[:-1]] for sums in (self.weight, self.first, self.second))  # type: ignore[return-value]

    def error(self, levels: Tensor) -> float:
        """Weighted mean squared distance to the nearest of the ascending `levels` [L]."""
        mass, first, second = self.cells(levels)
        exact = levels.double()
        total = (second - 2 * exact * first + exact.square() * mass).sum()
        return float(total.clamp_min(0) / self.weight[-1].clamp_min(torch.finfo(torch.float64).tiny))


def running(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... N values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
