"""The lightweight downsample projectors of MobileVLM (arXiv 2312.16886) and MobileVLM V2 (arXiv 2402.03766).

Module names follow the public checkpoints (mobilevlm/model/vision_projector.py of Meituan-AutoML/MobileVLM), whose v1
blocks are torchvision's MobileNetV3 inverted residuals with a channel layer norm in place of batch norm.

Shape suffixes: B batch, N tokens in, M tokens out, D width, G grid side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F


def to_grid(x_BND: Tensor, grid: int) -> Tensor:
    """Tokens [B, G*G, D] in row order to a picture [B, D, G, G]."""
    return x_BND.transpose(1, 2).unflatten(2, (grid, grid))


def to_tokens(x_BDGG: Tensor) -> Tensor:
    """A picture [B, D, G, G] to tokens [B, G*G, D] in row order."""
    return x_BDGG.flatten(2).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, D, G, G], at each place by itself."""

    def forward(self, x_BDGG: Tensor) -> Tensor:
        return super().forward(x_BDGG.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channel gates from the mean over places (Hu et al., arXiv 1709.01507), hard sigmoid as in MobileNetV3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        squeeze = squeeze_width(width)
        self.fc1 = nn.Conv2d(width, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, width, 1)

    def forward(self, x_BDGG: Tensor) -> Tensor:
        gate_BD11 = F.hardsigmoid(self.fc2(F.relu(self.fc1(x_BDGG.mean((2, 3), keepdim=True)))))
        return x_BDGG * gate_BD11


def squeeze_width(width: int) -> int:
    """A quarter of `width`, rounded to a multiple of 8 and never below 90% of it (MobileNet's rounding rule)."""
    quarter = width // 4
    rounded = max(8, (quarter + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * quarter else rounded


class InvertedResidual(nn.Module):
    """Depthwise 3x3, squeeze-excite, pointwise (MobileNetV3, arXiv 1905.02244); no expansion, residual at stride 1."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        self.block = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), ChannelNorm(width), nn.Hardswish()
            ),
            SqueezeExcite(width),
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width)),
        )

    def forward(self, x_BDGG: Tensor) -> Tensor:
        out_BDGG = self.block(x_BDGG)
        return x_BDGG + out_BDGG if self.residual else out_BDGG


class LDP(nn.Module):
    """Version 1: [B, G*G, in] to [B, ceil(G/2)^2, out]; an MLP, then a block of stride 1 and a block of stride 2."""

    #: prefix of a parameter here -> its prefix in a public checkpoint, behind `mm_projector.`
    KEYS: ClassVar[Mapping[str, str]] = {"mlp.": "model.mlp.", "mb_block.": "model.mb_block."}

    def __init__(self, in_features: int, out_features: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.mlp = nn.Sequential(
            nn.Identity(), nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features)
        )
        self.mb_block = nn.Sequential(
            nn.Identity(), InvertedResidual(out_features, stride=1), InvertedResidual(out_features, stride=2)
        )

    def forward(self, x_BND: Tensor) -> Tensor:
        return to_tokens(self.mb_block(to_grid(self.mlp(x_BND), self.grid)))


class LDPv2(nn.Module):
    """Version 2: [B, G*G, in] to [B, P*P, out]; an MLP, mean pooling to P x P places, a depthwise 3x3 with a skip."""

    POOLED = 12  # fixed in the public code, whatever the grid
    KEYS: ClassVar[Mapping[str, str]] = {"mlp.": "mlp.mlp.", "peg.": "peg.peg.0."}

    def __init__(self, in_features: int, out_features: int, grid: int, pooled: int = POOLED) -> None:
        super().__init__()
        self.grid = grid
        self.pooled = pooled
        self.mlp = nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))
        self.peg = nn.Conv2d(out_features, out_features, 3, 1, 1, groups=out_features)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BDGG = to_grid(self.mlp(x_BND), self.grid)
        # A grid that divides evenly pools by plain mean windows, which every target has.
        if self.grid % self.pooled == 0:
            x_BDPP = F.avg_pool2d(x_BDGG, self.grid // self.pooled)
        else:
            x_BDPP = F.adaptive_avg_pool2d(x_BDGG, self.pooled)
        return to_tokens(self.peg(x_BDPP) + x_BDPP)
