"""A program with the first rows of its vocabularies: the tables and heads that are most of a checked layer's weight.

Rows of a table are looked up, and those of a head computed, each by itself: some are checked as well as all.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from graphs.lift import forget
from graphs.program import Program
from graphs.rewrite import Opened

#: rows that are kept
ROWS = 2048

EMBEDDING, LINEAR = torch.ops.aten.embedding.default, torch.ops.aten.linear.default


def narrow(program: Program, rows: int = ROWS) -> Program:
    """`program` with at most `rows` of every table that ids look up directly and of every head behind which nothing is.

    Ids and outputs are of fewer values then. Tables or heads that something else reads, too, stay.
    """
    for method in program:
        ids = {spec.name: i for i, spec in enumerate(program.methods[method].signature.inputs) if spec.values == "ids"}
        opened = Opened.open(program, method)
        given = [node for node in opened.graph.nodes if node.op == "placeholder"]
        looked_up = {given[index]: name for name, index in ids.items()}
        cut: dict[str, fx.Node] = {}
        specs = {spec.name: spec for spec in program.methods[method].signature.inputs}
        for node in opened.graph.nodes:
            if node.target is EMBEDDING and node.args[1] in looked_up and len(node.args[1].users) == 1:
                name = looked_up[node.args[1]]
                if wide(node.args[0], rows):
                    cut[str(node.args[0].target)] = node
                    specs[name] = replace(specs[name], high=min(specs[name].high, rows))
            elif (
                node.target is LINEAR
                and leaves(node, alone=True)
                and all(wide(n, rows) for n in node.args[1:] if n is not None)
            ):
                cut |= {str(n.target): node for n in node.args[1:] if n is not None}
        if not cut:
            continue
        values = {}
        for entry in cut:
            shape = program.methods[method].exported.state_dict[entry].shape
            opened.reshape(entry, (rows, *shape[1:]))
            values[entry] = partial(first, program, method, entry, rows)
        forget(opened.graph)
        program = opened.lift(values, tuple(specs.values()))
    return program


def wide(node: object, rows: int) -> bool:
    """Whether a node is a weight of more than `rows` rows that one operator reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or len(node.users) != 1:
        return False
    return bool(node.meta["val"].shape[0] > rows)


def leaves(node: fx.Node, alone: bool = False) -> bool:
    """Whether what a node computes goes nowhere but out of the graph, in its shape.

    `alone`: and meets nothing on its way but single numbers, none of them its width, so that fewer columns of it are
    computed as they were.
    """
    shape = node.meta["val"].shape
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output":
            return True
        if not isinstance(found := user.meta.get("val"), Tensor) or found.shape != shape:
            return False
        if alone and any(n is not node and n.meta["val"].numel() > 1 for n in user.all_input_nodes):
            return False
        if alone and shape[-1] in tree_leaves((user.args, user.kwargs)):
            return False
        node = user
    return False


def first(program: Program, method: str, entry: str, rows: int) -> Tensor:
    """The first rows of a weight, of which no more are read."""
    dtype = program.methods[method].exported.state_dict[entry].dtype
    weight = program.stored(method, entry, rows).to(dtype, copy=True)
    program.release(method, entry)
    return weight
