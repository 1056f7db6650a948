"""Compressed weights, expanded when a program is loaded: quantised, palettised, sparse."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtimes.base import Array
from runtimes.mil.dtypes import BY_WORD, DTYPES, round_fp16
from runtimes.mil.ops.elementwise import along
from runtimes.mil.registry import ints, op


@op("constexpr_affine_dequantize")
def constexpr_affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Any) -> Array:
    """(data - zero_point) * scale, scalars or vectors along `axis`."""
    shift = along(zero_point.astype(np.float32), quantized_data, axis)
    return (quantized_data.astype(np.float32) - shift) * along(scale, quantized_data, axis)


@op("constexpr_cast")
def constexpr_cast(source_val: Array, output_dtype: str) -> Array:
    """The same values in another floating-point type."""
    return round_fp16(source_val) if output_dtype == "fp16" else source_val.astype(DTYPES[BY_WORD[output_dtype]].held)


def spread(x: Array, shape: tuple[int, ...]) -> Array:
    """One value a block repeated over its block of `shape`. Raises ValueError where blocks do not fit."""
    for axis, size in enumerate(shape):
        if size % x.shape[axis]:
            raise ValueError(f"blocks of {list(x.shape)} do not divide {list(shape)}")
        x = np.repeat(x, size // x.shape[axis], axis)
    return x


@op("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """(data - offset) * scale, with one scale and offset for each block of `data`."""
    shift = 0 if offset is None else spread(offset.astype(np.float32), data.shape)
    return (data.astype(np.float32) - shift) * spread(scale, data.shape)


@op("constexpr_lut_to_dense")
def constexpr_lut_to_dense(indices: Array, lut: Array, vector_axis: Any = None, shape: Any = None) -> Array:
    """Values from lookup tables.

    Since iOS 18 `lut` is [*groups, entries, width]: one table for each block of `indices`, whose entries are vectors
    laid along `vector_axis`. Before, it is one table of scalars, `indices` packed bits (first entry lowest) and `shape`
    the result's.
    """
    if shape is not None:
        bits = max(1, int(np.log2(lut.size)))
        flat = np.unpackbits(indices.view(np.uint8), bitorder="little")[: int(np.prod(shape)) * bits].reshape(-1, bits)
        return lut[flat @ (1 << np.arange(bits))].reshape(ints(shape))
    *groups, entries, width = lut.shape
    group = spread(np.arange(int(np.prod(groups))).reshape(groups), indices.shape)
    vectors = lut.reshape(-1, entries, width)[group, indices]
    if width == 1 or vector_axis is None:
        return vectors[..., 0]
    axis = int(vector_axis) % indices.ndim
    result = np.moveaxis(vectors, -1, axis + 1)
    return result.reshape(*indices.shape[:axis], -1, *indices.shape[axis + 1 :])


@op("constexpr_sparse_to_dense")
def constexpr_sparse_to_dense(nonzero_data: Array, mask: Array, shape: Any = None) -> Array:
    """`nonzero_data` in order where `mask` is set, else zero; before iOS 18 the mask is packed bits of `shape`."""
    if shape is not None:
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: int(np.prod(shape))]
        mask = bits.reshape(ints(shape))
    dense = np.zeros(mask.shape, nonzero_data.dtype)
    dense[mask != 0] = nonzero_data.reshape(-1)
    return dense
