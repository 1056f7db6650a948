"""Static int8 activations in ONNX Runtime: as uint8, and multiplied as such by `MatMulIntegerToFloat`.

Its x86 kernels multiply uint8 by int8 several times faster than int8 by int8; the shift by 128 is exact. With VNNI
instructions they are more than twice as fast as those of uint8 by uint8, too; without, they add two products in 16
bits, where these saturate, so sessions shift weights as they load them (`runtimes/ort_saturation.py`). The operator
is put here rather than left to the session's optimizer, which loses the layer where it first makes a Gemm of it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from export.targets.onnx_qdq import Spelling
from export.targets.onnx_quant_ops import attribute, inputs_of
from export.targets.onnx_weights import derived
from export.targets.ort_patterns import MICROSOFT, Linear, linears

SHIFT = 128
FLOAT, INT8, UINT8 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8


def shifted(integers: Tensor) -> Tensor:
    """int8 [..] as uint8: so many more."""
    return integers.view(torch.uint8) ^ SHIFT


def factors(graph: ir.Graph, layer: Linear) -> tuple[ir.Value, ir.Value]:
    """A layer's weight as integer products read it, int8 [K, O], and its scales, float32 [O]."""
    weight_KO = derived(graph, layer.q, "transposed", lambda tensor: tensor.T)
    return weight_KO, derived(graph, layer.scale, "flat", lambda tensor: tensor.flatten().float(), FLOAT)


def zero_point(spell: Spelling) -> ir.Value:
    """What shifted integers lie around."""
    return spell.initializer("unsigned_zero_point", np.asarray(SHIFT, np.uint8))


def unsigned_activations(model: ir.Model) -> None:
    """Let every static Quantize to int8 that only Dequantize nodes read, and those, work on uint8."""
    for node in list(model.graph):
        if node.op_type != "Quantize" or attribute(node, "to") != INT8:
            continue
        readers = node.outputs[0].consumers()
        if readers and all(reader.op_type == "Dequantize" for reader in readers):
            x, scale, zero = inputs_of(node, 3)
            if zero is None:
                zero = zero_point(Spelling(model.graph, node))
            else:
                zero = derived(model.graph, zero, "unsigned", shifted, UINT8)
            put(model.graph, node, UINT8, "QuantizeLinear", x, scale, zero)
            for reader in readers:
                put(model.graph, reader, reader.outputs[0].dtype, "DequantizeLinear", *reader.inputs[:2], zero)


def put(graph: ir.Graph, node: ir.Node, dtype: ir.DataType | None, kind: str, *inputs: ir.Value | None) -> None:
    """Exchange a node for one of ONNX's own, of an output of `dtype`."""
    spell = Spelling(graph, node)
    made = spell.op(kind, *inputs)
    if dtype is not None:
        node.outputs[0].dtype = made.dtype = dtype
    spell.replace([made])


def fuse_integer(model: ir.Model) -> None:
    """Put `MatMulIntegerToFloat` for every product of static uint8 activations and 8-bit weights with a scale a row."""
    graph = model.graph
    for layer in linears(model):
        made = layer.x.producer()
        if made is None or made.op_type != "DequantizeLinear" or layer.bits != 8 or layer.group or layer.zero:
            continue
        integers, scale, zero = inputs_of(made, 3)
        assert integers is not None
        assert scale is not None
        if integers.dtype != UINT8:
            continue
        weight, scales = factors(graph, layer)
        scale = derived(graph, scale, "wide", lambda tensor: tensor.float(), FLOAT)
        spell = Spelling(graph, layer.product)
        dtype = layer.scale.dtype
        narrow = dtype != FLOAT
        parts = [integers, weight, scale, scales, zero, *([None, layer.bias] if layer.bias and not narrow else [])]
        product = spell.op("MatMulIntegerToFloat", *parts, domain=MICROSOFT)
        if narrow:
            product = spell.op("Cast", product, to=dtype)
            product = spell.op("Add", product, layer.bias) if layer.bias else product
        layer.replace(spell, product)
        graph.opset_imports.setdefault(MICROSOFT, 1)
