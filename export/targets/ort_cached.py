"""Where a translated graph attends over a cache that it has just written: found by its operators.

Shape suffixes: A heads, G key-value heads, S new tokens, C context, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.targets.ort_masks import Hidden, Mask, constant, made_by, mask_of
from export.targets.ort_scores import flattened, scored, sizes

#: a head's width is a multiple of this where `GroupQueryAttention` takes it
WIDTH_MULTIPLE = 8
#: nodes by which attention reads its keys: heads repeated, turned, multiplied, scaled, bent, masked, normalized, ..
MOST_BETWEEN = 16


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


def attention_of(softmax: ir.Node) -> Attention | None:
    """The attention over a cache that a softmax is part of."""
    found = scored(softmax)
    out = None if found is None else flattened(found.product.outputs[0])
    if found is None or found.mask is None or out is None:
        return None
    keys, values = written(found.key), written(found.value)
    if keys is None or values is None or keys.position is not values.position:
        return None
    if keys.sizes != values.sizes or not heads_fit(found.query, keys):
        return None
    inside = [between(cache.scatter, out) for cache in (keys, values)]
    if None in inside or any(found.mask.producer() in nodes for nodes in inside if nodes):
        return None
    hides = mask_of(found.mask, keys.position)
    if hides.hidden is Hidden.NOTHING or not mask_fits(found.mask, found.query, keys):
        return None
    return Attention(found.query, found.scale, found.cap, keys, values, found.mask, hides, out)


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
