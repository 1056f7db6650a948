"""Attention of many queries as that of some at a time, where its scores would be large and a runtime holds them whole.

Llama-3.2-Vision's tower attends among four tiles at once: 6432 tokens of 16 heads, 2.5 GiB of scores, two or three
times over. Each query's output is its own, so slices of queries give the same numbers. coremltools has such a pass,
too: `scaled_dot_product_attention_sliced_q`.
Shape suffixes: B batch, A heads, S queries, C keys, K head width.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from graphs.program import Program
from graphs.rewrite import Opened

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default

#: float32 scores of one slice take at most so many bytes
MOST_BYTES = 256 << 20


def slice_attention(program: Program, most: int = MOST_BYTES) -> Program:
    """`program` with attention whose scores would take more than `most` bytes in slices; it computes the same."""
    for method in program:
        if all(slices(node, most) == 1 for node in program.methods[method].exported.graph.nodes):
            continue
        opened = Opened.open(program, method)
        for node in list(opened.graph.nodes):
            if (count := slices(node, most)) > 1:
                replace(opened.graph, node, count)
        program = opened.lift()
    return program


def slices(node: fx.Node, most: int = MOST_BYTES) -> int:
    """How many slices a node is worth: more than one only for attention of fixed sizes."""
    if node.target is not ATTENTION or len(node.args) > 4 or set(node.kwargs) - {"scale", "attn_mask"}:
        return 1
    query_BASK, key_BACK = (read.meta["val"] for read in node.all_input_nodes[:2])
    sizes = (*query_BASK.shape[:-1], key_BACK.shape[-2])
    if len(sizes) != 4 or not all(isinstance(size, int) for size in sizes):
        return 1
    return min(-(-4 * math.prod(sizes) // most), int(query_BASK.shape[-2]))


def replace(graph: fx.Graph, node: fx.Node, count: int) -> None:
    """Put `count` slices in place of one attention."""
    query, key, value = node.args[:3]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    total = node.meta["val"].shape[-2]
    step = -(-total // count)
    with graph.inserting_before(node):
        outputs = []
        for start in range(0, total, step):
            end = min(start + step, total)
            some = graph.call_function(aten.slice.Tensor, (query, -2, start, end))
            shown = mask
            if isinstance(mask, fx.Node) and mask.meta["val"].shape[-2] != 1:
                shown = graph.call_function(aten.slice.Tensor, (mask, -2, start, end))
            kwargs = {"scale": node.kwargs["scale"]} if "scale" in node.kwargs else {}
            made = graph.call_function(ATTENTION, (some, key, value, shown), kwargs)
            outputs.append(graph.call_function(aten.transpose.int, (made, 1, 2)))
        joined_BSAK = graph.call_function(aten.cat.default, (outputs, 1))  # tokens lie together, as in what is replaced
        joined = graph.call_function(aten.transpose.int, (joined_BSAK, 1, 2))
    node.replace_all_uses_with(joined)
    graph.erase_node(node)
