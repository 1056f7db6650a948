"""Attention over a cache as ONNX Runtime's `GroupQueryAttention`, which reads the tokens so far and no more of it.

The plain form multiplies with all rows of the cache, and transposes them, at every token; the operator also writes new
rows into the cache, in place where input and output share a buffer, takes grouped heads without repeating keys, and
turns queries and keys by the rotary table. It wants consecutive positions, as `cache_position` has them.
Shape suffixes: A heads, G key-value heads, S new tokens, C context, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from torch import Tensor

from export.targets.onnx_qdq import Spelling
from export.targets.onnx_weights import derived, is_weight
from export.targets.ort_cached import Attention, attention_of
from export.targets.ort_masks import Hidden, made_by
from export.targets.ort_patterns import MICROSOFT
from export.targets.ort_scores import sizes, tokens

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
#: the operator turns heads whose width is a multiple of this
TURNED_MULTIPLE = 16


def fuse_attention(model: ir.Model) -> None:
    """Put the operator for every attention over a cache whose mask hides what is not written yet."""
    lengths = Lengths(model.graph)
    for node in list(model.graph):
        found = attention_of(node) if node.op_type == "Softmax" else None
        if found is not None:
            replace(model.graph, found, lengths)
    common.RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class Turned:
    """Heads `x` turned by rows of two tables at the positions of the call."""

    x: ir.Value
    tables: tuple[ir.Value, ir.Value]


def turned_by(value: ir.Value, position: ir.Value) -> Turned | None:
    """The parts of heads that are turned in halves, x cos + (-second, first) sin, each head in full."""
    total = made_by(value, "Add")
    if total is None:
        return None
    straight, crossed = (made_by(part, "Mul") for part in total.inputs)
    if straight is None or crossed is None:
        return None
    x, cos = straight.inputs
    joined = made_by(crossed.inputs[0], "Concat")
    split = None if x is None else next((use.node for use in x.uses() if use.node.op_type == "Split"), None)
    tables = [table_of(angle, position) for angle in (cos, crossed.inputs[1])]
    if x is None or joined is None or split is None or tables[0] is None or tables[1] is None:
        return None
    negated = made_by(joined.inputs[0], "Neg")
    halves = [None if negated is None else negated.inputs[0], joined.inputs[1]]
    if len(split.outputs) != 2 or halves != list(reversed(split.outputs)) or split.attributes["axis"].as_int() != 3:
        return None
    return Turned(x, (tables[0], tables[1]))


def table_of(angle: ir.Value | None, position: ir.Value) -> ir.Value | None:
    """The constant whose rows at `position` a value is."""
    gather = made_by(angle, "Gather")
    if gather is None or gather.inputs[1] is not position or not is_weight(gather.inputs[0]):
        return None
    return gather.inputs[0]


def half(table: Tensor) -> Tensor:
    """The first half of each row; the second repeats it."""
    return table[:, : table.shape[1] // 2]


def halved(graph: ir.Graph, table: ir.Value) -> ir.Value | None:
    """The first half of a table's rows, where the second repeats it."""
    if f"{table.name}.half" not in graph.initializers:
        assert table.const_value is not None
        left, right = np.split(table.const_value.numpy(), 2, axis=1)
        if not np.array_equal(left, right):
            return None
    return derived(graph, table, "half", half)


@dataclass(frozen=True)
class Lengths:
    """What the operator wants to know of each position vector: made once, where the graph begins."""

    graph: ir.Graph
    made: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = field(default_factory=dict)

    def of(self, position: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The index of the last token [1], the number of tokens [1], both int32; and the latter as int64."""
        if position not in self.made:
            first = self.graph[0]
            spell = Spelling(self.graph, first)
            last = spell.op("Gather", position, spell.constant([-1], INT64), axis=0)
            count = spell.op("Add", last, spell.constant([1], INT64))
            counts = [spell.op("Cast", value, to=INT32) for value in (last, count)]
            self.graph.insert_before(first, spell.tape.nodes)
            self.made[position] = (counts[0], counts[1], count)
        return self.made[position]


def replace(graph: ir.Graph, found: Attention, lengths: Lengths) -> None:
    """Put the operator in place of one attention, and of what writes its caches."""
    spell = Spelling(graph, found.out)
    keys, values = found.keys, found.values
    _, groups, _, width = keys.sizes
    query, rows, tables = found.query, keys.rows, None
    turned = [turned_by(value, keys.position) for value in (query, rows)]
    if turned[0] and turned[1] and turned[0].tables == turned[1].tables and width % TURNED_MULTIPLE == 0:
        halves = [halved(graph, table) for table in turned[0].tables]
        if None not in halves:
            query, rows, tables = turned[0].x, turned[1].x, halves
    last, count, wide_count = lengths.of(keys.position)
    bias = None if found.hides.exact else first_columns(spell, found.mask, wide_count)
    parts = [
        *(tokens(spell, heads) for heads in (query, rows, values.rows)),
        keys.past,
        values.past,
        last,
        count,
        *(tables or (None, None)),
        None,
        bias,
    ]
    while parts[-1] is None:
        parts.pop()
    attributes: dict[str, Any] = {"num_heads": sizes(query)[1], "kv_num_heads": groups, "scale": found.scale}
    if tables:
        attributes["do_rotary"] = 1
    if found.cap:
        attributes["softcap"] = found.cap
    if bias is None and found.hides.window:
        attributes["local_window_size"] = found.hides.window
    if found.hides.hidden is not Hidden.FUTURE:
        attributes["causal"] = 0
    made = spell.tape.op_multi_out("GroupQueryAttention", parts, attributes, domain=MICROSOFT, num_outputs=3)
    old = [found.out.outputs[0], keys.scatter.outputs[0], values.scatter.outputs[0]]
    spell.replace(made, old)
    graph.opset_imports.setdefault(MICROSOFT, 1)


def first_columns(spell: Spelling, mask: ir.Value, count: ir.Value) -> ir.Value:
    """The columns of a mask that belong to the tokens so far, as [1, 1 or A, S, tokens]."""
    if len(sizes(mask)) == 2:
        mask = spell.op("Unsqueeze", mask, spell.constant([0, 1], INT64))
    start, axis = spell.constant([0], INT64), spell.constant([3], INT64)
    return spell.op("Slice", mask, start, count, axis)
