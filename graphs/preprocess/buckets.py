"""Positions of patches in a learned square table that pictures of any shape share (Idefics 2, arXiv 2405.02246)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bucketed(rows: int, columns: int, side: int) -> NDArray[np.int64]:
    """Ids [rows * columns] in a table of `side` x `side` for the patches of a picture, row by row.

    Each patch takes the cell that its upper left corner, as a fraction of the picture, falls into. In float32, as in
    transformers: whether a fraction reaches the next cell is decided by its last bit.
    """
    step = 1 / side
    edges = (step + np.arange(np.ceil((1.0 - step) / step)) * step).astype(np.float32)

    def cells(count: int) -> NDArray[np.int64]:
        fraction = np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count))
        return np.searchsorted(edges, np.minimum(fraction, np.float32(1 - 1e-6)), side="right").astype(np.int64)

    return (cells(rows)[:, None] * side + cells(columns)).reshape(-1)
