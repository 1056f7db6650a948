"""Attention to what a call itself computes as ONNX Runtime's `MultiHeadAttention`, not as scores in plain operators.

Plain scores of all queries and keys are held three times at once: 3 GiB for 4096 tokens of 16 heads. The operator holds
them once where there is a mask, and where there is none a block of them that stays in the cache, as in FlashAttention
(https://arxiv.org/abs/2205.14135).
Shape suffixes: B batch, A heads, S queries, C keys, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from export.targets.onnx_qdq import Spelling
from export.targets.ort_patterns import MICROSOFT
from export.targets.ort_scores import HEADS_AND_TOKENS, Scored, flattened, scored, sizes, tokens, tokens_of


def fuse_multi_head(model: ir.Model) -> None:
    """Put the operator for every attention that it computes as it is."""
    for node in list(model.graph):
        found = scored(node) if node.op_type == "Softmax" else None
        if found is not None and fits(found):
            replace(model.graph, found)
    common.RemoveUnusedNodesPass()(model)


def fits(found: Scored) -> bool:
    """Whether the operator takes these heads and that mask, and keys need not be turned anew for every token."""
    heads = (found.query, found.key, found.value)
    shapes = [tuple(each.shape or ()) for each in heads]
    if any(each.dtype != ir.DataType.FLOAT for each in heads) or any(len(shape) != 4 for shape in shapes):
        return False
    (batch, count, queries, _), (_, _, keys, _), _ = shapes
    if any(shape[:2] != (batch, count) or not isinstance(shape[3], int) for shape in shapes):
        return False
    if found.cap or not isinstance(count, int) or not (found.mask is None or covers(found.mask, shapes[0], keys)):
        return False
    return isinstance(queries, int) or queries == keys or None not in map(tokens_of, heads[1:])


def covers(mask: ir.Value, query: Sequence[object], keys: object) -> bool:
    """Whether a mask can be given to the operator, for queries [B, A, S, K] and so many keys."""
    *lead, rows, columns = tuple(mask.shape or (None, None))
    repeated = all(size in (1, whole) for size, whole in zip(lead, query, strict=False))
    spread = rows == 1 and (isinstance(query[2], int) or query[2] == keys)
    return len(lead) in (0, 2) and repeated and columns == keys and (rows == query[2] or spread)


def bias(spell: Spelling, mask: ir.Value, queries: object) -> ir.Value:
    """A mask with four axes, and a row for each query; where they are not a fixed number, they are as many as keys."""
    *lead, rows, _ = tuple(mask.shape or (None, None))
    if not lead:
        mask = spell.op("Unsqueeze", mask, spell.constant([0, 1], ir.DataType.INT64))
    if rows == queries:
        return mask
    one = spell.constant([1], ir.DataType.INT64)
    fixed = spell.constant([queries], ir.DataType.INT64) if isinstance(queries, int) else None
    count = fixed or spell.op("Shape", mask, start=3)
    return spell.op("Expand", mask, spell.op("Concat", one, one, count, one, axis=0))


def replace(graph: ir.Graph, found: Scored) -> None:
    """Put the operator in place of one attention."""
    out = flattened(found.product.outputs[0])
    spell = Spelling(graph, out or found.product)
    count, width = sizes(found.query)[1], sizes(found.value)[3]
    parts: list[ir.Value | None] = [tokens(spell, each) for each in (found.query, found.key, found.value)]
    if found.mask is not None:
        parts += [None, None, bias(spell, found.mask, tuple(found.query.shape or ())[2])]
    made = spell.op("MultiHeadAttention", *parts, domain=MICROSOFT, num_heads=count, scale=found.scale)
    if out is None:
        made = spell.op("Transpose", spell.reshape(made, 2, count, width), perm=HEADS_AND_TOKENS)
    spell.replace([made])
    graph.opset_imports.setdefault(MICROSOFT, 1)
