"""Real handwritten digits: the 1797 images of 8x8 pixels that scikit-learn ships, in a train and a held-out part."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

Split = Literal["train", "heldout"]

HELDOUT_EVERY = 5


def indices(split: Split) -> np.ndarray:
    """Rows of `sklearn.datasets.load_digits` that belong to `split`: every fifth is held out. int64 [n]."""
    rows = np.arange(1797)
    held = rows % HELDOUT_EVERY == HELDOUT_EVERY - 1
    return rows[held] if split == "heldout" else rows[~held]


@cache
def load(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Ink of each digit (uint8 [n, 8, 8], 0 is paper and 255 is full ink) and its value (int64 [n])."""
    from sklearn.datasets import load_digits

    data = load_digits()
    rows = indices(split)
    return (data.images[rows] * (255 / 16)).astype(np.uint8), data.target[rows].astype(np.int64)
