"""Embeddings of 4 bits as ONNX Runtime's `GatherBlockQuantized`: the standard's Gather takes no packed integers."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from export.targets.onnx_qdq import Spelling
from export.targets.onnx_quant_ops import DOMAIN, attribute, inputs_of
from export.targets.onnx_weights import derived, is_weight
from export.targets.ort_linear import block_of
from export.targets.ort_patterns import MICROSOFT


def fuse_embedding(model: ir.Model) -> None:
    """Put one operator for gathered integers of at most 4 bits, their gathered scales, and the product of both."""
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type != "Dequantize" or attribute(node, "bits") > 4:
            continue
        tables = [gathered(value) for value in inputs_of(node, 3)]
        if tables[0] is not None and tables[1] is not None and (len(node.inputs) < 3 or tables[2] is not None):
            replace(model.graph, node, tables)


def gathered(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The table and the indices of a value that is rows of a constant."""
    gather = None if value is None else value.producer()
    if gather is None or gather.op_type != "Gather":
        return None
    table, indices = gather.inputs
    return (table, indices) if table is not None and indices is not None and is_weight(table) else None


def replace(graph: ir.Graph, node: ir.Node, tables: list[tuple[ir.Value, ir.Value] | None]) -> None:
    """Put the operator in place of the product; `tables` are those of integers, scales and zero points."""
    (q, indices), (scale, _), *_ = (pair for pair in tables if pair is not None)
    assert q.shape is not None
    width = int(q.shape[-1])  # type: ignore[arg-type]
    block = block_of(width, attribute(node, "group"))

    def spread(tensor: Tensor) -> Tensor:
        return tensor.expand(-1, -(-width // block))

    zero = None if tables[2] is None else tables[2][0]
    parts = [
        derived(graph, q, "int4", lambda tensor: tensor, ir.DataType.INT4),
        indices,
        derived(graph, scale, "blocks", spread),
        *([] if zero is None else [derived(graph, zero, "int4", spread, ir.DataType.INT4)]),
    ]
    spell = Spelling(graph, node)
    attributes = {"block_size": block, "gather_axis": 0, "quantize_axis": 1}
    spell.replace([spell.op("GatherBlockQuantized", *parts, domain=MICROSOFT, **attributes)])
    graph.opset_imports.setdefault(MICROSOFT, 1)
