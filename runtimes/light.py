"""A graph in calls that torch runs in little memory and time on a CPU.

Large quantized linear layers run some rows at a time: a vocabulary's head is never whole in floats. Convolutions of
half precision run in float32 and are rounded once, as a GPU's are: where a CPU has no instructions for float16, torch
takes 18.2 s for one of 128 x 128 channels on 192 x 192, and 0.06 in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from quant import ops

#: elements of a weight from which on it is dequantized in parts, and of a part
LARGE, PART = 1 << 25, 1 << 22

aten = torch.ops.aten
LINEAR = aten.linear.default
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose2d.input,
    aten.convolution.default,
)


def linear_by_rows(
    x: Tensor, q_OK: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group: int, bias_O: Tensor | None
) -> Tensor:
    """x [..., K] through the layer whose weight is `vlmx::dequantize` of the other operands: [..., O]."""
    rows = max(1, PART // q_OK.shape[1])
    made = []
    for start in range(0, len(q_OK), rows):
        some = slice(start, start + rows)
        zero = None if zero_point is None else zero_point[some]
        weight = ops.dequantize(q_OK[some], scale[some], zero, bits, group)
        made.append(F.linear(x, weight, None if bias_O is None else bias_O[some]))
    return torch.cat(made, -1)


def in_float32(operator: Callable[..., Tensor], x: Tensor, *others: Any, **named: Any) -> Tensor:
    """What an operator makes of tensors in float32, in the dtype of `x`."""
    wide = (other.float() if isinstance(other, Tensor) else other for other in others)
    return operator(x.float(), *wide, **named).to(x.dtype)


def lighten(module: nn.Module) -> None:
    """Change what an unlifted graph calls, in place. Results may differ in their last bits."""
    if not isinstance(module, fx.GraphModule):
        return
    for node in module.graph.nodes:
        if node.target in CONVOLUTIONS and node.meta["val"].dtype == torch.float16:
            node.args, node.target = (node.target, *node.args), in_float32
    for node in module.graph.find_nodes(op="call_function", target=LINEAR):
        x, weight, *bias = node.args
        if weight.target is not ops.dequantize._opoverload or weight.meta["val"].numel() < LARGE:
            continue
        with module.graph.inserting_before(node):
            made = module.graph.call_function(linear_by_rows, (x, *weight.args, bias[0] if bias else None))
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
