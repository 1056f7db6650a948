"""Products of matrices, and attention, which is made of two."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtimes.base import Array
from runtimes.mil.ops.activations import softmax
from runtimes.mil.registry import Function, op


@op("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x W^T + b."""
    y = x @ weight.T
    return y if bias is None else y + bias


@op("matmul")
def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    """The product of the last two axes, the others broadcast."""
    return np.matmul(x.swapaxes(-1, -2) if transpose_x else x, y.swapaxes(-1, -2) if transpose_y else y)


@op("einsum")
def einsum(values: tuple[Array, ...], equation: str) -> Array:
    """Products and sums by an equation of indices."""
    return np.einsum(equation, *values, optimize=True)


@op("scaled_dot_product_attention", rounds=True)
def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, rounded: Function, attn_mask: Array | None = None
) -> Array:
    """softmax(Q K^T / sqrt(width) + mask) V; a boolean mask hides where it is False.

    Where it is fp16 the scores, the masked scores and the probabilities are rounded too, as those of the operators that
    it stands for: Core ML may fuse these and keep more digits.
    """
    scores = rounded(query @ key.swapaxes(-1, -2) / np.float32(np.sqrt(query.shape[-1])))
    if attn_mask is not None and attn_mask.dtype == np.bool_:
        scores = np.where(attn_mask, scores, np.float32(-np.inf))
    elif attn_mask is not None:
        scores = rounded(scores + attn_mask)
    return rounded(softmax(scores)) @ value
