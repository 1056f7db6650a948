"""Projectors of any depth, as DeepSeek's systems have them (https://github.com/deepseek-ai/Janus)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS


class DeepMLP(nn.Module):
    """Features [B, N, in] to embeddings [B, N, out]: `depth` linear layers with activations between them."""

    def __init__(self, in_features: int, out_features: int, depth: int, activation: str) -> None:
        super().__init__()
        widths = [in_features, *[out_features] * depth]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_BND: Tensor) -> Tensor:
        first, *others = self.layers
        x_BND = first(x_BND)
        for layer in others:
            x_BND = layer(self.activation(x_BND))
        return x_BND
