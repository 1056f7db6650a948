"""Activation functions, elementwise but for softmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtimes.base import Array
from runtimes.mil.ops.elementwise import along, erf
from runtimes.mil.registry import op, register


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), by tanh, which does not overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    return np.logaddexp(np.float32(0), x)


def channels(alpha: Array, x: Array) -> Array:
    """A vector of one value a channel, so that it broadcasts along axis 1 of `x`."""
    return along(alpha, x, 1)


register(
    {
        "elu": lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(x)),
        "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
        "linear_activation": lambda x, alpha, beta: alpha * x + beta,
        "prelu": lambda x, alpha: np.where(x >= 0, x, channels(alpha, x) * x),
        "scaled_tanh": lambda x, alpha, beta: alpha * np.tanh(beta * x),
        "sigmoid": lambda x: sigmoid(x),
        "sigmoid_hard": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
        "silu": lambda x: x * sigmoid(x),
        "softplus": lambda x: softplus(x),
        "softplus_parametric": lambda x, alpha, beta: channels(alpha, x) * softplus(channels(beta, x) * x),
        "softsign": lambda x: x / (1 + np.abs(x)),
        "clamped_relu": lambda x, alpha, beta: np.minimum(beta, np.where(x >= 0, x, alpha * x)),
    }
)

register(
    {
        "relu": lambda x: np.maximum(x, 0),
        "relu6": lambda x: np.clip(x, 0, 6),
        "thresholded_relu": lambda x, alpha: np.where(x >= alpha, x, np.float32(0)),
    },
    moves=True,
)


@op("gelu")
def gelu(x: Array, mode: str = "EXACT") -> Array:
    """x times the normal distribution function, or one of two approximations of it."""
    if mode == "EXACT":
        return 0.5 * x * (1 + erf(x * np.float32(np.sqrt(0.5))))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(1.702 * x)
    raise ValueError(f"unknown mode {mode}")


@op("softmax")
def softmax(x: Array, axis: Any = -1) -> Array:
    """exp(x) over its sum along `axis`, shifted by the maximum; sums in fp32."""
    powers = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return powers / powers.sum(axis=int(axis), keepdims=True)
