"""The operators, one family a file; importing this package fills the table."""

from runtimes.mil.ops import (
    activations,
    attention,
    constexpr,
    control,
    convolution,
    elementwise,
    gather,
    normalization,
    reductions,
    scatter,
    shapes,
    slices,
    states,
)
from runtimes.mil.registry import OPERATORS

__all__ = [
    "OPERATORS",
    "activations",
    "attention",
    "constexpr",
    "control",
    "convolution",
    "elementwise",
    "gather",
    "normalization",
    "reductions",
    "scatter",
    "shapes",
    "slices",
    "states",
]
