"""Graphs in the form that XNNPACK takes whole: every operator it lacks cuts the graph into one more delegate.

A delegate more costs time when it runs (tensors cross its border) and when it is made (XNNPACK's passes run for each).
So attention is written without the guards against NaN of PyTorch's own decomposition, the mean inside an RMS norm is a
matrix product with a constant column, reshapes of one dynamic dimension infer it, and numbers in float arithmetic are
floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node
from torch.nn import functional as F

from graphs.program import Program

aten = torch.ops.aten


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q K^T * scale + mask) V over [B, A, S, K] with two batched products and no copy of keys and values.

    A mask is additive, [S, C] or of four dimensions, and hides no whole row; other forms are left to PyTorch's
    decomposition.
    """
    plain_mask = attn_mask is None or (attn_mask.dim() in (2, 4) and attn_mask.is_floating_point())
    if query.dim() != 4 or not plain_mask or is_causal or enable_gqa:
        return NotImplemented
    batch, heads, _, width = query.shape
    q, k, v = (t.reshape(batch * heads, -1, t.shape[-1]) for t in (query, key, value))
    scores = torch.bmm(q * (width**-0.5 if scale is None else scale), k.transpose(1, 2))
    if attn_mask is not None and attn_mask.dim() == 2:
        scores = scores + attn_mask
    elif attn_mask is not None:
        scores = (scores.reshape(batch, heads, *scores.shape[1:]) + attn_mask).reshape(scores.shape)
    out = torch.bmm(scores.softmax(-1), v).reshape(batch, heads, -1, value.shape[-1])
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # the strides of the operator that this stands for


def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if len(shape) != 1 or eps is None:
        return NotImplemented
    column = torch.full((1, shape[0]), 1 / shape[0], dtype=x.dtype)
    x_normed = x * torch.rsqrt(F.linear(x * x, column, torch.full((1,), eps, dtype=x.dtype)))
    return x_normed if weight is None else x_normed * weight


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.rms_norm.default: rms_norm,
}

ARITHMETIC = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def legalize(program: Program) -> Program:
    """`program` in operators that XNNPACK takes; it computes the same."""
    for name, traced in program.methods.items():
        exported = traced.exported.run_decompositions(DECOMPOSITIONS)
        infer_reshapes(exported.graph)
        float_numbers(exported.graph)
        count_no_padding(exported.graph)
        values = operands_as_buffers(exported)
        exported.graph_module.recompile()
        constants = {f"{name}.{entry}": value for entry, value in values.items()}
        names = {**traced.weight_names, **{entry: f"{name}.{entry}" for entry in values}}
        program = program.replace(name, replace(traced, exported=exported, weight_names=names), constants)
    return program


def float_numbers(graph: Graph) -> None:
    """Write numbers that float arithmetic takes as floats, in place: passes cast integers, at every call."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.target in ARITHMETIC and isinstance(value, Tensor) and value.is_floating_point():
            node.args = tuple(float(read) if type(read) is int else read for read in node.args)


def operands_as_buffers(exported: ExportedProgram) -> dict[str, Tensor]:
    """Turn every `full` that a linear layer reads into a buffer, in place: XNNPACK packs weights only; their values."""
    graph, inputs = exported.graph, exported.graph_signature.input_specs
    first_input = exported.graph_signature.user_inputs[0]
    before = next(node for node in graph.nodes if node.name == first_input)
    values: dict[str, Tensor] = {}
    made: dict[tuple[Any, ...], Node] = {}
    for node in graph.find_nodes(op="call_function", target=aten.full.default):
        if any(user.target is not aten.linear.default for user in node.users):
            continue
        size, fill = node.args[:2]
        value = torch.full(size, fill, dtype=node.meta["val"].dtype)
        alike = (*size, fill, value.dtype)
        if alike not in made:
            entry = f"constant_{len(values)}"
            with graph.inserting_before(before):
                made[alike] = graph.placeholder(f"b_{entry}")
            made[alike].meta = {"val": node.meta["val"]}
            spec = InputSpec(InputKind.BUFFER, TensorArgument(made[alike].name), entry, persistent=True)
            inputs.insert(next(i for i, s in enumerate(inputs) if s.arg.name == first_input), spec)
            exported._state_dict = {**exported.state_dict, entry: node.meta["val"]}
            values[entry] = value
        node.replace_all_uses_with(made[alike])
        graph.erase_node(node)
    return values


def infer_reshapes(graph: Graph) -> None:
    """Write -1 for the only symbolic dimension of a reshape, in place: XNNPACK infers one and takes no symbols."""
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        shape = list(node.args[1])
        symbolic = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        if len(symbolic) == 1 and -1 not in shape:
            shape[symbolic[0]] = -1
            node.update_arg(1, shape)
    graph.eliminate_dead_code()  # the operators that computed those symbols


def count_no_padding(graph: Graph) -> None:
    """Say of mean pooling without padding that padding does not count, in place: XNNPACK takes no other."""
    for node in graph.find_nodes(op="call_function", target=aten.avg_pool2d.default):
        kernel = node.args[1]
        stride, padding, ceil_mode = (node.args[2:5] + ([], [0, 0], False)[len(node.args) - 2 :])[:3]
        if not any(padding) and not ceil_mode:
            node.args = (node.args[0], kernel, stride or kernel, padding, ceil_mode, False, *node.args[6:])


def operators(graph: Graph, delegate: Any) -> dict[str, Any]:
    """How many calls of `delegate` a lowered graph makes, and the operators that run outside, by name."""
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and node.target is not delegate:
            counts[schema.name] += 1
    delegates = sum(node.target is delegate for node in graph.nodes)
    return {"delegates": delegates, "portable_operators": dict(counts.most_common())}
