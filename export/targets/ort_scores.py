"""Attention in a translated graph's plain operators: found by its softmax, and its heads as tokens.

Shape suffixes: B batch, A heads, S queries, C keys, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from export.targets.onnx_qdq import Spelling
from export.targets.ort_masks import made_by, scalar

#: permutations: of heads and tokens, and of a matrix for each head
HEADS_AND_TOKENS, MATRICES = (0, 2, 1, 3), (0, 1, 3, 2)


@dataclass(frozen=True)
class Scored:
    """One attention of heads [B, A, S, K] to [B, A, C, K]; `product` is what gives [B, A, S, K].

    `scale` is that of the scores, `cap` bends them where it is not 0, `mask` is added to them then.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    scale: float
    cap: float
    product: ir.Node


def scored(softmax: ir.Node) -> Scored | None:
    """The attention that a softmax is part of, in the spelling of `onnx_ops.attention` or open-coded like it."""
    product = only_reader(softmax.outputs[0], "MatMul")
    if product is None or product.inputs[0] is not softmax.outputs[0]:
        return None
    if softmax.attributes["axis"].as_int() not in (-1, 3):
        return None
    total = made_by(softmax.inputs[0], "Add")
    pairs = [(softmax.inputs[0], None)] if total is None else [tuple(total.inputs), tuple(reversed(total.inputs))]
    for scores, mask in pairs:
        assert scores is not None
        inner, cap, factor = uncapped(scores)
        multiplied = made_by(inner, "MatMul")
        turned = None if multiplied is None else made_by(multiplied.inputs[1], "Transpose")
        if multiplied is None or turned is None or not permutes(turned, MATRICES):
            continue
        query, scale = unscaled(multiplied.inputs[0])
        key, value = turned.inputs[0], product.inputs[1]
        assert key is not None
        assert value is not None
        return Scored(query, key, value, mask, scale * factor, cap, product)
    return None


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
