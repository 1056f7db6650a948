"""Keys and values that a decoder reads of states from outside: made once for a prompt or a picture, not at every token.

Shape suffixes: B batch (1 when deployed), T states that are read, D their width, A heads, K head width, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: keys and values, [B, A, T, K] each
Pair = tuple[Tensor, Tensor]


class KeysValues(nn.Module):
    """States [B, T, `width`] to what attention with `heads` heads of `head_width` reads of them."""

    def __init__(self, width: int, heads: int, head_width: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(width, heads * head_width, bias)
        self.value = nn.Linear(width, heads * head_width, bias)

    def forward(self, seen_BTD: Tensor) -> Pair:
        k_BATK, v_BATK = (
            proj(seen_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.key, self.value)
        )
        return k_BATK, v_BATK


class CrossCaches(nn.Module):
    """States [1, T, `width`] to the keys and values of all layers, [L, A, T, K] each."""

    def __init__(self, layers: int, width: int, heads: int, head_width: int, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KeysValues(width, heads, head_width, bias) for _ in range(layers))

    def forward(self, seen_1TD: Tensor) -> Pair:
        keys, values = zip(*(layer(seen_1TD) for layer in self.layers), strict=True)
        return torch.cat(keys), torch.cat(values)


def of_layer(keys_LATK: Tensor, values_LATK: Tensor, layer: int) -> Pair:
    """The keys and values of one layer, [1, A, T, K] each."""
    return keys_LATK[layer : layer + 1], values_LATK[layer : layer + 1]
