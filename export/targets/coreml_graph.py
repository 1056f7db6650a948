"""Graphs in the form that coremltools takes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import fx
from torch.export import ExportedProgram

from graphs.program import Program
from quant import ops as quant_ops

aten = torch.ops.aten
DEQUANTIZE = quant_ops.dequantize._opoverload


def legalize(program: Program) -> Program:
    """`program` with byte inputs declared float32, and embeddings gathered from dequantized tables.

    coremltools takes a picture as float32. The values stay 0..255 and the signatures stay uint8: an app hands over a
    picture of bytes (`coreml_convert.feature`), and Core ML feeds the graph those bytes as numbers.
    """
    for name, traced in program.methods.items():
        bytes_in = {
            graph_name
            for spec, graph_name in zip(
                traced.signature.inputs, traced.exported.graph_signature.user_inputs, strict=True
            )
            if spec.dtype == torch.uint8
        }
        gathered = [node for node in traced.exported.graph.nodes if gathers_integers(node)]
        if bytes_in or gathered:
            exported = duplicate(traced.exported)
            retype(exported, bytes_in)
            gather_last(exported)
            program = program.replace(name, replace(traced, exported=exported))
    return program


def duplicate(exported: ExportedProgram) -> ExportedProgram:
    """`exported` with a graph of its own, whose nodes keep their names: copying renames those that Python has taken,
    `input` among them, but the graph's signature does not follow."""
    result = copy.copy(exported)
    result._graph_module = copy.deepcopy(exported.graph_module)
    for node, original in zip(result.graph.nodes, exported.graph.nodes, strict=True):
        node.name = original.name
    return result


def retype(exported: ExportedProgram, placeholders: set[str]) -> None:
    """Declare the named placeholders float32; what reads them casts to a float in any case."""
    for node in exported.graph.find_nodes(op="placeholder"):
        if node.name in placeholders:
            node.meta["val"] = node.meta["val"].float()


def gathers_integers(node: fx.Node) -> bool:
    """Whether a node dequantizes rows that were gathered, every part of them, by the same ids."""
    if node.target is not DEQUANTIZE:
        return False
    parts = [part for part in node.args[:3] if isinstance(part, fx.Node)]
    return all(part.target is aten.embedding.default for part in parts) and len({part.args[1] for part in parts}) == 1


def gather_last(exported: ExportedProgram) -> None:
    """Rows gathered from `dequantize(table)` where a graph dequantizes gathered rows.

    A table that is a `constexpr` operator stays packed in Core ML, which reads the rows asked for; and integers of four
    bits cannot be gathered as such.
    """
    graph = exported.graph
    for node in [node for node in graph.nodes if gathers_integers(node)]:
        parts = [part.args[0] if isinstance(part, fx.Node) else None for part in node.args[:3]]
        q, scale, _ = parts
        rows = node.args[0]
        assert isinstance(rows, fx.Node)
        assert isinstance(q, fx.Node)
        assert isinstance(scale, fx.Node)
        with graph.inserting_before(node):
            table = graph.call_function(DEQUANTIZE, (*parts, *node.args[3:]))
        table.meta["val"] = q.meta["val"].to(scale.meta["val"].dtype)
        node.target = aten.embedding.default  # changed in place: it may be an output, which goes by its name
        node.args = (table, *rows.args[1:])
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
