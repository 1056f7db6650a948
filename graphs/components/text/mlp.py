"""Feed-forward networks of text decoders.

Shape suffixes: B batch, S tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.text.config import TextConfig


class GatedMLP(nn.Module):
    """The gated feed-forward network (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_BSD)) * self.up_proj(x_BSD))


class PlainMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x_BSD)))
