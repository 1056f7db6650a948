"""Raw pixels to a tower's normalised input, inside the graph, so that an app feeds bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NormalizePixels(nn.Module):
    """Pixels 0..255 [B, C, H, W] of any dtype to float: (rescale * x - mean) / std, as one scale and one shift."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], rescale: float = 1 / 255) -> None:
        super().__init__()
        self.mean, self.std, self.rescale = tuple(mean), tuple(std), rescale
        for name, table_C11 in self.tables().items():
            self.register_buffer(name, table_C11)

    def tables(self) -> dict[str, Tensor]:
        """The values of the buffers; asked for again where the module was built on fake tensors."""
        mean, std = (torch.tensor(t, dtype=torch.float64).reshape(-1, 1, 1) for t in (self.mean, self.std))
        return {"scale": (self.rescale / std).float(), "shift": (-mean / std).float()}

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return pixels_BCHW.to(self.scale.dtype) * self.scale + self.shift
