"""Florence-2's projector (Xiao et al., arXiv 2311.06242): learned rows and columns, one frame's time, mean and tokens.

Shape suffixes: C channels, H W rows and columns, N = H * W tokens, D width of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrameTime(nn.Module):
    """The sinusoidal embedding of the first frame, [C]: the sine of zero in even channels, its cosine in odd ones."""

    first: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("first", self.tables()["first"])

    def tables(self) -> dict[str, Tensor]:
        """The value of the buffer; asked for again where the module was built on fake tensors."""
        return {"first": (torch.arange(self.channels) % 2).float()}

    def forward(self, x_1NC: Tensor) -> Tensor:
        return x_1NC + self.first


class PositionedProjector(nn.Module):
    """A map [1, C, H, W] to embeddings [1, 1 + N, D]: the mean of its positioned tokens, then the tokens.

    `positions`: rows and columns that embeddings were learned for.
    """

    def __init__(self, channels: int, width: int, positions: int) -> None:
        super().__init__()
        self.row_embeddings = nn.Embedding(positions, channels // 2)
        self.column_embeddings = nn.Embedding(positions, channels - channels // 2)
        self.visual_temporal_embed = FrameTime(channels)
        self.image_projection = nn.Linear(channels, width, bias=False)
        self.image_proj_norm = nn.LayerNorm(width)

    def forward(self, x_1CHW: Tensor) -> Tensor:
        height, width = x_1CHW.shape[-2:]
        row_H1C, column_1WC = self.row_embeddings.weight[:height, None], self.column_embeddings.weight[None, :width]
        place_HWC = torch.cat([column_1WC.expand(height, -1, -1), row_H1C.expand(-1, width, -1)], dim=-1)
        tokens_1NC = x_1CHW.flatten(2).transpose(1, 2) + place_HWC.reshape(1, height * width, -1)
        tokens_1NC = self.visual_temporal_embed(tokens_1NC)
        pooled_1MC = torch.cat([tokens_1NC.mean(dim=1, keepdim=True), tokens_1NC], dim=1)
        return self.image_proj_norm(self.image_projection(pooled_1MC))
