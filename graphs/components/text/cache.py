"""The one KV cache contract: buffers [1, G, C, K] that every target accepts, written at a vector of positions.

ExecuTorch keeps the buffers, ONNX and TensorRT take them as inputs and outputs, Core ML makes them states.
Shape suffixes: G key-value heads, S new tokens, C context, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphs.spec import TensorSpec

#: added to the score of a key that a query may not see; finite, so that fp16 has it and no guard against NaN is needed
MASKED = -30000.0


class KVCache(nn.Module):
    """Keys and values of one layer; `forward` writes the new ones at `position_S` and returns all of them."""

    k: Tensor
    v: Tensor

    def __init__(self, heads: int, context: int, head_width: int) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(1, heads, context, head_width))
        self.register_buffer("v", torch.zeros(1, heads, context, head_width))

    def forward(self, k_1GSK: Tensor, v_1GSK: Tensor, position_S: Tensor) -> tuple[Tensor, Tensor]:
        self.k.index_copy_(2, position_S, k_1GSK)
        self.v.index_copy_(2, position_S, v_1GSK)
        return self.k, self.v


def causal_mask(position_S: Tensor, context: int, dtype: torch.dtype, window: int = 0, prefix: bool = False) -> Tensor:
    """[S, C] to add to scores: 0 where key c is at or before the query's position, `MASKED` elsewhere.

    With a `window`, only the last `window` keys are seen, the query's own among them. With `prefix`, all keys of the
    same call are seen besides: a prompt read in one call is bidirectional, what is generated after it causal.
    """
    # Logical operators by name: coremltools has none for `&` and `|`
    key_C, position_S1 = torch.arange(context, device=position_S.device), position_S.unsqueeze(1)
    visible_SC = key_C <= position_S1
    if 0 < window < context:
        visible_SC = visible_SC.logical_and(key_C > position_S1 - window)
    if prefix:
        same_call_C = (key_C >= position_S[:1]).logical_and(key_C <= position_S[-1:])
        visible_SC = visible_SC.logical_or(same_call_C)
    return torch.where(visible_SC, 0.0, MASKED).to(dtype)


def caches(decoder: nn.Module) -> tuple[TensorSpec, ...]:
    """The state of every `KVCache` in a decoder, by name."""
    return tuple(
        TensorSpec(f"{name}.{part}", tuple(buffer.shape))
        for name, module in decoder.named_modules()
        if isinstance(module, KVCache)
        for part, buffer in module.named_buffers()
    )
