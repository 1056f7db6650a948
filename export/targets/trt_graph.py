"""What TensorRT's parser wants spelled otherwise: gathers from quantized tables, hard activations in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from export.targets.onnx_quant_ops import DOMAIN, inputs_of
from export.targets.onnx_weights import is_weight
from graphs.program import Program

#: the parser has these for float32, float16 and int8 alone
HARD: dict[Any, Callable[[Tensor], Tensor]] = {
    torch.ops.aten.hardsigmoid.default: lambda x: torch.clamp(x + 3, 0, 6) / 6,
    torch.ops.aten.hardswish.default: lambda x: x * (torch.clamp(x + 3, 0, 6) / 6),
}


def plain_bfloat16(program: Program) -> Program:
    """`program` with the hard activations of methods in bfloat16 written as arithmetic."""
    for name, traced in program.methods.items():
        dtypes = {tensor.dtype for tensor in traced.exported.state_dict.values()}
        if torch.bfloat16 in dtypes and any(node.target in HARD for node in traced.exported.graph.nodes):
            program = program.replace(name, replace(traced, exported=traced.exported.run_decompositions(HARD)))
    return program


def dequantize_tables(model: ir.Model) -> None:
    """Rows of a quantized table are gathered behind its dequantize node, which the engine keeps as a layer of its own.

    The graph gathers integers and scales and dequantizes those; the library refuses to gather from such a constant.
    """
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == "Dequantize":
            rows = [None if value is None else value.producer() for value in inputs_of(node, 3)]
            given = [row for row in rows if row is not None]
            if not given or any(row.op_type != "Gather" or not is_weight(row.inputs[0]) for row in given):
                continue
            tables = [None if row is None else row.inputs[0] for row in rows]
            whole = ir.Node(DOMAIN, "Dequantize", tables, node.attributes.values(), num_outputs=1)
            gather = ir.Node("", "Gather", [whole.outputs[0], given[0].inputs[1]], [ir.AttrInt64("axis", 0)])
            table, old, new = tables[0], node.outputs[0], gather.outputs[0]
            assert table is not None
            for made, shape in ((whole.outputs[0], table.shape), (new, old.shape)):
                made.shape, made.type = shape, old.type
            ir.convenience.replace_nodes_and_values(model.graph, node, [node, *given], [whole, gather], [old], [new])
