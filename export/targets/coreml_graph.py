"""Graphs in the form that coremltools takes."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch.export import ExportedProgram

from graphs.program import Program


def legalize(program: Program) -> Program:
    """`program` with byte inputs declared float32, the type in which coremltools takes a picture.

    The values stay 0..255 and the signatures stay uint8: an app hands over a picture of bytes
    (`coreml_convert.feature`), and Core ML feeds the graph those bytes as numbers.
    """
    for name, traced in program.methods.items():
        bytes_in = {
            graph_name
            for spec, graph_name in zip(
                traced.signature.inputs, traced.exported.graph_signature.user_inputs, strict=True
            )
            if spec.dtype == torch.uint8
        }
        if bytes_in:
            program = program.replace(name, replace(traced, exported=retype(traced.exported, bytes_in)))
    return program


def retype(exported: ExportedProgram, placeholders: set[str]) -> ExportedProgram:
    """`exported` with the named placeholders float32; what reads them casts to a float in any case."""
    result = copy.copy(exported)
    result._graph_module = copy.deepcopy(exported.graph_module)
    for node in result.graph.find_nodes(op="placeholder"):
        if node.name in placeholders:
            node.meta["val"] = node.meta["val"].float()
    return result
