"""Clipping ranges by search: of a grid of scales, each block takes the one with the least squared error.

As in ACIQ (arXiv 1810.05723) and OMSE (arXiv 1902.06822), by trying. Errors are weighted by mean x^2 of the inputs
where that is known: the diagonal of the layer's Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.algorithms.base import (
    CHUNK,
    SMALLEST_SCALE,
    QuantizedWeight,
    blocks,
    by_rows,
    decode,
    encode,
    least_scale,
    round_blocks,
)
from quant.algorithms.inputs import Inputs, importance
from quant.scheme import WeightScheme

#: scales tried, as parts of the one that just covers a block; zero points are rounded, so a wider one can win, too
RATIOS = tuple(torch.linspace(1.05, 0.35, 29).tolist())


def quantize(weight_OK: Tensor, scheme: WeightScheme, inputs: Inputs | None = None) -> QuantizedWeight:
    """The weight rounded to the grids that `search` finds. Raises UserError where the group does not divide K."""
    weights_K = None if inputs is None else importance(inputs)

    def rows(some_OK: Tensor) -> QuantizedWeight:
        whole = blocks(some_OK, scheme.group)
        return round_blocks(whole, *search(whole, scheme, weights_K), scheme)

    return by_rows(weight_OK, rows)


def search_by_rows(blocks_OnG: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """`search`, unweighted, over some rows at a time: temporaries stay in the cache."""
    rows = max(1, CHUNK // blocks_OnG[0].numel())
    found = [search(some, scheme) for some in blocks_OnG.split(rows)]
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def search(
    blocks_OnG: Tensor, scheme: WeightScheme, importance_K: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point [O, n, 1] of least squared error, found for each block by itself.

    importance_K [n * G] weighs the errors of a block against each other.
    """
    _, groups, size = blocks_OnG.shape
    weights = torch.ones(1, groups, size) if importance_K is None else importance_K.view(1, groups, size)
    least, zero = least_scale(blocks_OnG, scheme)
    best, best_error = least, torch.full_like(least, torch.inf)
    for ratio in RATIOS:
        scale = (least * ratio).clamp_min(SMALLEST_SCALE)
        difference = decode(encode(blocks_OnG, scale, zero, scheme), scale, zero).sub_(blocks_OnG)
        error = difference.square_().mul_(weights).sum(-1, keepdim=True)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return best, zero
