"""Nodes of the domain `vlmx` in standard ONNX (opset 21): QuantizeLinear, DequantizeLinear, and plain arithmetic.

Weights become DequantizeLinear with one scale a channel or a block, in the layout that their reader wants, packed two a
byte where they have 4 bits or 3; what is quantized with scales from the graph itself becomes arithmetic, since the
standard's DynamicQuantizeLinear knows one scale a tensor only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from export.targets.onnx_quant_ops import DOMAIN, attribute, inputs_of
from export.targets.onnx_weights import derived, is_weight
from quant.ops import INT8_MAX, INT8_MIN, TINY

FLOAT, INT8, INT4 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT4


def standardize(model: ir.Model) -> None:
    """Spell every node of the domain `vlmx` in standard ONNX."""
    for node in list(model.graph):
        if node.domain == DOMAIN:
            spelled = Spelling(model.graph, node)
            SPELLINGS[node.op_type](spelled, node)
    model.opset_imports.pop(DOMAIN, None)


class Spelling:
    """What replaces one node: nodes are recorded, then put in its place."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.tape = graph, node, ir.tape.Tape()

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One more node with one output."""
        return self.tape.op(kind, inputs, attributes, domain=domain)

    def constant(self, value: Sequence[int] | float, dtype: ir.DataType) -> ir.Value:
        """A constant: a vector, or of rank 0."""
        return self.op("Constant", value=ir.tensor(np.asarray(value, dtype.numpy()), dtype=dtype))

    def initializer(self, name: str, value: np.ndarray) -> ir.Value:
        """A constant of the graph, shared by its name."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(value, name=name)
            self.graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape), const_value=tensor)
            )
        return self.graph.initializers[name]

    def reshape(self, x: ir.Value, rank: int, *last: int) -> ir.Value:
        """`x` with its first `rank` sizes and then `last`."""
        return self.op("Reshape", x, self.constant([*[0] * rank, *last], ir.DataType.INT64))

    def replace(self, new: Sequence[ir.Value], old: Sequence[ir.Value] = (), nodes: Sequence[ir.Node] = ()) -> None:
        """Put the recorded nodes where the node was, or where `nodes` were, whose outputs `old` are now `new`."""
        ir.convenience.replace_nodes_and_values(
            self.graph, self.node, [*nodes, self.node], self.tape.nodes, old or self.node.outputs, new
        )


def width(value: ir.Value) -> tuple[int, int]:
    """The number of axes before the last one, and the size of that."""
    assert value.shape is not None
    last = value.shape[-1]
    assert isinstance(last, int)
    return len(value.shape) - 1, last


def dequantize(spell: Spelling, node: ir.Node) -> None:
    """DequantizeLinear where the scale is constant, arithmetic where it is computed."""
    q, scale, zero = inputs_of(node, 3)
    assert q is not None
    assert scale is not None
    if is_weight(q) and is_weight(scale):
        weight(spell, node, q, scale, zero)
    elif is_weight(scale):
        zero = zero or typed_zero(spell, q.dtype)
        spell.replace([spell.op("DequantizeLinear", q, scale, zero)])
    else:
        spell.replace([scaled(spell, node, q, scale, zero)])


def weight(spell: Spelling, node: ir.Node, q: ir.Value, scale: ir.Value, zero: ir.Value | None) -> None:
    """DequantizeLinear of a constant; turned, with all its parts, where the graph reads only its transpose."""
    group = attribute(node, "group")
    packed = INT4 if attribute(node, "bits") <= 4 and q.dtype == INT8 else None
    readers = node.outputs[0].consumers()
    turned = bool(readers) and all(reader.op_type == "Transpose" for reader in readers) and width(q)[0] == 1
    of_channels = width(scale)[0] >= 0 and not group

    def layout(source: ir.Value, flat: bool, dtype: ir.DataType | None) -> ir.Value:
        turn = turned and not flat
        what = ".".join(["int4"] * bool(dtype) + ["flat"] * flat + ["transposed"] * turn)
        if not what:
            return source

        def change(tensor: Tensor) -> Tensor:
            return tensor.flatten() if flat else tensor.T if turn else tensor

        return derived(spell.graph, source, what, change, dtype)

    parts = [
        layout(q, False, packed),
        layout(scale, of_channels, None),
        None if zero is None else layout(zero, of_channels, packed),
    ]
    axis = int(turned) if of_channels else 1 - int(turned)
    blocks: dict[str, Any] = {"block_size": group} if group else {}
    made = spell.op("DequantizeLinear", *parts, axis=axis, **blocks)
    if turned:
        spell.replace([made] * len(readers), [reader.outputs[0] for reader in readers], readers)
    else:
        spell.replace([made])


def scaled(spell: Spelling, node: ir.Node, q: ir.Value, scale: ir.Value, zero: ir.Value | None) -> ir.Value:
    """(q - zero) * scale by arithmetic."""
    group = attribute(node, "group")
    dtype = node.outputs[0].dtype
    rank, last = width(node.outputs[0])

    def wide(value: ir.Value) -> ir.Value:
        return value if value.dtype == dtype else spell.op("Cast", value, to=dtype)

    def spread(value: ir.Value) -> ir.Value:
        return spell.reshape(value, rank, last // group, 1) if group else value

    x = wide(q)
    if group:
        x = spell.reshape(x, rank, last // group, group)
    if zero is not None:
        x = spell.op("Sub", x, spread(wide(zero)))
    x = spell.op("Mul", x, spread(scale))
    return spell.reshape(x, rank, last) if group else x


def typed_zero(spell: Spelling, dtype: ir.DataType | None) -> ir.Value:
    """The zero point of a symmetric quantization, written out: its type is that of the integers."""
    assert dtype is not None
    return spell.constant(0, dtype)


def quantize(spell: Spelling, node: ir.Node) -> None:
    """QuantizeLinear, its zero point written out: from its type follows that of the integers."""
    x, scale, zero = inputs_of(node, 3)
    assert x is not None
    assert scale is not None
    if x.dtype != scale.dtype:
        scale = spell.op("Cast", scale, to=x.dtype)
    zero = zero or typed_zero(spell, ir.DataType(attribute(node, "to")))
    spell.replace([spell.op("QuantizeLinear", x, scale, zero)])


def integers(spell: Spelling, x: ir.Value) -> ir.Value:
    """Rounded half to even, saturating."""
    bounds = [spell.constant(float(bound), FLOAT) for bound in (INT8_MIN, INT8_MAX)]
    return spell.op("Cast", spell.op("Clip", x, *bounds), to=INT8)


def quantize_per_token(spell: Spelling, node: ir.Node) -> None:
    """Arithmetic, as `vlmx::quantize_per_token` has it, in float32."""
    (x,) = inputs_of(node, 1)
    assert x is not None
    wide = spell.op("Cast", x, to=FLOAT) if x.dtype != FLOAT else x
    axes, zero = spell.constant([-1], ir.DataType.INT64), spell.constant(0.0, FLOAT)
    low = spell.op("Min", spell.op("ReduceMin", wide, axes, keepdims=1), zero)
    high = spell.op("Max", spell.op("ReduceMax", wide, axes, keepdims=1), zero)
    steps = spell.constant(float(INT8_MAX - INT8_MIN), FLOAT)
    scale = spell.op("Max", spell.op("Div", spell.op("Sub", high, low), steps), spell.constant(TINY, FLOAT))
    least = spell.constant(float(INT8_MIN), FLOAT)
    shift = integers(spell, spell.op("Sub", least, spell.op("Round", spell.op("Div", low, scale))))
    rounded = spell.op("Round", spell.op("Div", wide, scale))
    q = integers(spell, spell.op("Add", rounded, spell.op("Cast", shift, to=FLOAT)))
    spell.replace([q, spell.op("Cast", scale, to=x.dtype) if x.dtype != FLOAT else scale, shift])


def quantize_per_block(spell: Spelling, node: ir.Node) -> None:
    """Arithmetic, as `vlmx::quantize_per_block` has it, in float32."""
    (x,) = inputs_of(node, 1)
    assert x is not None
    group, (rank, last) = attribute(node, "group"), width(node.outputs[0])
    wide = spell.op("Cast", x, to=FLOAT) if x.dtype != FLOAT else x
    blocks = spell.reshape(wide, rank, last // group, group)
    axes = spell.constant([-1], ir.DataType.INT64)
    largest = spell.op("ReduceMax", spell.op("Abs", blocks), axes, keepdims=1)
    scale = spell.op("Div", largest, spell.constant(float(INT8_MAX), FLOAT))
    scale = spell.op("Max", scale, spell.constant(TINY, FLOAT))
    q = integers(spell, spell.op("Round", spell.op("Div", blocks, scale)))
    narrow = spell.op("Cast", scale, to=x.dtype) if x.dtype != FLOAT else scale
    spell.replace([spell.reshape(q, rank, last), spell.reshape(narrow, rank, last // group)])


SPELLINGS: dict[str, Callable[[Spelling, ir.Node], None]] = {
    "Dequantize": dequantize,
    "Quantize": quantize,
    "QuantizePerToken": quantize_per_token,
    "QuantizePerBlock": quantize_per_block,
}
