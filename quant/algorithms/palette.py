"""Palettes: each weight an index into a small table, the table found by weighted k-means on a line.

Lloyd's iteration (IEEE Trans. Inf. Theory 28(2), 1982) with importance weights as in SqueezeLLM (arXiv 2306.07629).
It starts on levels that lie as densely as the cube root of the data's density, which is best for many levels (Panter
and Dite, Proc. IRE 39(1), 1951).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphs.errors import UserError
from quant.algorithms.distribution import Distribution
from quant.algorithms.inputs import Inputs, importance

ITERATIONS = 100
TOLERANCE = 1e-7  # of the largest level: no level moved further in an iteration that ends the search


@dataclass(frozen=True)
class Palette:
    """index [O, K] uint8 into table [O/g, 2^bits] float32, ascending; g output channels share a row of it."""

    index: Tensor
    table: Tensor

    def dequantized(self) -> Tensor:
        """float32 [O, K]."""
        shares = self.index.long().view(len(self.table), -1)
        return self.table.gather(1, shares).view(self.index.shape)


def palette(weight_OK: Tensor, bits: int, group_rows: int = 0, inputs: Inputs | None = None) -> Palette:
    """Tables of 2^bits levels, one for every `group_rows` output channels (0: one for all).

    Errors count by mean x^2 of the input that the weight reads, where `inputs` are given. Raises UserError where the
    rows do not divide the output channels.
    """
    outputs = len(weight_OK)
    rows = group_rows or outputs
    if outputs % rows:
        raise UserError(f"palettes of {rows} output channels do not divide {outputs}: choose from its divisors, or 0")
    weights_K = None if inputs is None else importance(inputs)
    tables, indices = [], []
    for part in weight_OK.float().split(rows):
        weights = None if weights_K is None else weights_K.expand_as(part)
        table = kmeans(Distribution.of(part, weights), 1 << bits)
        tables.append(table)
        indices.append(torch.bucketize(part, (table[1:] + table[:-1]) / 2).to(torch.uint8))
    return Palette(torch.cat(indices), torch.stack(tables))


def kmeans(values: Distribution, count: int) -> Tensor:
    """`count` ascending levels [count] float32 that locally minimise the squared distance. Deterministic."""
    levels = start(values, count)
    for _ in range(ITERATIONS):
        mass, first, _ = values.cells(levels)
        moved = torch.where(mass > 0, first / mass.clamp_min(torch.finfo(torch.float64).tiny), levels.double())
        moved = moved.float().sort().values
        done = bool((moved - levels).abs().max() <= TOLERANCE * levels.abs().max())
        levels = moved
        if done:
            break
    return levels


def start(values: Distribution, count: int) -> Tensor:
    """`count` values at equal steps of the integral of the cube root of the density."""
    ordered = values.values.double()
    stride = max(1, len(ordered) // (16 * count))  # cells of some values each, or the density is noise
    edges = torch.cat([ordered[:-1:stride], ordered[-1:]])
    width = edges.diff()
    if not width.sum() > 0:
        return ordered[:1].float().expand(count).clone()
    mass = torch.full_like(width, stride)
    steps = torch.cat([width.new_zeros(1), (mass.pow(1 / 3) * width.pow(2 / 3)).cumsum(0)])
    wanted = (torch.arange(count, dtype=torch.float64) + 0.5) / count * steps[-1]
    right = torch.searchsorted(steps, wanted).clamp(1, len(width))
    part = (wanted - steps[right - 1]) / (steps[right] - steps[right - 1]).clamp_min(torch.finfo(torch.float64).tiny)
    return (edges[right - 1] + part * width[right - 1]).float()
