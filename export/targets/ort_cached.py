"""Where a translated graph attends over a cache that it has just written: found by its operators.

Shape suffixes: B batch, A heads, G key-value heads, S new tokens, C context, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.targets.onnx_qdq import Spelling
from export.targets.ort_masks import Hidden, Mask, constant, made_by, mask_of, scalar

#: a head's width is a multiple of this where `GroupQueryAttention` takes it
WIDTH_MULTIPLE = 8
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
    return position if position.is_graph_input() and position.dtype == ir.DataType.INT64 else None


def flattened(value: ir.Value) -> ir.Node | None:
    """The node that makes [B, S, A * K] of heads [B, A, S, K] that nothing else reads."""
    turned = only_reader(value, "Transpose")
    if turned is None or not permutes(turned, HEADS_AND_TOKENS):
        return None
    made = only_reader(turned.outputs[0], "Reshape")
    return made if made is not None and joins(turned.outputs[0], made.outputs[0]) else None


def joins(heads: ir.Value, tokens: ir.Value) -> bool:
    """Whether values are [B, S, A, K] and [B, S, A * K], as far as shapes tell."""
    if heads.shape is None or tokens.shape is None or (len(heads.shape), len(tokens.shape)) != (4, 3):
        return False
    return tokens.shape[0] == heads.shape[0] and sizes(tokens)[2] == math.prod(sizes(heads)[2:])


def tokens_of(heads: ir.Value) -> ir.Value | None:
    """The [B, S, A * K] that heads [B, A, S, K] were made of."""
    turned = made_by(heads, "Transpose")
    if turned is None or not permutes(turned, HEADS_AND_TOKENS):
        return None
    split = made_by(turned.inputs[0], "Reshape")
    whole = None if split is None else split.inputs[0]
    return whole if split is not None and whole is not None and joins(split.outputs[0], whole) else None


def tokens(spell: Spelling, heads: ir.Value) -> ir.Value:
    """Heads [B, A, S, K] as [B, S, A * K]: what they were made of, or made so."""
    _, count, _, width = sizes(heads)
    return tokens_of(heads) or spell.reshape(spell.op("Transpose", heads, perm=HEADS_AND_TOKENS), 2, count * width)
