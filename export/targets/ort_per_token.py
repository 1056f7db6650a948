"""int8 activations with a scale and a zero point a token in ONNX Runtime, without any calibration.

`MatMulIntegerToFloat`, its fastest x86 kernel, knows one scale and one zero point of activations. Rows are therefore
quantized by a QuantizeLinear whose axis is that of the tokens, multiplied as if around 128, and what that leaves is put
right behind the product, where it is a sum of two vectors' products: with q = x / s + z and w = c v,

    x w^T = s (q v^T) c - s z sum(v) c = s ((q - 128) v^T) c + s (128 - z) (sum(v) c).

Both are exact up to the rounding of float32. Shape suffixes: R rows (tokens of the batch), K inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from export.targets.onnx_qdq import Spelling, width
from export.targets.onnx_quant_ops import inputs_of
from export.targets.onnx_weights import derived
from export.targets.ort_activations import SHIFT, factors, zero_point
from export.targets.ort_patterns import MICROSOFT, Linear, linears
from quant.ops import INT8_MAX, INT8_MIN, TINY

FLOAT, INT64, UINT8 = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.UINT8


@dataclass(frozen=True)
class Rows:
    """Tokens as integers: uint8 [R, K], scales s and what is left of zero points, s (128 - z), both float32 [R, 1].

    `sizes` holds the sizes of what was quantized, but for the last.
    """

    q_RK: ir.Value
    scale_R1: ir.Value
    left_R1: ir.Value
    sizes: ir.Value


def fuse_per_token(model: ir.Model) -> None:
    """Put `MatMulIntegerToFloat` for every linear layer of int8 weights whose input is quantized token by token."""
    rows: dict[ir.Node, Rows] = {}
    for layer in linears(model):
        quantizer = per_token(layer)
        if quantizer is not None:
            if quantizer not in rows:
                rows[quantizer] = quantized(model.graph, quantizer)
            multiply(model.graph, layer, rows[quantizer])
            model.graph.opset_imports.setdefault(MICROSOFT, 1)


def per_token(layer: Linear) -> ir.Node | None:
    """The QuantizePerToken whose integers a layer of int8 weights, one scale a row, multiplies."""
    made = layer.x.producer()
    if made is None or made.op_type != "Dequantize" or layer.bits != 8 or layer.group or layer.zero:
        return None
    source = made.inputs[0].producer() if made.inputs[0] is not None else None
    return source if source is not None and source.op_type == "QuantizePerToken" else None


def quantized(graph: ir.Graph, node: ir.Node) -> Rows:
    """What `vlmx::quantize_per_token` makes, before `node`, which goes with its last reader."""
    (x,) = inputs_of(node, 1)
    assert x is not None
    spell = Spelling(graph, node)
    _, inputs = width(x)
    x_RK = spell.op("Reshape", x, spell.constant([-1, inputs], INT64))
    if x.dtype != FLOAT:
        x_RK = spell.op("Cast", x_RK, to=FLOAT)
    last, zero = spell.constant([-1], INT64), spell.constant(0.0, FLOAT)
    low_R = spell.op("Min", spell.op("ReduceMin", x_RK, last, keepdims=0), zero)
    high_R = spell.op("Max", spell.op("ReduceMax", x_RK, last, keepdims=0), zero)
    steps = spell.constant(float(INT8_MAX - INT8_MIN), FLOAT)
    scale_R = spell.op("Max", spell.op("Div", spell.op("Sub", high_R, low_R), steps), spell.constant(TINY, FLOAT))
    zero_R = spell.op("Neg", spell.op("Round", spell.op("Div", low_R, scale_R)))
    q_RK = spell.op("QuantizeLinear", x_RK, scale_R, spell.op("Cast", zero_R, to=UINT8), axis=0)
    left_R = spell.op("Mul", scale_R, spell.op("Sub", spell.constant(float(SHIFT), FLOAT), zero_R))
    scale_R1, left_R1 = (spell.op("Unsqueeze", part, last) for part in (scale_R, left_R))
    made = Rows(q_RK, scale_R1, left_R1, spell.op("Shape", x, start=0, end=-1))
    graph.insert_before(node, spell.tape.nodes)
    return made


def multiply(graph: ir.Graph, layer: Linear, rows: Rows) -> None:
    """Put the product of integers, and what is left of their zero points, in place of the layer."""
    spell = Spelling(graph, layer.product)
    weight_KO, scale_O = factors(graph, layer)
    sums_1O = derived(graph, (layer.q, layer.scale), "sums", sums, FLOAT)
    one, middle = spell.constant(1.0, FLOAT), zero_point(spell)
    y_RO = spell.op("MatMulIntegerToFloat", rows.q_RK, weight_KO, one, scale_O, middle, domain=MICROSOFT)
    y_RO = spell.op("Mul", y_RO, rows.scale_R1)
    wide = layer.scale.dtype in (None, FLOAT)
    left_RO = spell.op("Gemm", rows.left_R1, sums_1O, *([layer.bias] if layer.bias and wide else []))
    y_RO = spell.op("Add", y_RO, left_RO)
    y = spell.op("Reshape", y_RO, spell.op("Concat", rows.sizes, spell.constant([layer.shape[0]], INT64), axis=0))
    if not wide:
        y = spell.op("Cast", y, to=layer.scale.dtype)
        y = spell.op("Add", y, layer.bias) if layer.bias else y
    layer.replace(spell, y)


def sums(q_OK: Tensor, scale_O1: Tensor) -> Tensor:
    """What an input of ones gives: [1, O]."""
    return (q_OK.sum(-1, keepdim=True, dtype=torch.int32) * scale_O1.float()).T
