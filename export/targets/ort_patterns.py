"""Linear layers with a quantized weight in a translated graph: x (dequantize(q))^T, and the bias added to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from export.targets.onnx_qdq import Spelling
from export.targets.onnx_quant_ops import DOMAIN, attribute, inputs_of
from export.targets.onnx_weights import is_weight

#: the domain of ONNX Runtime's own operators
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Linear:
    """One product, with the parts of its integer weight [O, K]; `total` adds `bias` to it."""

    product: ir.Node
    x: ir.Value
    q: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    bits: int
    group: int
    shape: tuple[int, int]
    total: ir.Node | None
    bias: ir.Value | None

    def replace(self, spell: Spelling, made: ir.Value) -> None:
        """Put what `spell` recorded, `made` in the end, in place of the layer."""
        if self.total is None:
            spell.replace([made])
        else:
            spell.replace([made], self.total.outputs, [self.total])


def linears(model: ir.Model) -> Iterator[Linear]:
    """Every linear layer whose weight is a constant of integers; those found before may have been replaced."""
    for node in list(model.graph):
        weight = weight_of(node) if node.op_type == "MatMul" else None
        if weight is not None:
            (x, _), (q, scale, zero) = node.inputs, inputs_of(weight, 3)
            assert x is not None
            assert q is not None
            assert scale is not None
            outputs, inputs = (int(size) for size in q.shape)  # type: ignore[union-attr, arg-type]
            total, bias = bias_of(node)
            bits, group = attribute(weight, "bits"), attribute(weight, "group")
            yield Linear(node, x, q, scale, zero, bits, group, (outputs, inputs), total, bias)


def weight_of(product: ir.Node) -> ir.Node | None:
    """The Dequantize of constant integers whose transpose the product reads."""
    turned = None if product.inputs[1] is None else product.inputs[1].producer()
    if turned is None or turned.op_type != "Transpose" or turned.inputs[0] is None:
        return None
    weight = turned.inputs[0].producer()
    if weight is None or weight.domain != DOMAIN or not all(is_weight(value) for value in weight.inputs if value):
        return None
    q = weight.inputs[0]
    assert q is not None
    return weight if q.dtype == ir.DataType.INT8 and len(q.shape or ()) == 2 else None


def bias_of(product: ir.Node) -> tuple[ir.Node, ir.Value] | tuple[None, None]:
    """The sum with a constant vector that alone reads the product, and that vector."""
    readers = product.outputs[0].consumers()
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None, None
    bias = next((value for value in readers[0].inputs if value is not product.outputs[0]), None)
    if bias is None or not is_weight(bias) or len(bias.shape or ()) != 1:
        return None, None
    return readers[0], bias
