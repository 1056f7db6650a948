"""Reductions, sorting and running sums. Sums are taken in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtimes.base import Array
from runtimes.mil.registry import Function, ints, op, register


def over(reduce: Callable[..., Array]) -> Function:
    """A numpy reduction with MIL's parameters: no axes means all of them."""

    def run(x: Array, axes: Any = None, keep_dims: Any = False) -> Array:
        return reduce(x, axis=None if axes is None else ints(axes), keepdims=bool(keep_dims))

    return run


def log_sum_exp(x: Array, axis: tuple[int, ...] | None, keepdims: bool) -> Array:
    """log(sum(exp(x))), shifted by the maximum."""
    top = x.max(axis=axis, keepdims=True)
    total = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return total if keepdims else total.squeeze(axis)


register(
    {
        "reduce_l1_norm": over(lambda x, **how: np.abs(x).sum(**how)),
        "reduce_l2_norm": over(lambda x, **how: np.sqrt(np.square(x).sum(**how))),
        "reduce_log_sum": over(lambda x, **how: np.log(x.sum(**how))),
        "reduce_log_sum_exp": over(log_sum_exp),
        "reduce_mean": over(lambda x, **how: x.mean(**how)),
        "reduce_prod": over(lambda x, **how: x.prod(**how)),
        "reduce_sum": over(lambda x, **how: x.sum(**how)),
        "reduce_sum_square": over(lambda x, **how: np.square(x).sum(**how)),
    }
)
register(
    {"reduce_max": over(lambda x, **how: x.max(**how)), "reduce_min": over(lambda x, **how: x.min(**how))}, moves=True
)


def where(find: Callable[..., Array]) -> Function:
    """argmax or argmin with MIL's parameters; the first of equals."""

    def run(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Array:
        return find(x, axis=int(axis), keepdims=bool(keep_dims))

    return run


register({"reduce_argmax": where(np.argmax), "reduce_argmin": where(np.argmin)}, moves=True)


@op("cumsum")
def cumsum(x: Array, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Array:
    """Running sum along `axis`, from its end where `reverse`, without the element itself where `exclusive`."""
    turned = np.flip(x, int(axis)) if reverse else x
    total = np.cumsum(turned, axis=int(axis), dtype=x.dtype)
    if exclusive:
        total = total - turned
    return np.flip(total, int(axis)) if reverse else total


@op("argsort", moves=True)
def argsort(x: Array, axis: Any = -1, ascending: Any = False) -> Array:
    """Indices that sort `x` along `axis`, descending unless told otherwise; equals keep their order."""
    if ascending:
        return np.argsort(x, axis=int(axis), kind="stable")
    # Turned around twice rather than negated, which unsigned integers do not survive.
    turned = np.argsort(np.flip(x, int(axis)), axis=int(axis), kind="stable")
    return x.shape[int(axis)] - 1 - np.flip(turned, int(axis))


@op("topk", moves=True)
def topk(
    x: Array,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> tuple[Array, ...]:
    """The `k` largest (smallest where `ascending`) along `axis`, always sorted, and their indices; -1 takes all."""
    size = x.shape[int(axis)]
    order = argsort(x, axis, ascending).take(np.arange(size if int(k) == -1 else int(k)), axis=int(axis))
    values = np.take_along_axis(x, order, int(axis))
    return (values, order) if return_indices else (values,)
