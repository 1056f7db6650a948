"""Operators that arrange values without computing: reshaping, joining, splitting, tiling, filling, padding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from runtimes.base import Array
from runtimes.mil.registry import ints, op, register


def target_shape(x: Array, shape: Any) -> tuple[int, ...]:
    """0 stands for the size of `x` at the same place counted from the right, 1 beyond it; -1 for what remains."""
    wanted = ints(shape)
    sizes = []
    for back, size in zip(range(len(wanted), 0, -1), wanted, strict=True):
        sizes.append(size if size else (x.shape[-back] if back <= x.ndim else 1))
    return tuple(sizes)


def squeeze(x: Array, axes: Any = None) -> Array:
    """`x` without the named axes of size one, or without all of them."""
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


def concat(values: tuple[Array, ...], axis: Any, interleave: Any = False) -> Array:
    """`values` joined along `axis`, or their slices along it taken in turns; scalars make a vector."""
    if values[0].ndim == 0:
        return np.stack(values)
    if not interleave:
        return np.concatenate(values, int(axis))
    woven = np.stack(values, int(axis) % values[0].ndim + 1)
    shape = list(values[0].shape)
    shape[int(axis)] *= len(values)
    return woven.reshape(shape)


def split(x: Array, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> tuple[Array, ...]:
    """`x` cut along `axis` into equal parts, or into parts of the given sizes."""
    if split_sizes is None:
        return tuple(np.split(x, int(num_splits), int(axis)))
    if sum(ints(split_sizes)) != x.shape[int(axis)]:
        raise ValueError(f"parts of {ints(split_sizes)} do not make up {x.shape[int(axis)]}")
    return tuple(np.split(x, np.cumsum(ints(split_sizes))[:-1], int(axis)))


def flatten2d(x: Array, axis: Any = 1) -> Array:
    """The axes before `axis` made one, and the others made one."""
    rows = math.prod(x.shape[: int(axis) % max(x.ndim, 1)])
    return x.reshape(rows, -1)


def reverse(x: Array, axes: Any = None) -> Array:
    """`x` backwards along `axes`, or along all."""
    return np.flip(x, None if axes is None else ints(axes))


def depth_to_space(x: Array, block_size: Any) -> Array:
    """[N, b*b*C, H, W] to [N, C, H*b, W*b], the block outermost among the channels."""
    b, (n, c, h, w) = int(block_size), x.shape
    return x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


def space_to_depth(x: Array, block_size: Any) -> Array:
    """[N, C, H*b, W*b] to [N, b*b*C, H, W], the block outermost among the channels."""
    b, (n, c, h, w) = int(block_size), x.shape
    return x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


def pixel_shuffle(x: Array, upscale_factor: Any) -> Array:
    """[N, C*r*r, H, W] to [N, C, H*r, W*r], the block innermost among the channels."""
    r, (n, c, h, w) = int(upscale_factor), x.shape
    return x.reshape(n, c // (r * r), r, r, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // (r * r), h * r, w * r)


def pixel_unshuffle(x: Array, downscale_factor: Any) -> Array:
    """[N, C, H*r, W*r] to [N, C*r*r, H, W], the block innermost among the channels."""
    r, (n, c, h, w) = int(downscale_factor), x.shape
    return x.reshape(n, c, h // r, r, w // r, r).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * r * r, h // r, w // r)


def pad(x: Array, pad: Any, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """The last axes of `x` padded by (before, after) pairs, with a value, reflected or replicated."""
    values = ints(pad)
    pairs = [(0, 0)] * (x.ndim - len(values) // 2) + list(zip(values[::2], values[1::2], strict=True))
    if mode == "constant":
        return np.pad(x, pairs, constant_values=constant_val)
    modes: dict[str, Any] = {"reflect": "reflect", "replicate": "edge"}
    return np.pad(x, pairs, mode=modes[mode])


def band_part(x: Array, lower: Any = -1, upper: Any = -1) -> Array:
    """The last two axes with zeros beyond `lower` diagonals below and `upper` above; -1 keeps all."""
    row, column = np.indices(x.shape[-2:])
    keep = ((int(lower) < 0) | (row - column <= int(lower))) & ((int(upper) < 0) | (column - row <= int(upper)))
    return np.where(keep, x, x.dtype.type(0))


def one_hot(indices: Array, one_hot_vector_size: Any, axis: Any = -1, on_value: Any = 1, off_value: Any = 0) -> Array:
    """`on_value` at each index along a new `axis`, `off_value` elsewhere."""
    hit = np.expand_dims(indices, int(axis))
    shape = [1] * hit.ndim
    shape[int(axis)] = -1
    return np.where(hit == np.arange(int(one_hot_vector_size)).reshape(shape), on_value, off_value)


def range_1d(end: Any, start: Any, step: Any) -> Array:
    """start, start + step, ... below `end`."""
    count = max(0, math.ceil((end - start) / step))
    return np.asarray(start + np.arange(count) * step, np.asarray(start).dtype)


register(
    {
        "reshape": lambda x, shape: x.reshape(target_shape(x, shape)),
        "expand_dims": lambda x, axes: np.expand_dims(x, ints(axes)),
        "squeeze": squeeze,
        "transpose": lambda x, perm: x.transpose(ints(perm)),
        "concat": concat,
        "stack": lambda values, axis: np.stack(values, int(axis)),
        "split": split,
        "tile": lambda x, reps: np.tile(x, ints(reps)),
        "flatten2d": flatten2d,
        "reverse": reverse,
        "shape": lambda x: np.array(x.shape, np.int32),
        "fill": lambda shape, value=0.0: np.full(ints(shape), value),
        "fill_like": lambda ref_tensor, value=0.0: np.full(ref_tensor.shape, value),
        "non_zero": lambda x: np.argwhere(x),
        "depth_to_space": depth_to_space,
        "space_to_depth": space_to_depth,
        "pixel_shuffle": pixel_shuffle,
        "pixel_unshuffle": pixel_unshuffle,
        "pad": pad,
        "band_part": band_part,
        "one_hot": one_hot,
    },
    moves=True,
)
op("range_1d")(range_1d)
