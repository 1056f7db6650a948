"""Reading by index. An index out of range is an error here; Core ML leaves what happens undefined."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtimes.base import Array
from runtimes.mil.registry import op


def check(indices: Array, size: int) -> Array:
    """`indices` as int64. Raises IndexError where one is negative (undefined since iOS 17) or not below `size`."""
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        raise IndexError(f"indices {indices.min()}..{indices.max()} of {size}")
    return indices.astype(np.int64)


@op("gather", moves=True)
def gather(x: Array, indices: Array, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    """Slices of `x` along `axis`; the first `batch_dims` axes of `x` and `indices` go together."""
    where, batch = int(axis) % x.ndim, int(batch_dims)
    picks = check(indices, x.shape[where])
    if batch == 0:
        return np.take(x, picks, where)
    lead = x.shape[:batch]
    rows = [np.take(x[at], picks[at], where - batch) for at in np.ndindex(*lead)]
    return np.stack(rows).reshape(*lead, *rows[0].shape)


@op("gather_along_axis", moves=True)
def gather_along_axis(x: Array, indices: Array, axis: Any = 0, validate_indices: Any = False) -> Array:
    """For each place in `indices`, the element of `x` there but for `axis`, where the index says."""
    return np.take_along_axis(x, check(indices, x.shape[int(axis)]), int(axis))


@op("gather_nd", moves=True)
def gather_nd(x: Array, indices: Array, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    """Slices of `x` at the tuples of indices along the last axis of `indices`."""
    batch = int(batch_dims)
    for part, size in zip(np.moveaxis(indices, -1, 0), x.shape[batch:], strict=False):
        check(part, size)
    lead = x.shape[:batch]
    rows = [x[at][tuple(np.moveaxis(indices[at], -1, 0))] for at in np.ndindex(*lead)]
    return np.stack(rows).reshape(*lead, *rows[0].shape)
