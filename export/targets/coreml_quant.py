"""Converters from `vlmx.*` operators (`quant.ops`) to MIL's compressed weights and quantized activations.

Weights become `constexpr_*` operators of iOS 18: integers of 4 and 8 bits and indices into palettes lie packed in the
package, and Core ML expands them as it loads or runs the model. A layer whose input went through `quantize` and
`dequantize` and whose weight is an int8 `constexpr_blockwise_shift_scale` is the form that coremltools' own
`linear_quantize_activations` writes, and that Neural Engines since A17 Pro and M4 run in integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtimes.base import Array

Converter = Callable[[Any, Any], None]

#: names under which torch.export hands over the operators -> converters
CONVERTERS: dict[str, Converter] = {}


def converts(name: str) -> Callable[[Converter], Converter]:
    """Enter the decorated converter in the table."""

    def add(function: Converter) -> Converter:
        CONVERTERS[f"vlmx::{name}"] = function
        return function

    return add


def ranked(x: Array, rank: int) -> Array:
    """A scale of one number with as many axes of 1 as what it scales."""
    return x.reshape([1] * rank) if x.ndim == 0 else x


def packed(x: Array, bits: int, signed: bool) -> Array:
    """Integers marked as `bits` wide, the same memory, so that coremltools packs them when it writes the weights."""
    from coremltools.converters.mil.mil import types

    kind = types.string_to_builtin(f"{'int' if signed else 'uint'}{bits}")
    return x.view(types.nptype_from_builtin(kind))


@converts("dequantize")
def dequantize(context: Any, node: Any) -> None:
    """Of a weight, `constexpr_blockwise_shift_scale`; of an activation with one scale, `dequantize`."""
    from coremltools.converters import mil
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    mb = mil.Builder
    q, scale, zero, bits, _ = _get_inputs(context, node, expected=5)
    if q.val is None:
        given = {} if zero is None else {"zero_point": zero.val}
        context.add(mb.dequantize(input=q, scale=scale.val, **given, name=node.name))
        return
    width = int(bits.val)
    given = {} if zero is None else {"offset": packed(ranked(zero.val, q.rank), width, signed=True)}
    context.add(
        mb.constexpr_blockwise_shift_scale(
            data=packed(q.val, width, signed=True), scale=ranked(scale.val, q.rank), **given, name=node.name
        )
    )


@converts("quantize")
def quantize(context: Any, node: Any) -> None:
    """An activation to int8, with one scale."""
    from coremltools.converters import mil
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x, scale, zero, _ = _get_inputs(context, node, expected=4)
    given = {} if zero is None else {"zero_point": zero.val}
    context.add(mil.Builder.quantize(input=x, scale=scale.val, output_dtype="int8", **given, name=node.name))


@converts("palette")
def palette(context: Any, node: Any) -> None:
    """`constexpr_lut_to_dense`: a table for each group of rows, indices as wide as `bits`."""
    from coremltools.converters import mil
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    index, table, bits = _get_inputs(context, node, expected=3)
    tables, entries = table.shape
    lut = table.val.reshape(tables, *[1] * (index.rank - 1), entries, 1)
    indices = packed(index.val, int(bits.val), signed=False)
    context.add(mil.Builder.constexpr_lut_to_dense(indices=indices, lut=lut, name=node.name))
