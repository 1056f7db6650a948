"""Convolution, pooling and resizing by torch's CPU kernels, in fp32; padding is ours, as Core ML defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from runtimes.base import Array
from runtimes.mil.registry import ints, op

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def tensor(x: Array) -> Tensor:
    """A numpy array as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(x))


def padding(
    kind: str, pad: Any, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) for each spatial axis. `same` gives ceil(size / stride) places, the odd one after the image."""
    if kind == "custom":
        values = ints(pad)
        return list(zip(values[::2], values[1::2], strict=True))
    if kind == "valid":
        return [(0, 0)] * len(kernel)
    if kind not in {"same", "same_lower"}:
        raise ValueError(f"unknown padding {kind}")
    pairs = []
    for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        total = max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
        low = total // 2 if kind == "same" else total - total // 2
        pairs.append((low, total - low))
    return pairs


def padded(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`x` with its trailing axes padded."""
    return F.pad(x, [size for pair in reversed(pads) for size in pair], value=value)


@op("conv")
def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """Convolution of [N, C, *places] with [out, C / groups, *kernel]."""
    kernel = weight.shape[2:]
    ones = (1,) * len(kernel)
    stride, dilation = (ints(given) if given is not None else ones for given in (strides, dilations))
    pads = padding(pad_type, pad, x.shape[2:], kernel, stride, dilation)
    b = None if bias is None else tensor(bias)
    y = CONV[len(kernel)](padded(tensor(x), pads), tensor(weight), b, stride, 0, dilation, int(groups))
    return y.numpy()


@op("conv_transpose")
def conv_transpose(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    pad: Any = None,
    output_shape: Any = None,
    pad_type: str = "valid",
    strides: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """The transpose of a convolution with [C, out / groups, *kernel]; padding is cut off, `output_shape` extends."""
    kernel = weight.shape[2:]
    ones = (1,) * len(kernel)
    stride, dilation = (ints(given) if given is not None else ones for given in (strides, dilations))
    full = CONV_TRANSPOSE[len(kernel)](tensor(x), tensor(weight), None, stride, 0, 0, int(groups), dilation)
    if pad_type in {"same", "same_lower"}:
        wanted = [size * s for size, s in zip(x.shape[2:], stride, strict=True)]
        pads = padding(pad_type, pad, wanted, kernel, stride, dilation)
    else:
        pads = padding(pad_type, pad, x.shape[2:], kernel, stride, dilation)
        wanted = [size - low - high for size, (low, high) in zip(full.shape[2:], pads, strict=True)]
    if output_shape is not None:
        wanted = list(ints(output_shape)[-len(kernel) :])
    for axis, (size, (low, _)) in enumerate(zip(wanted, pads, strict=True), start=2):
        short = max(0, low + size - full.shape[axis])
        if short:
            full = torch.cat([full, full.new_zeros(*full.shape[:axis], short, *full.shape[axis + 1 :])], axis)
        full = full.narrow(axis, low, size)
    return (full if bias is None else full + tensor(bias).reshape(-1, *ones)).numpy()


def windows(
    x: Array, kernel_sizes: Any, strides: Any, pad_type: str, pad: Any, ceil_mode: Any
) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, int]], list[tuple[int, int]]]:
    """Kernel, stride, padding, and what `ceil_mode` adds after that so that the last window fits."""
    kernel = ints(kernel_sizes)
    stride = ints(strides) if strides is not None else kernel
    pads = padding(pad_type, pad, x.shape[2:], kernel, stride, (1,) * len(kernel))
    extra = [0] * len(kernel)
    if ceil_mode:
        for axis, (k, s, (low, high)) in enumerate(zip(kernel, stride, pads, strict=True)):
            size = x.shape[2 + axis]
            steps = -(-(size + low + high - k) // s)
            if steps * s >= size + low:  # a window must begin within the image or its padding before
                steps -= 1
            extra[axis] = max(0, steps * s + k - size - low - high)
    return kernel, stride, pads, [(0, size) for size in extra]


def window_sum(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The sum of each window, by a convolution with ones."""
    flat = x.reshape(-1, 1, *x.shape[2:])
    total = CONV[len(kernel)](flat, torch.ones(1, 1, *kernel), stride=stride)
    return total.reshape(*x.shape[:2], *total.shape[2:])


@op("avg_pool")
def avg_pool(
    x: Array,
    kernel_sizes: Any,
    pad_type: str,
    strides: Any = None,
    pad: Any = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
) -> Array:
    """The mean of each window; padding counts unless excluded, what `ceil_mode` adds never does."""
    kernel, stride, pads, extra = windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    image = tensor(x)
    counted = padded(torch.ones_like(image[:1, :1]), pads, 0.0 if exclude_padding_from_average else 1.0)
    total = window_sum(padded(padded(image, pads), extra), kernel, stride)
    return (total / window_sum(padded(counted, extra), kernel, stride)).numpy()


@op("max_pool", moves=True)
def max_pool(
    x: Array, kernel_sizes: Any, pad_type: str, strides: Any = None, pad: Any = None, ceil_mode: Any = False
) -> Array:
    """The maximum of each window; padding never wins."""
    kernel, stride, pads, extra = windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    low = float("-inf")
    return MAX_POOL[len(kernel)](padded(padded(tensor(x), pads, low), extra, low), kernel, stride).numpy()


@op("l2_pool")
def l2_pool(
    x: Array, kernel_sizes: Any, pad_type: str, strides: Any = None, pad: Any = None, ceil_mode: Any = False
) -> Array:
    """The root of the sum of squares of each window."""
    kernel, stride, pads, extra = windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    return window_sum(padded(padded(tensor(x), pads), extra).square(), kernel, stride).sqrt().numpy()


@op("upsample_nearest_neighbor", moves=True)
def upsample_nearest_neighbor(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    """The last two axes enlarged by repeating."""
    factors = (float(scale_factor_height), float(scale_factor_width))
    return F.interpolate(tensor(x), scale_factor=factors, mode="nearest").numpy()


@op("upsample_bilinear")
def upsample_bilinear(
    x: Array,
    scale_factor_height: Any = 1,
    scale_factor_width: Any = 1,
    align_corners: Any = True,
    half_pixel_centers: Any = None,
) -> Array:
    """The last two axes enlarged linearly, corners aligned or half-pixel centres."""
    if half_pixel_centers is not None and bool(half_pixel_centers) == bool(align_corners):
        raise ValueError("align_corners and half_pixel_centers must differ")
    factors = (float(scale_factor_height), float(scale_factor_width))
    size = [int(n * f) for n, f in zip(x.shape[-2:], factors, strict=True)]
    return F.interpolate(tensor(x), size, mode="bilinear", align_corners=bool(align_corners)).numpy()
