"""Keys and values kept as int8 with a scale for each position and head: a quarter of a float32 cache."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from graphs.program import Program
from graphs.rewrite import Opened
from graphs.spec import TensorSpec

aten = torch.ops.aten
vlmx = torch.ops.vlmx


@dataclass(frozen=True)
class Int8Cache:
    """Every float state [1, G, C, K] that `index_copy` writes at positions becomes int8 and scales [1, G, C, 1].

    New rows are rounded when they are written, symmetric over the head's width; all are dequantized when read.
    """

    def run(self, program: Program) -> Program:
        for method, traced in program.methods.items():
            caches = {spec.name: spec for spec in traced.signature.state if spec.dtype.is_floating_point}
            if caches:
                program = self.method(Opened.open(program, method), caches)
        return program

    def method(self, opened: Opened, caches: dict[str, TensorSpec]) -> Program:
        state: list[TensorSpec] = []
        for node in opened.graph.find_nodes(op="call_function", target=aten.index_copy.default):
            spec = caches.get(str(node.args[0].target))
            if spec is not None and len(spec.shape) == 4:
                state += self.exchange(opened, node, spec)
        opened.drop_unread()
        return opened.retrace(state=tuple(state))

    def exchange(self, opened: Opened, node: fx.Node, spec: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
        """Write and read one cache as integers; the specs of the two states that it becomes."""
        graph = opened.graph
        _, axis, position, new = node.args
        shape = tuple(size for size in spec.shape if isinstance(size, int))
        with graph.inserting_before(node):
            made = graph.call_function(vlmx.quantize_per_block.default, (new, shape[-1]))
            kept, specs = [], []
            for index, (suffix, width, dtype) in enumerate(
                (("q", shape[-1], torch.int8), ("scale", 1, spec.dtype)),
            ):
                form = TensorSpec(f"{spec.name}_{suffix}", (*shape[:-1], width), dtype)
                buffer = opened.buffer(form.name, (*shape[:-1], width), dtype)
                rows = graph.call_function(operator.getitem, (made, index))
                written = graph.call_function(aten.index_copy.default, (buffer, axis, position, rows))
                graph.call_function(aten.copy_.default, (buffer, written))
                kept.append(written)
                specs.append(form)
            read = graph.call_function(vlmx.dequantize.default, (*kept, None, 8, 0))
        for user in list(node.users):
            if user.target is aten.copy_.default:
                graph.erase_node(user)
        node.replace_all_uses_with(read)
        graph.erase_node(node)
        return specs[0], specs[1]
