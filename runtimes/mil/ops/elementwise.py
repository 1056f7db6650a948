"""Elementwise arithmetic, comparisons, logic, casts and selection, with numpy's broadcasting."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from runtimes.base import Array
from runtimes.mil.dtypes import BY_WORD, DTYPES, round_fp16
from runtimes.mil.registry import op, register


def erf(x: Array) -> Array:
    """The error function, which numpy lacks."""
    return torch.special.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def quotient(x: Array, y: Array) -> Array:
    """x / y; of integers the whole number towards zero, as coremltools has it of `real_div`."""
    whole = np.issubdtype(x.dtype, np.integer) and np.issubdtype(y.dtype, np.integer)
    return np.trunc(np.divide(x, y)).astype(x.dtype) if whole else np.divide(x, y)


register(
    {
        "acos": lambda x: np.arccos(x),
        "asin": lambda x: np.arcsin(x),
        "atan": lambda x: np.arctan(x),
        "atanh": lambda x: np.arctanh(x),
        "cos": lambda x: np.cos(x),
        "cosh": lambda x: np.cosh(x),
        "erf": lambda x: erf(x),
        "exp": lambda x: np.exp(x),
        "exp2": lambda x: np.exp2(x),
        "sin": lambda x: np.sin(x),
        "sinh": lambda x: np.sinh(x),
        "sqrt": lambda x: np.sqrt(x),
        "square": lambda x: np.square(x),
        "tan": lambda x: np.tan(x),
        "tanh": lambda x: np.tanh(x),
        "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
        "log": lambda x, epsilon=1e-45: np.log(x + epsilon),
        "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
        "add": lambda x, y: np.add(x, y),
        "sub": lambda x, y: np.subtract(x, y),
        "mul": lambda x, y: np.multiply(x, y),
        "real_div": lambda x, y: quotient(x, y),
        "floor_div": lambda x, y: np.floor_divide(x, y),
        "mod": lambda x, y: np.mod(x, y),
        "pow": lambda x, y: np.power(x, y),
    }
)

register(
    {
        "abs": lambda x: np.abs(x),
        "ceil": lambda x: np.ceil(x),
        "floor": lambda x: np.floor(x),
        "round": lambda x: np.rint(x),
        "sign": lambda x: np.sign(x),
        "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
        "threshold": lambda x, alpha: np.maximum(x, alpha),
        "maximum": lambda x, y: np.maximum(x, y),
        "minimum": lambda x, y: np.minimum(x, y),
        "equal": lambda x, y: np.equal(x, y),
        "not_equal": lambda x, y: np.not_equal(x, y),
        "greater": lambda x, y: np.greater(x, y),
        "greater_equal": lambda x, y: np.greater_equal(x, y),
        "less": lambda x, y: np.less(x, y),
        "less_equal": lambda x, y: np.less_equal(x, y),
        "logical_and": lambda x, y: np.logical_and(x, y),
        "logical_or": lambda x, y: np.logical_or(x, y),
        "logical_xor": lambda x, y: np.logical_xor(x, y),
        "logical_not": lambda x: np.logical_not(x),
        "identity": lambda x: x,
        "select": lambda cond, a, b: np.where(cond, a, b),
    },
    moves=True,
)


@op("cast", moves=True)
def cast(x: Array, dtype: str) -> Array:
    """`x` in another element type: floats towards zero to integers, integers wrapped, fp32 rounded to fp16."""
    held = DTYPES[BY_WORD[dtype]].held
    if dtype == "fp16":
        return round_fp16(x)
    if x.dtype.kind == "f" and np.dtype(held).kind in "iu":
        return np.trunc(x).astype(np.int64).astype(held)
    return np.asarray(x).astype(held)


@op("quantize")
def quantize(input: Array, scale: Array, output_dtype: str, zero_point: Any = None, axis: Any = None) -> Array:  # noqa: A002 (MIL names it so)
    """round(input / scale) + zero_point, clipped to `output_dtype`; `scale` a scalar or a vector along `axis`."""
    held = DTYPES[BY_WORD[output_dtype]].held
    shift = 0 if zero_point is None else along(zero_point, input, axis).astype(np.float32)
    info = np.iinfo(np.dtype(held).name)
    return np.clip(np.rint(input / along(scale, input, axis)) + shift, info.min, info.max).astype(held)


@op("dequantize")
def dequantize(input: Array, scale: Array, zero_point: Any = None, axis: Any = None) -> Array:  # noqa: A002 (MIL names it so)
    """(input - zero_point) * scale; `scale` a scalar or a vector along `axis`."""
    shift = 0 if zero_point is None else along(zero_point, input, axis).astype(np.float32)
    return (input.astype(np.float32) - shift) * along(scale, input, axis)


def along(vector: Array, x: Array, axis: Any) -> Array:
    """A scalar as it is; a vector shaped so that it broadcasts along `axis` of `x`."""
    if vector.ndim == 0 or axis is None:
        return vector
    shape = [1] * x.ndim
    shape[int(axis)] = -1
    return vector.reshape(shape)
