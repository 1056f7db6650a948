"""Mixture of experts in a decoder: each token is routed to a few of many gated networks (Aria, arXiv 2410.05993).

All experts compute for every token: which of them a token needs is known only when the graph runs, and no target takes
shapes that depend on data. Side by side they are one wide gated network whose hidden values are weighted by how much
the router gives to the expert that made them, none to those not chosen; the last projection adds them up. So they
stay three matrices that any recipe of linear layers quantizes. It costs as many operations as a dense network of that
width; decoding reads all of the weights.
Shape suffixes: B batch, S tokens, D width, E experts, I width of one expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.text.cache import MASKED
from graphs.components.text.config import TextConfig
from graphs.components.text.mlp import GatedMLP


class RoutedExperts(nn.Module):
    """The experts that a router chooses for each token, each a gated network with SiLU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.experts, self.chosen = config.moe_num_experts, config.moe_topk
        width = self.experts * config.intermediate_size
        self.router = nn.Linear(config.hidden_size, self.experts, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def shares(self, x_BSD: Tensor) -> Tensor:
        """How much each expert counts [B, S, E]: a softmax over the chosen ones, 0 for the others."""
        scores_BSE = self.router(x_BSD)
        # By index: a score at the edge may differ from its own value among the highest, where a runtime rounds but one.
        chosen_BSkE = torch.topk(scores_BSE, self.chosen, dim=-1).indices.unsqueeze(-1) == torch.arange(self.experts)
        return torch.softmax(torch.where(chosen_BSkE.any(-2), scores_BSE, MASKED), dim=-1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden_BSEI = (F.silu(self.gate_proj(x_BSD)) * self.up_proj(x_BSD)).unflatten(-1, (self.experts, -1))
        return self.down_proj((hidden_BSEI * self.shares(x_BSD).unsqueeze(-1)).flatten(2))


class MixtureOfExperts(nn.Module):
    """Routed experts and those that every token shares, which are one network of their widths together."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.routed = RoutedExperts(config)
        shared = config.intermediate_size * config.moe_num_shared_experts
        self.shared_experts = GatedMLP(replace(config, intermediate_size=shared))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.routed(x_BSD) + self.shared_experts(x_BSD)
