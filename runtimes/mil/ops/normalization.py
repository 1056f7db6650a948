"""Normalisation over axes, channels or batches; statistics in fp32."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtimes.base import Array
from runtimes.mil.ops.elementwise import along
from runtimes.mil.registry import ints, op


@op("layer_norm")
def layer_norm(
    x: Array, axes: Any = None, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5
) -> Array:
    """Zero mean and unit variance over `axes` (all by default), then scale and shift of their shape."""
    over = tuple(range(x.ndim)) if axes is None else tuple(axis % x.ndim for axis in ints(axes))
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    centred = x - x.mean(axis=over, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(axis=over, keepdims=True) + epsilon)
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


@op("batch_norm")
def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Any = 1e-5,
) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta, one value a channel (axis 1)."""
    scale = 1 / np.sqrt(variance + epsilon)
    scale = scale if gamma is None else scale * gamma
    y = (x - along(mean, x, 1)) * along(scale, x, 1)
    return y if beta is None else y + along(beta, x, 1)


@op("instance_norm")
def instance_norm(x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5) -> Array:
    """Zero mean and unit variance over the places of each channel, then scale and shift, one value a channel."""
    over = tuple(range(2, x.ndim))
    centred = x - x.mean(axis=over, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(axis=over, keepdims=True) + epsilon)
    y = y if gamma is None else y * along(gamma, x, 1)
    return y if beta is None else y + along(beta, x, 1)


@op("l2_norm")
def l2_norm(x: Array, epsilon: Any = 1e-6) -> Array:
    """x over the root of its sum of squares (plus epsilon) over the last three axes."""
    return x / np.sqrt(np.square(x).sum(axis=(-3, -2, -1), keepdims=True) + epsilon)
