"""The operators by which quantization lives in a traced graph: `torch.ops.vlmx.*`, run by torch and traced as they are.

Integers are int8 tensors holding one value a byte whatever their width; targets pack them. Shape suffixes: K the last
axis, G groups of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
INT8_MIN, INT8_MAX = -128, 127
#: the least scale: a block of zeros must not divide by zero
TINY = 1e-10


@custom_op("vlmx::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int) -> Tensor:
    """(q - zero_point) * scale in the dtype of `scale`.

    `q` int8 within [-2^(bits-1), 2^(bits-1)), or float8; `scale` and `zero_point` (int8) broadcast against it, or, with
    `group` G, have one entry for G elements of the last axis.
    """
    value = q.to(scale.dtype)  # the only temporary: heads have hundreds of millions of weights
    blocks = value.unflatten(-1, (-1, group)) if group else value
    for part, change in ((zero_point, blocks.sub_), (scale, blocks.mul_)):
        if part is not None:
            change(part.to(value.dtype).unsqueeze(-1) if group else part.to(value.dtype))
    return value


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


@custom_op("vlmx::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x / scale + zero_point, rounded half to even, saturating, as int8; or x / scale as float8. `scale` has rank 0."""
    scaled = x.float() / scale.float()  # as targets do: a quotient rounded to half precision is often a tie
    if dtype == FLOAT8:
        return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(dtype)
    shift = 0 if zero_point is None else zero_point.float()
    return (scaled.round() + shift).clamp(INT8_MIN, INT8_MAX).to(dtype)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


@custom_op("vlmx::quantize_per_token", mutates_args=())
def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric int8 over the last axis: q like x, scale [..., 1] in x's dtype, zero_point [..., 1] int8.

    The range of every row takes in zero, as in XNNPACK's qd8 and torchao's `choose_qparams_affine`.
    """
    low, high = (t.to(torch.float32) for t in (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (INT8_MAX - INT8_MIN)).clamp(min=TINY)
    zero = (INT8_MIN - (low / scale).round()).clamp(INT8_MIN, INT8_MAX)
    q = ((x.float() / scale).round() + zero).clamp(INT8_MIN, INT8_MAX)
    return q.to(torch.int8), scale.to(x.dtype), zero.to(torch.int8)


@quantize_per_token.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row = x.new_empty([*x.shape[:-1], 1])
    return torch.empty_like(x, dtype=torch.int8), row, torch.empty_like(row, dtype=torch.int8)


@custom_op("vlmx::quantize_per_block", mutates_args=())
def quantize_per_block(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 in blocks of `group` along the last axis: q like x, scale [..., K/G], the largest value at 127."""
    blocks = x.float().unflatten(-1, (-1, group))
    scale = (blocks.abs().amax(-1, keepdim=True) / INT8_MAX).clamp(min=TINY)
    q = (blocks / scale).round().clamp(INT8_MIN, INT8_MAX)
    return q.flatten(-2).to(torch.int8), scale.squeeze(-1).to(x.dtype)


@quantize_per_block.register_fake
def _(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty([*x.shape[:-1], x.shape[-1] // group])


@custom_op("vlmx::palette", mutates_args=())
def palette(index: Tensor, table: Tensor, bits: int) -> Tensor:
    """Weights [O, K] from `index` uint8 [O, K] into `table` [O/g, 2^bits]: g rows following one another share one."""
    rows = index.shape[0] // table.shape[0]
    return table.repeat_interleave(rows, dim=0).gather(1, index.long())


@palette.register_fake
def _(index: Tensor, table: Tensor, bits: int) -> Tensor:
    return torch.empty_like(index, dtype=table.dtype)
