"""Rotary position embeddings (Su et al., arXiv 2104.09864), the half-split layout that Hugging Face weights use.

Shape suffixes: C positions, S tokens, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are slowed for contexts longer than those of pre-training, with the names of config.json.

    `linear`: all by `factor` (Chen et al., arXiv 2306.15595). `llama3`: those that turn less than `low_freq_factor`
    times in the original context by `factor`, those that turn more than `high_freq_factor` times not at all, between
    them gradually (Llama 3.1, arXiv 2407.21783).
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __call__(self, frequency: Tensor) -> Tensor:
        """The frequencies as they become."""
        if self.rope_type == "linear":
            return frequency / self.factor
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0, 1)
        return frequency * (blend + (1 - blend) / self.factor)


#: `rope_type` of a config.json -> whether frequencies are scaled
ROPE_TYPES: Mapping[str, bool] = {"default": False, "linear": True, "llama3": True}


class RotaryTable(nn.Module):
    """Positions [S] (int64) to cosines and sines [S, K], looked up.

    A table rather than arithmetic in the graph: an angle computed in fp16 is off by a radian at position 2000.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, positions: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.head_width, self.positions, self.theta, self.scaling = head_width, positions, theta, scaling
        for name, table_CK in self.tables().items():
            self.register_buffer(name, table_CK)

    def tables(self) -> dict[str, Tensor]:
        """The values of the buffers; asked for again where the module was built on fake tensors."""
        exponent = torch.arange(0, self.head_width, 2, dtype=torch.float64) / self.head_width
        frequency = self.theta**-exponent
        if self.scaling is not None:
            frequency = self.scaling(frequency)
        angle = torch.outer(torch.arange(self.positions, dtype=torch.float64), frequency)
        angle_CK = torch.cat([angle, angle], dim=1)
        return {"cos": angle_CK.cos().float(), "sin": angle_CK.sin().float()}

    def forward(self, position_S: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos.index_select(0, position_S), self.sin.index_select(0, position_S)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + K/2) of the last axis of `x` by the angles whose cosines and sines broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
