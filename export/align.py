"""Tokens of one output set beside those of another that may hold other ones in between, both in raster order.

Shape suffixes: K tokens of the one, M of the other, D width.
"""

from __future__ import annotations

import numpy as np

from runtimes.base import Array


def align(actual_KD: Array, expected_MD: Array, radius: float) -> Array:
    """Squared distances, float64 [pairs], of the tokens that are the same in both, in order.

    Two tokens are the same where they are at most `radius` apart, in units of the root mean square norm of the expected
    ones. Each is paired once at most, and pairs never cross: of all such pairings this is the one whose sum of
    radius^2 - distance^2 is largest (Needleman & Wunsch, 1970, without a price for gaps).
    """
    actual_KD, expected_MD = actual_KD.astype(np.float64), expected_MD.astype(np.float64)
    unit = float(np.square(expected_MD).sum(1).mean())
    count, other = len(actual_KD), len(expected_MD)
    if not unit or not np.isfinite(actual_KD).all():
        return np.zeros(0)
    far_KM = np.stack([np.square(token_D - expected_MD).sum(1) for token_D in actual_KD]) / unit
    gain_KM = np.maximum(radius**2 - far_KM, 0)
    best = np.zeros((count + 1, other + 1))  # of the tokens before each place
    for i, gain_M in enumerate(gain_KM):
        paired_M = np.maximum(best[i, 1:], best[i, :-1] + gain_M)
        best[i + 1, 1:] = np.maximum.accumulate(paired_M)
    pairs, i, j = [], count, other
    while i and j:
        if best[i, j] == best[i, j - 1]:
            j -= 1
        elif best[i, j] == best[i - 1, j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append(far_KM[i, j])
    return np.array(pairs[::-1])
