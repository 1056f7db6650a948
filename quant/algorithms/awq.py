"""AWQ (Lin et al., arXiv 2306.00978): scales inputs that matter up in the weights, and down in what feeds them.

The factors are a power of each input's mean magnitude, the power found by trying; then ranges are clipped where that
keeps the outputs nearer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphs.errors import UserError
from quant.algorithms import rtn
from quant.algorithms.base import SMALLEST_SCALE, QuantizedWeight, blocks, decode, encode, least_scale, round_blocks
from quant.algorithms.inputs import Inputs
from quant.algorithms.quantizer import Quantizer
from quant.scheme import WeightScheme

STEPS = 20
CLIPS = tuple(torch.linspace(1.0, 0.5, 21).tolist())
CHUNK = 1 << 22


def normalized(factors_K: Tensor) -> Tensor:
    """Positive factors around 1: over the root of the largest times the smallest, as in the paper's code."""
    positive = factors_K.clamp_min(1e-4)
    return positive / (positive.max() * positive.min()).sqrt()


def rescale(
    weights: Sequence[Tensor], scheme: WeightScheme, inputs: Inputs, quantizer: Quantizer = rtn.quantize
) -> Tensor:
    """Factors s [K] for weights [O, K] that read one input: quantize W * s, and divide x by s. 1 where nothing gains.

    Of s = (mean |x|)^alpha for alpha = 0, 1/20 ... 1, the one with the least error of all outputs together:
    |x W^T - (x / s) Q(W s)^T|^2, each weight counting as its outputs are many.
    """
    magnitude = inputs.absmean()
    seen = magnitude > 0
    magnitude = torch.where(seen, magnitude, magnitude[seen].mean() if bool(seen.any()) else torch.ones(()))
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(STEPS):
        factors = normalized((magnitude / magnitude.mean()).pow(step / STEPS))
        scaled = inputs.divided_by(factors)
        error = sum(
            inputs.output_error(quantizer(weight.float() * factors, scheme, scaled).dequantized() / factors - weight)
            for weight in weights
        )
        if error < least:
            best, least = factors, error
    return best


def clip(weight_OK: Tensor, scheme: WeightScheme, inputs: Inputs | None = None) -> QuantizedWeight:
    """Round to nearest with each block's range clipped where its share of the output, x_g W_g^T, comes nearer.

    AWQ's second search. Unlike `mse` it knows how the inputs of a block correlate. Raises UserError without rows or
    Hessian.
    """
    whole = blocks(weight_OK, scheme.group)
    cost = block_costs(inputs, whole.shape[1])
    found = []
    rows = max(1, CHUNK // weight_OK.shape[1])
    for chunk in whole.split(rows):
        least, zero = least_scale(chunk, scheme)
        best, best_error = least, torch.full_like(least, torch.inf)
        for ratio in CLIPS:
            scale = (least * ratio).clamp_min(SMALLEST_SCALE)
            delta = (decode(encode(chunk, scale, zero, scheme), scale, zero) - chunk).transpose(0, 1)  # [n, O, G]
            error = (torch.bmm(delta, cost) * delta).sum(-1).T.unsqueeze(-1)
            best = torch.where(error < best_error, scale, best)
            best_error = torch.minimum(error, best_error)
        found.append(round_blocks(chunk, best, zero, scheme))
    return QuantizedWeight(
        torch.cat([part.q for part in found]),
        torch.cat([part.scale for part in found]),
        torch.cat([part.zero_point for part in found if part.zero_point is not None]) if scheme.asymmetric else None,
    )


def block_costs(inputs: Inputs | None, groups: int) -> Tensor:
    """The Hessian's diagonal blocks [n, G, G]."""
    if inputs is None:
        raise UserError("clip needs the layer's inputs: calibrate with rows or the Hessian, or choose mse")
    if inputs.hessian_KK is None:
        rows = inputs.weighted_rows()
        parts = rows.view(len(rows), groups, -1).transpose(0, 1)
        return parts.transpose(1, 2) @ parts
    hessian = inputs.hessian_KK.float()
    size = len(hessian) // groups
    return torch.stack([hessian[i : i + size, i : i + size] for i in range(0, len(hessian), size)])
