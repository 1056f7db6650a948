"""How the operators of a traced graph are spelled in ONNX, where the exporter's own spelling is slower or larger.

Each function takes the tensors and attributes of one ATen operator and emits plain operators (opset 18 and later) with
static sizes folded in. Shape suffixes: B batch, A heads, S queries, C keys, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18

op: Any = opset18  # its methods record nodes here, they compute nothing
aten = torch.ops.aten
FLOAT = ir.DataType.FLOAT


def scalar(value: float, dtype: ir.DataType) -> Any:
    """A constant of rank 0."""
    return op.Constant(value=ir.tensor(np.asarray(value, dtype=dtype.numpy())))


def integers(values: Sequence[int]) -> Any:
    """An int64 vector."""
    return op.Constant(value=ir.tensor(np.asarray(values, dtype=np.int64)))


def attention(
    query_BASK: Any,
    key_BACK: Any,
    value_BACK: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q k^T * scale + mask) v; the mask is additive, so that no row needs a guard against NaN."""
    if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL):
        raise ValueError("attention must arrive with an additive mask and expanded heads")
    scale = scale or 1 / math.sqrt(query_BASK.shape[-1])
    scaled_BASK = op.Mul(query_BASK, scalar(scale, query_BASK.dtype))
    scores_BASC = op.MatMul(scaled_BASK, op.Transpose(key_BACK, perm=[0, 1, 3, 2]))
    if attn_mask is not None:  # ATen takes an fp32 mask beside fp16 queries, ONNX does not
        same = attn_mask.dtype == query_BASK.dtype
        scores_BASC = op.Add(scores_BASC, attn_mask if same else op.Cast(attn_mask, to=query_BASK.dtype))
    return op.MatMul(op.Softmax(scores_BASC, axis=-1), value_BACK)


def rms_norm(x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight in fp32: the very pattern that ONNX Runtime fuses to one kernel."""
    axes = integers([-1 - i for i in range(len(normalized_shape))])
    wide = x if x.dtype == FLOAT else op.Cast(x, to=FLOAT)
    eps = eps or float(np.finfo(np.float32).eps)
    mean = op.ReduceMean(op.Pow(wide, scalar(2.0, FLOAT)), axes, keepdims=1)
    normed = op.Div(wide, op.Sqrt(op.Add(mean, scalar(eps, FLOAT))))
    normed = normed if x.dtype == FLOAT else op.Cast(normed, to=x.dtype)
    return normed if weight is None else op.Mul(normed, weight)


def index_copy(x: Any, dim: int, index_S: Any, source: Any) -> Any:
    """`x` with the slices at `index_S` of axis `dim` replaced: rows scattered in place, without transposing `x`.

    ONNX Runtime writes only the new rows where the caller binds one buffer to the state's input and output.
    """
    lead = [int(size) for size in x.shape[:dim]]
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in lead), indexing="ij"), axis=-1)[..., None, :]
    length = op.Shape(index_S)
    lead_shape, last = integers(lead), integers([1])
    places = op.Expand(op.Reshape(index_S, integers([*[1] * dim, -1, 1])), op.Concat(lead_shape, length, last, axis=0))
    if dim:
        grid_shape = op.Concat(lead_shape, length, integers([dim]), axis=0)
        lead_grid = op.Expand(op.Constant(value=ir.tensor(grid.astype(np.int64))), grid_shape)
        places = op.Concat(lead_grid, places, axis=-1)
    return op.ScatterND(x, places, source)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x W^T + b; the transpose of a constant weight is folded when the weight is written."""
    out = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return out if bias is None else op.Add(out, bias)


def view(x: Any, size: Sequence[Any]) -> Any:
    """A reshape whose one dynamic size is left for the runtime to infer, rather than measured in the graph."""
    sizes = [s if isinstance(s, int) else -1 for s in size]
    if sizes.count(-1) > 1:
        parts = [integers([s]) if isinstance(s, int) else op.Reshape(s, integers([1])) for s in size]
        return op.Reshape(x, op.Concat(*parts, axis=0))
    return op.Reshape(x, integers(sizes))


def index_select(x: Any, dim: int, index_S: Any) -> Any:
    """The slices of axis `dim` at the indices of a vector."""
    return op.Gather(x, index_S, axis=dim)


#: for the `custom_translation_table` of torch.onnx.export
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.rms_norm.default: rms_norm,
    aten.index_copy.default: index_copy,
    aten.index_select.default: index_select,
    aten.linear.default: linear,
    aten.view.default: view,
    aten._unsafe_view.default: view,
}
