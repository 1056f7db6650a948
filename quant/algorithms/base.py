"""The grids that weights are rounded to, and the rounding itself; every algorithm chooses scales and calls this.

A weight is [O, K]: O output channels of K inputs each. With groups of G along K it is worked on as blocks
[O, K/G, G], with scales and zero points [O, K/G, 1]; one scale an output channel is the single block G = K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphs.errors import UserError
from quant.ops import FLOAT8, FLOAT8_MAX
from quant.scheme import WeightScheme

#: no scale is smaller: it stays above zero in half precision, too, so blocks of zeros divide by nothing that vanishes
SMALLEST_SCALE = 2.0**-24

#: elements of a weight worked on at once: 4 MiB a temporary
CHUNK = 1 << 20


@dataclass(frozen=True)
class QuantizedWeight:
    """q [O, K] int8 (or float8_e4m3fn) with its scale [O, K/G] float32 and zero_point, int8 of scale's shape or None.

    K/G is 1 where an output channel has one scale.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    def dequantized(self) -> Tensor:
        """(q - zero_point) * scale, float32 [O, K]."""
        outputs, groups = self.scale.shape
        blocks = self.q.float().view(outputs, groups, -1)
        if self.zero_point is not None:
            blocks = blocks - self.zero_point.float().unsqueeze(-1)
        return (blocks * self.scale.unsqueeze(-1)).view(self.q.shape)


def levels(bits: int) -> tuple[int, int]:
    """The lowest and highest integer of `bits` bits, both used by all grids."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def blocks(weight_OK: Tensor, group: int) -> Tensor:
    """[O, K] as float32 [O, K/G, G], a view where it can be. Raises UserError where `group` does not divide K."""
    outputs, inputs = weight_OK.shape
    if group and inputs % group:
        fits = [size for size in (32, 64, 128) if inputs % size == 0]
        raise UserError(
            f"groups of {group} do not divide {inputs} inputs: choose from "
            f"{', '.join(map(str, fits)) if fits else 'one scale an output channel'}"
        )
    return weight_OK.float().reshape(outputs, -1, group or inputs)


def least_scale(blocks_OnG: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor | None]:
    """The finest scale [O, n, 1] (and integral float zero point) whose grid covers every block from end to end.

    A symmetric grid has one negative level more than positive ones: a block whose largest magnitude is negative gets
    a finer scale for it.
    """
    low, high = levels(scheme.bits)
    if scheme.kind == "float8":
        return (blocks_OnG.abs().amax(-1, keepdim=True) / FLOAT8_MAX).clamp_min(SMALLEST_SCALE), None
    least = blocks_OnG.amin(-1, keepdim=True).clamp_max(0.0)
    most = blocks_OnG.amax(-1, keepdim=True).clamp_min(0.0)
    if not scheme.asymmetric:
        return torch.maximum(least / low, most / high).clamp_min(SMALLEST_SCALE), None
    scale = (most / (high - low) - least / (high - low)).clamp_min(SMALLEST_SCALE)
    return scale, (low - least / scale).round().clamp(low, high)


def encode(values: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme) -> Tensor:
    """The nearest grid points to `values` in units of `scale`, float32: integers, or what float8 can hold."""
    scaled = values / scale
    if scheme.kind == "float8":
        return scaled.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).float()
    low, high = levels(scheme.bits)
    scaled.round_()
    if zero_point is not None:
        scaled += zero_point
    return scaled.clamp_(low, high)


def decode(q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(q - zero_point) * scale for the float q of `encode`."""
    return (q if zero_point is None else q - zero_point) * scale


def pack(q: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme) -> QuantizedWeight:
    """Float q [O, n, G] or [O, K] with scale and zero point [O, n, 1] in the dtypes and shapes that are stored."""
    return QuantizedWeight(
        q.reshape(q.shape[0], -1).to(FLOAT8 if scheme.kind == "float8" else torch.int8),
        scale.squeeze(-1).float(),
        None if zero_point is None else zero_point.squeeze(-1).to(torch.int8),
    )


def by_rows(weight_OK: Tensor, quantize: Callable[[Tensor], QuantizedWeight], elements: int = CHUNK) -> QuantizedWeight:
    """What `quantize` makes of [O, K], given rows of so many elements at a time: temporaries stay small."""
    rows = max(1, elements // weight_OK.shape[1])
    if len(weight_OK) <= rows:
        return quantize(weight_OK)
    whole: dict[str, Tensor] = {}
    for start in range(0, len(weight_OK), rows):
        part = quantize(weight_OK[start : start + rows])
        for name, value in (("q", part.q), ("scale", part.scale), ("zero_point", part.zero_point)):
            if value is not None:
                if name not in whole:
                    whole[name] = torch.empty((len(weight_OK), *value.shape[1:]), dtype=value.dtype)
                whole[name][start : start + rows] = value
    return QuantizedWeight(**whole)


def round_blocks(blocks_OnG: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: WeightScheme) -> QuantizedWeight:
    """Every block rounded to the grid of its scale."""
    return pack(encode(blocks_OnG, scale, zero_point, scheme), scale, zero_point, scheme)
