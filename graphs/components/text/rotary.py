"""Rotary position embeddings (Su et al., arXiv 2104.09864), the half-split layout that Hugging Face weights use.

Shape suffixes: C positions, S tokens, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
ROPE_TYPES: Mapping[str, bool] = {
    "default": False,
    "mrope": False,  # positions of three components, as `mrope_section` says
    "dynamic": False,  # changes nothing within the context of pre-training, which bounds a bundle's
    "linear": True,
    "llama3": True,
}


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


def mixed(table: RotaryTable, position_3S: Tensor, sections: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, K] of positions with three components (M-RoPE of Qwen2-VL, arXiv 2409.12191).

    Of each half of a head, the first `sections[0]` pairs turn by the first component, the next by the second, ...
    """
    length = position_3S.shape[1]
    parts = [part.reshape(3, length, table.head_width) for part in table(position_3S.reshape(-1))]

    def chosen(part_3SK: Tensor) -> Tensor:
        pieces = part_3SK.split([*sections, *sections], dim=-1)
        return torch.cat([piece[index % 3] for index, piece in enumerate(pieces)], dim=-1)

    return chosen(parts[0]), chosen(parts[1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + K/2) of the last axis of `x` by the angles whose cosines and sines broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
