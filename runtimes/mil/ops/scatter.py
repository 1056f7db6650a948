"""Writing by index: into a copy, replacing or combining with what is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtimes.base import Array
from runtimes.mil.ops.gather import check
from runtimes.mil.registry import op

COMBINE: dict[str, Callable[..., None]] = {
    "add": np.add.at,
    "sub": np.subtract.at,
    "mul": np.multiply.at,
    "div": np.divide.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
    "update": lambda target, where, values: target.__setitem__(where, values),
}


@op("scatter")
def scatter(
    data: Array, indices: Array, updates: Array, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Array:
    """`updates` [data[:axis], *indices, data[axis+1:]] combined into slices of `data` along `axis`."""
    where = int(axis) % data.ndim
    picks = check(indices, data.shape[where])
    result = np.moveaxis(data.copy(), where, 0)
    moved = np.moveaxis(updates, range(where, where + picks.ndim), range(picks.ndim))
    COMBINE[mode](result, picks, moved)
    return np.moveaxis(result, 0, where)


@op("scatter_along_axis")
def scatter_along_axis(
    data: Array, indices: Array, updates: Array, axis: Any = 0, mode: str = "add", validate_indices: Any = False
) -> Array:
    """Each of `updates` combined into the place it has but for `axis`, where the index says."""
    where = int(axis) % data.ndim
    picks: list[Array] = list(np.indices(indices.shape))
    picks[where] = check(indices, data.shape[where])
    result = data.copy()
    COMBINE[mode](result, tuple(picks), updates)
    return result


@op("scatter_nd")
def scatter_nd(data: Array, indices: Array, updates: Array, mode: str = "add", validate_indices: Any = False) -> Array:
    """Each of `updates` combined into the slice of `data` that a tuple of indices names."""
    picks = np.moveaxis(indices, -1, 0)
    result = data.copy()
    COMBINE[mode](result, tuple(check(p, n) for p, n in zip(picks, data.shape, strict=False)), updates)
    return result
