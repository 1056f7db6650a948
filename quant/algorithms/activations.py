"""Static scales of activations, from a sample of their values."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.algorithms.base import SMALLEST_SCALE, levels
from quant.algorithms.distribution import Distribution
from quant.ops import FLOAT8_MAX

#: parts of the range on either side that are tried; an asymmetric range tries each with each
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.12, 0.07, 0.04)


def grid(low: float, high: float, bits: int, asymmetric: bool) -> tuple[float, int]:
    """Scale and zero point of the finest grid that covers [low, high] and zero."""
    least, most = levels(bits)
    low, high = min(low, 0.0), max(high, 0.0)
    if not asymmetric:
        return max(low / least, high / most, SMALLEST_SCALE), 0
    scale = max((high - low) / (most - least), SMALLEST_SCALE)
    return scale, max(least, min(most, round(least - low / scale)))


def activation_range(
    values: Tensor, bits: int = 8, asymmetric: bool = True, bounds: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale (float32, rank 0) and zero point (int8, rank 0; None if symmetric) of least mean squared error on `values`.

    Clipping as in ACIQ (arXiv 1810.05723), by trying. `values` may be of any shape; `bounds` widen the range that is
    searched to extremes that were seen but not sampled. The error on each candidate grid is exact.
    """
    sample = Distribution.of(values)
    low, high = float(sample.values[0]), float(sample.values[-1])
    if bounds is not None:
        low, high = min(low, bounds[0]), max(high, bounds[1])
    lows = SHARES if asymmetric and low < 0 else (1.0,)
    highs = SHARES if asymmetric and high > 0 else (1.0,)
    pairs = [(low * a, high * b) for a in lows for b in highs] if asymmetric else [(low * a, high * a) for a in SHARES]
    candidates = [grid(*pair, bits, asymmetric) for pair in pairs]
    points = torch.arange(levels(bits)[0], levels(bits)[1] + 1, dtype=torch.float64)
    scale, zero = min(candidates, key=lambda found: sample.error((points - found[1]) * found[0]))
    return torch.tensor(scale), torch.tensor(zero, dtype=torch.int8) if asymmetric else None


def float8_scale(absmax: float | Tensor) -> Tensor:
    """Scale (float32, rank 0) that puts the largest magnitude on 448, the largest float8 e4m3.

    Floats keep their relative precision: clipping gains them nothing.
    """
    return (torch.as_tensor(absmax, dtype=torch.float32) / FLOAT8_MAX).clamp_min(SMALLEST_SCALE)
