"""SmoothQuant (Xiao et al., arXiv 2211.10438): moves outliers of activations into the weights that read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.algorithms import rtn
from quant.algorithms.activations import grid
from quant.algorithms.base import levels
from quant.algorithms.inputs import Inputs
from quant.algorithms.quantizer import Quantizer
from quant.scheme import WeightScheme

ALPHA = 0.5
#: tried with a sample; higher ones fit each channel to its largest in the sample, and lose on pictures not seen
ALPHAS = tuple(step / 10 for step in range(1, 8))
SMALLEST = 1e-5


def factors(absmax_K: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s_k = max|x_k|^alpha / max|W_k|^(1 - alpha), the weights' maximum over all that read x. 1 for a dead input."""
    largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    alive = (absmax_K > 0) & (largest > 0)
    scale = absmax_K.clamp_min(SMALLEST).pow(alpha) / largest.clamp_min(SMALLEST).pow(1 - alpha)
    return torch.where(alive, scale, torch.ones(())).clamp_min(SMALLEST)


def round_activations(rows_RK: Tensor) -> Tensor:
    """The rows as a static asymmetric int8 input over their whole range would give them."""
    scale, zero = grid(float(rows_RK.min()), float(rows_RK.max()), 8, asymmetric=True)
    low, high = levels(8)
    return ((rows_RK / scale).round().add(zero).clamp(low, high) - zero) * scale


def rescale(
    weights: Sequence[Tensor], scheme: WeightScheme, inputs: Inputs, quantizer: Quantizer = rtn.quantize
) -> Tensor:
    """Factors s [K] for weights [O, K] that read one input: quantize W * s, and divide x by s.

    With a sample of rows, alpha is the one of 0.1, 0.2 ... 0.7 whose quantized layer (int8 inputs, one static scale)
    gives the nearest outputs, or no rescaling where that is nearest; without one it is 0.5. Raises UserError
    without the inputs' largest magnitudes.
    """
    absmax = inputs.absmax()
    if inputs.rows_RK is None:
        return factors(absmax, weights, ALPHA)
    rows, root = inputs.rows_RK.float(), inputs.shares().sqrt()[:, None]
    wanted = [rows @ weight.float().T for weight in weights]

    def error(scale: Tensor) -> float:
        given, scaled = round_activations(rows / scale), inputs.divided_by(scale)
        results = (given @ quantizer(weight.float() * scale, scheme, scaled).dequantized().T for weight in weights)
        return sum(float(((result - want) * root).square().sum()) for result, want in zip(results, wanted, strict=True))

    candidates = [torch.ones_like(absmax), *(factors(absmax, weights, alpha) for alpha in ALPHAS)]
    return min(candidates, key=error)
