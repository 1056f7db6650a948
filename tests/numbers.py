"""Measures that tests share."""

from __future__ import annotations

from torch import Tensor


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in double precision."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
