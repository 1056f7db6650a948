"""Slices: reading one, and writing one into a copy."""

from __future__ import annotations

from typing import Any

from runtimes.base import Array
from runtimes.mil.registry import ints, op


def place(
    x: Array, begin: Any, end: Any, stride: Any, begin_mask: Any, end_mask: Any, squeeze_mask: Any
) -> tuple[slice | int, ...]:
    """MIL's slice as numpy's: masks leave an end open, or take one index and drop the axis."""
    rank = x.ndim
    steps = (1,) * rank if stride is None else ints(stride)
    open_begin, open_end, single = (
        (False,) * rank if mask is None else tuple(map(bool, mask)) for mask in (begin_mask, end_mask, squeeze_mask)
    )
    where: list[slice | int] = []
    for axis, (low, high) in enumerate(zip(ints(begin), ints(end), strict=True)):
        if single[axis]:
            where.append(low)
            continue
        step = steps[axis]
        first = None if open_begin[axis] else low
        last: int | None = None if open_end[axis] else high
        if step < 0 and last is not None and last < -x.shape[axis]:
            last = None  # an end before the beginning
        where.append(slice(first, last, step))
    return tuple(where)


@op("slice_by_index", moves=True)
def slice_by_index(
    x: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """x[begin:end:stride] on every axis; negative positions count from the end."""
    return x[place(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


@op("slice_by_size", moves=True)
def slice_by_size(x: Array, begin: Any, size: Any) -> Array:
    """`size` elements from `begin` on every axis; -1 takes the rest. Raises ValueError where they are not there."""
    where = []
    for length, first, count in zip(x.shape, ints(begin), ints(size), strict=True):
        low = first + length if first < 0 else first
        high = length if count == -1 else low + count
        if not 0 <= low <= high <= length:
            raise ValueError(f"a slice {low}..{high} of {length}")
        where.append(slice(low, high))
    return x[tuple(where)]


@op("slice_update", moves=True)
def slice_update(
    x: Array,
    update: Array,
    begin: Any,
    end: Any,
    stride: Any = None,
    begin_mask: Any = None,
    end_mask: Any = None,
    squeeze_mask: Any = None,
) -> Array:
    """A copy of `x` with `update` in the slice, whose shape it must have. Raises ValueError where it has not."""
    result = x.copy()
    where = place(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if result[where].shape != update.shape:
        raise ValueError(f"writes {list(update.shape)} to a slice of shape {list(result[where].shape)}")
    result[where] = update
    return result
