"""Attention over a cache as `llama.custom_sdpa`, which reads the tokens so far; products of XNNPACK read all of it.

The operator is of ExecuTorch's kernels for language models, which its clients for them link, as they link those of
quantized embeddings (https://github.com/pytorch/executorch/tree/main/extension/llm/custom_ops). So methods with
quantized layers get it; others stay with what every ExecuTorch runtime has. It reads caches [1, C, G, K], so those
that only such attention reads are kept in that layout, where ours are [1, G, C, K].

Shape suffixes: A query heads, G key-value heads, S new tokens, C context, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphs.components.text.cache import MASKED
from graphs.program import Program
from graphs.rewrite import Opened
from graphs.spec import TensorSpec

aten = torch.ops.aten

#: what the operators of quantized layers are called
QUANTIZED = "quantized_decomposed."

#: operators by which each key-value head is repeated for the queries that share it
REPEATS = (
    aten.unsqueeze.default,
    aten.expand.default,
    aten.clone.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
)

#: operators that change a mask's dtype
CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class Cached:
    """Attention of queries [1, A, S, K] to the caches that were written at `position` [S]: causal, nothing else."""

    node: fx.Node
    key: fx.Node
    value: fx.Node
    position: fx.Node


def attend(program: Program) -> Program:
    """`program` with that operator wherever a cache is read by position; it computes the same for consecutive ones."""
    for method in program:
        opened = Opened.open(program, method)
        if not any(str(node.target).startswith(QUANTIZED) for node in opened.graph.nodes):
            continue
        found = alone([cached for node in opened.graph.nodes if (cached := match(node)) is not None])
        if found:
            import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  # defines the operator

            starts: dict[fx.Node, fx.Node] = {}
            for cached in found:
                replace(opened.graph, cached, starts)
            state = {spec.name: spec for spec in program.methods[method].signature.state}
            caches = dict.fromkeys(cache for cached in found for cache in (cached.key, cached.value))
            program = opened.retrace(state=tuple(lay_out(opened, cache, state) for cache in caches))
    return program


def alone(found: list[Cached]) -> list[Cached]:
    """Those whose caches nothing else reads."""
    nodes = {cached.node for cached in found}
    kept = [cached for cached in found if all(belongs(cache, nodes) for cache in (cached.key, cached.value))]
    return kept if len(kept) == len(found) else alone(kept)


def belongs(cache: fx.Node, attention: set[fx.Node]) -> bool:
    """Whether only some attention reads a cache as it was written, and nothing as it was before."""
    buffer: Any = cache.args[0]
    kept = {user for user in buffer.users if user.target is aten.copy_.default and user.args[1] is cache}
    return buffer.users.keys() == {cache, *kept} and leads(cache, attention | kept)


def leads(node: fx.Node, ends: set[fx.Node]) -> bool:
    """Whether a node, repeated or not, goes to some nodes alone."""
    return all(user in ends or (user.target in REPEATS and leads(user, ends)) for user in node.users)


def lay_out(opened: Opened, cache: fx.Node, state: Mapping[str, TensorSpec]) -> TensorSpec:
    """Let a cache be [1, C, G, K]; its spec."""
    buffer, _, position, new_1GSK = cache.args
    assert isinstance(buffer, fx.Node)
    assert isinstance(new_1GSK, fx.Node)
    spec = state[str(buffer.target)]
    _, groups, context, width = buffer.meta["val"].shape
    shape = (1, context, groups, width)
    opened.reshape(spec.name, shape)
    with opened.graph.inserting_before(cache):
        cache.args = (buffer, 1, position, turned(opened.graph, new_1GSK))
    return dataclasses.replace(spec, shape=shape)


def turned(graph: fx.Graph, heads: fx.Node) -> fx.Node:
    """[1, S, A, K] of heads [1, A, S, K], at the point where the graph is written."""
    if heads.target is aten.transpose.int and heads.args[1:] == (1, 2):
        assert isinstance(heads.args[0], fx.Node)
        return heads.args[0]
    return graph.call_function(aten.transpose.int, (heads, 1, 2))


def match(node: fx.Node) -> Cached | None:
    """What an attention reads, if it is of the kind that can be replaced."""
    if (
        node.target is not aten.scaled_dot_product_attention.default
        or len(node.args) != 4
        or set(node.kwargs) - {"scale"}
    ):
        return None
    query, key, value, mask = (read for read in node.args if isinstance(read, fx.Node))
    caches = [written(read) for read in (key, value)]
    if None in caches or mask is None or query.meta["val"].dtype is not torch.float32:
        return None
    (key_cache, position), (value_cache, other) = caches  # type: ignore[misc]
    if other is not position or not causal(mask, position, key_cache.meta["val"].shape[2]):
        return None
    return Cached(node, key_cache, value_cache, position)


def written(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The cache [1, G, C, K] that `node` is, or repeats, as it was written, and the positions where."""
    steps = []
    while node.target in REPEATS:
        steps.append(node)
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    if node.target is not aten.index_copy.default or node.args[1] != 2:
        return None
    if steps and not (steps[-1].target is aten.unsqueeze.default and steps[-1].args[1] == 2 and len(steps) > 1):
        return None
    position = node.args[2]
    assert isinstance(position, fx.Node)
    return node, position


def causal(mask: fx.Node, position: fx.Node, context: int) -> bool:
    """Whether a mask [S, C] hides the keys behind each query's position, and nothing else, as `causal_mask` does."""
    while mask.target in CASTS:
        assert isinstance(mask.args[0], fx.Node)
        mask = mask.args[0]
    if mask.target is not aten.where.Scalar or mask.args[1:] != (0.0, MASKED):
        return False
    visible: Any = mask.args[0]
    if visible.target is not aten.le.Tensor:
        return False
    keys, queries = visible.args
    counted = keys.target is aten.arange.default and keys.args == (context,)
    return counted and queries.target is aten.unsqueeze.default and queries.args == (position, 1)


def replace(graph: fx.Graph, cached: Cached, starts: dict[fx.Node, fx.Node]) -> None:
    """Exchange one attention; `starts` holds the first position of each vector of them, as a number."""
    node, position = cached.node, cached.position
    if position not in starts:
        with graph.inserting_after(position):
            first = graph.call_function(aten.select.int, (position, 0, 0))
        with graph.inserting_after(first):
            starts[position] = graph.call_function(aten.item.default, (first,))
    query: Any = node.args[0]
    with graph.inserting_before(node):
        arguments = (turned(graph, query), cached.key, cached.value, starts[position], None, 0.0, True)
        out_1SAK = graph.call_function(torch.ops.llama.custom_sdpa.default, (*arguments, node.kwargs.get("scale")))
        out_1ASK = graph.call_function(aten.transpose.int, (out_1SAK, 1, 2))
    for user in list(node.users):
        if user.target is aten.transpose.int and user.args == (node, 1, 2):
            user.replace_all_uses_with(out_1SAK)
    node.replace_all_uses_with(out_1ASK)
    graph.erase_node(node)
