"""Converters that vlmx adds to coremltools: an operator it lacks, and two whose own converters fall short.

Each takes coremltools' translation context and a node, and adds the MIL operators that compute it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch

from export.targets import coreml_quant


def index_copy(context: Any, node: Any) -> None:
    """`source` written into `x` at consecutive positions along `dim`, as one `slice_update` from the first position.

    A decoder's positions are consecutive by contract (`graphs.components.text.decoder`), and a slice is what Core ML
    updates in place in a state; coremltools has no converter for this operator.
    """
    from coremltools.converters import mil
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    mb = mil.Builder
    x, dim, index, source = _get_inputs(context, node, expected=4)
    axis = int(dim.val) % x.rank
    first = mb.slice_by_size(x=index, begin=[0], size=[1])
    after = mb.add(x=first, y=mb.shape(x=index))

    def corner(position: Any, others: list[int]) -> Any:
        before, behind = others[:axis], others[axis + 1 :]
        parts = [np.array(before, np.int32), position, np.array(behind, np.int32)]
        return mb.concat(values=[part for part in parts if part.shape != (0,)], axis=0)

    begin, end = corner(first, [0] * x.rank), corner(after, list(x.shape))
    context.add(mb.slice_update(x=x, update=source, begin=begin, end=end, name=node.name))


def rms_norm(context: Any, node: Any) -> None:
    """x / sqrt(mean(x^2) + eps) * weight, with every intermediate value within fp16's range.

    Squares overflow fp16 beyond 255, so x is divided by s = max(max|x|, sqrt(eps)) first, and eps by s^2. coremltools'
    own converter divides by max|x| alone, which gives NaN for a row of zeros, and leaves eps as it is, which is wrong
    for small rows.
    """
    from coremltools.converters import mil
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    mb = mil.Builder
    inputs = _get_inputs(context, node, min_expected=2)
    x, shape, weight, given = [*inputs, None, None][:4]
    eps = float(given.val) if given is not None else torch.finfo(torch.float32).eps
    axes = list(range(-len(shape.val), 0))
    largest = mb.reduce_max(x=mb.abs(x=x), axes=axes, keep_dims=True)
    scale = mb.maximum(x=largest, y=np.float32(math.sqrt(eps)))
    mean = mb.reduce_mean(x=mb.square(x=mb.real_div(x=x, y=scale)), axes=axes, keep_dims=True)
    floor = mb.square(x=mb.real_div(x=np.float32(math.sqrt(eps)), y=scale))
    root = mb.mul(x=scale, y=mb.sqrt(x=mb.add(x=mean, y=floor)))
    if weight is None:
        context.add(mb.real_div(x=x, y=root, name=node.name))
    else:
        context.add(mb.mul(x=mb.real_div(x=x, y=root), y=weight, name=node.name))


def where(context: Any, node: Any) -> None:
    """A choice between two numbers, the first spread to the condition's shape.

    coremltools infers the shape of `select` from the choices alone and fails on two numbers under a dynamic condition.
    """
    from coremltools.converters import mil
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    mb = mil.Builder
    choice = _get_inputs(context, node)
    if len(choice) == 3 and choice[1].rank == choice[2].rank == 0:
        cond, a, b = choice
        spread = mb.fill(shape=mb.shape(x=cond), value=a)
        context.add(mb.select(cond=cond, a=spread, b=b, name=node.name))
    else:
        originals()["where"](context, node)


CONVERTERS = {"index_copy": index_copy, "rms_norm": rms_norm, "where": where}


@cache
def originals() -> dict[str, Any]:
    """Register `CONVERTERS` with coremltools, once; what it had under their names.

    One name each suffices but for `where`, whose overloads with numbers coremltools tells apart.
    """
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY, register_torch_op

    for name, converter in coreml_quant.CONVERTERS.items():
        _TORCH_OPS_REGISTRY.set_func_by_name(converter, name)
    had = {name: _TORCH_OPS_REGISTRY.get_func(name) for name in CONVERTERS}
    for name, converter in CONVERTERS.items():
        overloads = ["where.scalarself", "where.scalarother"] if name == "where" else []
        register_torch_op(converter, torch_alias=overloads, override=True)
    return had
