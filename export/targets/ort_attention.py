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
from export.targets.ort_masks import Hidden, Mask, constant, made_by, mask_of, scalar
from export.targets.ort_patterns import MICROSOFT

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
#: of heads that the operator takes, and of those that it turns, the width is a multiple of
WIDTH_MULTIPLE, TURNED_MULTIPLE = 8, 16
#: nodes by which attention reads its keys: heads repeated, turned, multiplied, scaled, bent, masked, normalized, ..
MOST_BETWEEN = 16
#: permutations: of heads and tokens, and of a matrix for each head
HEADS_AND_TOKENS, MATRICES = (0, 2, 1, 3), (0, 1, 3, 2)


@dataclass(frozen=True)
class Written:
    """A cache [1, G, C, K] with rows [1, G, S, K] written at `position`."""

    scatter: ir.Node
    past: ir.Value
    rows: ir.Value
    position: ir.Value

    @property
    def sizes(self) -> tuple[int, ...]:
        return sizes(self.past)


@dataclass(frozen=True)
class Attention:
    """One attention over a cache; `scale` is that of the scores, `cap` bends them where it is not 0."""

    query: ir.Value
    scale: float
    cap: float
    keys: Written
    values: Written
    mask: ir.Value
    hides: Mask
    out: ir.Node


@dataclass(frozen=True)
class Turned:
    """Heads `x` turned by rows of two tables at the positions of the call."""

    x: ir.Value
    tables: tuple[ir.Value, ir.Value]


def fuse_attention(model: ir.Model) -> None:
    """Put the operator for every attention over a cache whose mask hides what is not written yet."""
    lengths = Lengths(model.graph)
    for node in list(model.graph):
        found = attention_of(node) if node.op_type == "Softmax" else None
        if found is not None:
            replace(model.graph, found, lengths)
    common.RemoveUnusedNodesPass()(model)


def sizes(value: ir.Value) -> tuple[int, ...]:
    """A shape, -1 where it is not fixed."""
    return tuple(size if isinstance(size, int) else -1 for size in value.shape or ())


def permutes(node: ir.Node, axes: tuple[int, ...]) -> bool:
    """Whether a transpose is that one."""
    return tuple(node.attributes["perm"].as_ints()) == axes


def only_reader(value: ir.Value, kind: str) -> ir.Node | None:
    """The node of that kind that alone reads a value, which is no output."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node if uses[0].node.op_type == kind else None


def attention_of(softmax: ir.Node) -> Attention | None:
    """The attention that a softmax is part of, in the spelling of `onnx_ops.attention` or open-coded like it."""
    total = made_by(softmax.inputs[0], "Add")
    product = only_reader(softmax.outputs[0], "MatMul")
    if total is None or product is None or product.inputs[0] is not softmax.outputs[0]:
        return None
    if softmax.attributes["axis"].as_int() not in (-1, 3):
        return None
    out = flattened(product.outputs[0])
    for scores, mask in (total.inputs, reversed(total.inputs)):
        assert scores is not None
        assert mask is not None
        inner, cap, factor = uncapped(scores)
        scored = made_by(inner, "MatMul")
        turned = None if scored is None else made_by(scored.inputs[1], "Transpose")
        if scored is None or turned is None or not permutes(turned, MATRICES):
            continue
        query, scale = unscaled(scored.inputs[0])
        keys, values = written(turned.inputs[0]), written(product.inputs[1])
        if out is None or keys is None or values is None or keys.position is not values.position:
            return None
        if keys.sizes != values.sizes or not heads_fit(query, keys):
            return None
        inside = [between(cache.scatter, out) for cache in (keys, values)]
        if None in inside or any(mask.producer() in nodes for nodes in inside if nodes):
            return None
        hides = mask_of(mask, keys.position)
        if hides.hidden is Hidden.NOTHING or not mask_fits(mask, query, keys):
            return None
        return Attention(query, scale * factor, cap, keys, values, mask, hides, out)
    return None


def between(first: ir.Node, last: ir.Node) -> list[ir.Node] | None:
    """The nodes by which `last` reads what `first` makes; None where something else reads it, too."""
    found: list[ir.Node] = []
    readers = [use.node for use in first.outputs[0].uses()]
    while readers:
        node = readers.pop()
        if node is last or node in found:
            continue
        found.append(node)
        if len(found) > MOST_BETWEEN or any(output.is_graph_output() for output in node.outputs):
            return None
        readers += [use.node for output in node.outputs for use in output.uses()]
    return found


def heads_fit(query: ir.Value, keys: Written) -> bool:
    """Whether queries are heads of the keys' width, some to each of theirs, as the operator takes them."""
    (_, heads, _, width), (_, groups, _, key_width) = sizes(query), keys.sizes
    return width == key_width and width % WIDTH_MULTIPLE == 0 and heads % groups == 0


def mask_fits(mask: ir.Value, query: ir.Value, keys: Written) -> bool:
    """Whether a mask is [S, C], or that for each head."""
    shape = sizes(mask)
    return shape[-1:] == (keys.sizes[2],) and (len(shape) == 2 or shape[:-2] in ((1, 1), (1, sizes(query)[1])))


def uncapped(scores: ir.Value) -> tuple[ir.Value, float, float]:
    """Scores before they are bent by cap * tanh(x / cap) and scaled; the cap, or 0; and that scale."""
    inner, outer_factor = unscaled(scores)
    tanh = made_by(inner, "Tanh")
    if tanh is None:
        return inner, 0.0, outer_factor
    assert tanh.inputs[0] is not None
    divided = made_by(tanh.inputs[0], "Div")
    if divided is None or scalar(divided.inputs[1]) != outer_factor:
        return scores, 0.0, 1.0
    inner, factor = unscaled(divided.inputs[0])
    return inner, outer_factor, factor


def unscaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """A value before it is multiplied by constants, and their product."""
    assert value is not None
    factor, node = 1.0, made_by(value, "Mul")
    while node is not None:
        left, right = node.inputs
        known, value = (scalar(right), left) if scalar(right) is not None else (scalar(left), right)
        if known is None:
            return node.outputs[0], factor
        assert value is not None
        factor, node = factor * known, made_by(value, "Mul")
    return value, factor


def written(value: ir.Value | None) -> Written | None:
    """The cache that a value [1, A, C, K] is, with heads repeated or as they are, if nothing else reads it."""
    reshaped = made_by(value, "Reshape")
    expanded = None if reshaped is None else made_by(reshaped.inputs[0], "Expand")
    grouped = None if expanded is None else made_by(expanded.inputs[0], "Unsqueeze")
    if reshaped is not None:
        if expanded is None or grouped is None:
            return None
        one, groups, repeated, *last = sizes(expanded.outputs[0])
        if [one, groups, 1, *last] != list(sizes(grouped.outputs[0])):
            return None
        if list(sizes(reshaped.outputs[0])) != [one, groups * repeated, *last]:
            return None
        value = grouped.inputs[0]
    scatter = made_by(value, "ScatterND")
    if scatter is None or len(scatter.outputs[0].uses()) != 1 or not scatter.outputs[0].is_graph_output():
        return None
    past, places, rows = scatter.inputs
    assert past is not None
    assert rows is not None
    position = rows_at(places, sizes(past))
    if position is None or not past.is_graph_input() or len(past.uses()) != 1:
        return None
    return Written(scatter, past, rows, position)


def rows_at(places: ir.Value | None, shape: tuple[int, ...]) -> ir.Value | None:
    """The input [S] of positions, for places that `onnx_ops.index_copy` makes of it along the third of four axes."""
    joined = made_by(places, "Concat")
    if joined is None or len(joined.inputs) != 2 or len(shape) != 4 or min(shape) < 1:
        return None
    lead, last = (made_by(part, "Expand") for part in joined.inputs)
    grid = None if lead is None else constant(lead.inputs[0])
    column = None if last is None else made_by(last.inputs[0], "Reshape")
    position = None if column is None else column.inputs[0]
    expected = np.stack(np.meshgrid(*map(np.arange, shape[:2]), indexing="ij"), axis=-1)[:, :, None]
    if position is None or grid is None or not np.array_equal(grid, expected):
        return None
    return position if position.is_graph_input() and position.dtype == INT64 else None


def flattened(value: ir.Value) -> ir.Node | None:
    """The node that makes [1, S, A * K] of heads [1, A, S, K] that nothing else reads."""
    turned = only_reader(value, "Transpose")
    if turned is None or not permutes(turned, HEADS_AND_TOKENS):
        return None
    made = only_reader(turned.outputs[0], "Reshape")
    _, heads, _, width = sizes(value)
    return made if made is not None and sizes(made.outputs[0])[::2] == (1, heads * width) else None


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


def tokens(spell: Spelling, heads: ir.Value) -> ir.Value:
    """Heads [1, A, S, K] as [1, S, A * K]: what they were made of, or made so."""
    turned = made_by(heads, "Transpose")
    if turned is not None and permutes(turned, HEADS_AND_TOKENS):
        split = made_by(turned.inputs[0], "Reshape")
        _, count, _, width = sizes(heads)
        if split is not None and split.inputs[0] is not None and sizes(split.inputs[0])[::2] == (1, count * width):
            return split.inputs[0]
    _, count, _, width = sizes(heads)
    return spell.op(
        "Reshape",
        spell.op("Transpose", heads, perm=HEADS_AND_TOKENS),
        spell.constant([1, -1, count * width], INT64),
    )


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
