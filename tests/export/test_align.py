"""Tokens are paired as an exhaustive search pairs them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from export.align import align
from runtimes.base import Array


def exhaustive(actual_KD: Array, expected_MD: Array, radius: float) -> float:
    """The largest sum of radius^2 - distance^2 over all pairings that do not cross."""
    unit = np.square(expected_MD).sum(1).mean()
    best = 0.0
    for count in range(1, min(len(actual_KD), len(expected_MD)) + 1):
        for left in combinations(range(len(actual_KD)), count):
            for right in combinations(range(len(expected_MD)), count):
                gains = radius**2 - np.square(actual_KD[list(left)] - expected_MD[list(right)]).sum(1) / unit
                best = max(best, float(gains.sum())) if (gains > 0).all() else best
    return best


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_best_of_all_pairings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool = rng.normal(size=(7, 3))
    kept, other = (np.sort(rng.choice(7, 5, replace=False)) for _ in range(2))
    expected = pool[kept]
    actual = pool[other] + rng.normal(size=(5, 3)) * 0.1
    radius = 0.9  # wide enough for pairs of neighbours
    found = align(actual, expected, radius)
    assert float((radius**2 - found).sum()) == pytest.approx(exhaustive(actual, expected, radius))


def test_one_of_them_exchanged_and_the_rest_in_order() -> None:
    tokens = np.eye(40)
    kept = [*range(0, 10), *range(11, 31)]
    assert np.array_equal(align(tokens[kept], tokens[:30], 0.1), np.zeros(29))


def test_what_is_no_pair() -> None:
    tokens = np.eye(6)
    assert len(align(tokens[::-1].copy(), tokens, 0.1)) == 1  # out of order
    assert len(align(np.repeat(tokens[:1], 6, 0), tokens, 0.1)) == 1  # one token, many times
    assert len(align(tokens * np.nan, tokens, 0.1)) == 0
    assert len(align(tokens, tokens * 0, 0.1)) == 0
    assert len(align(tokens * 1.2, tokens, 0.1)) == 0
    assert align(tokens * 1.05, tokens, 0.1) == pytest.approx(np.full(6, 0.05**2))
