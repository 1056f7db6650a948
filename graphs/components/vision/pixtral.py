"""Pixtral's vision tower (Agrawal et al., arXiv 2410.07073): patches of pictures of any size, 2-D rotary positions.

Shape suffixes: N patches, S side of a patch in pixels, D width, K head width, G places along a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.gated_encoder import GatedEncoderLayer
from graphs.components.stack import AlikeLayers
from graphs.components.vision.pixels import NormalizePixels
from graphs.config import ConfigReader
from graphs.preprocess.raster import RasterProcessor


@dataclass(frozen=True)
class PixtralVisionConfig:
    """Field names are those of a PixtralVisionConfig's JSON, but for the last three, which are the same in all."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 1024
    patch_size: int = 16
    hidden_act: str = "silu"
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_reader(cls, config: ConfigReader) -> Self:
        """The tower that a `vision_config` describes, with transformers' defaults. Raises: UserError."""
        base = cls()
        rope = config.section("rope_parameters")
        rope.choice("rope_type", ("axial", "default"), default="axial")
        config.int("num_channels", 3, low=3, high=3)
        tower = cls(
            hidden_size=config.int("hidden_size", base.hidden_size),
            intermediate_size=config.int("intermediate_size", base.intermediate_size),
            num_hidden_layers=config.int("num_hidden_layers", base.num_hidden_layers, high=1024),
            num_attention_heads=config.int("num_attention_heads", base.num_attention_heads, high=1024),
            image_size=config.int("image_size", base.image_size, high=8192),
            patch_size=config.int("patch_size", base.patch_size, high=1024),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default="gelu"),  # the class's; published ones say silu
            rope_theta=(rope if "rope_theta" in rope else config).float(
                "rope_theta", base.rope_theta, low=1.0, high=1e12
            ),
        )
        if tower.hidden_size % tower.num_attention_heads or tower.head_width % 4:
            raise config.error(
                f"width {tower.hidden_size} does not split into {tower.num_attention_heads} heads of a multiple of 4"
            )
        return tower


class PixtralRotary(nn.Module):
    """Rows and columns [N, 2] (int64) to cosines and sines [N, K], looked up.

    Of the frequencies of a head in order, every other one turns by the row, those between by the column.
    """

    row_cos: Tensor
    row_sin: Tensor
    column_cos: Tensor
    column_sin: Tensor

    def __init__(self, head_width: int, places: int, theta: float) -> None:
        super().__init__()
        self.head_width, self.places, self.theta = head_width, places, theta
        for name, table in self.tables().items():
            self.register_buffer(name, table)

    def tables(self) -> dict[str, Tensor]:
        """The values of the buffers; asked for again where the module was built on fake tensors."""
        frequency = self.theta ** -(torch.arange(0, self.head_width, 2, dtype=torch.float64) / self.head_width)
        place = torch.arange(self.places, dtype=torch.float64)
        row, column = torch.outer(place, frequency[0::2]), torch.outer(place, frequency[1::2])
        return {
            "row_cos": row.cos().float(),
            "row_sin": row.sin().float(),
            "column_cos": column.cos().float(),
            "column_sin": column.sin().float(),
        }

    def forward(self, place_N2: Tensor) -> tuple[Tensor, Tensor]:
        row_N, column_N = place_N2[:, 0], place_N2[:, 1]
        cos = [self.row_cos.index_select(0, row_N), self.column_cos.index_select(0, column_N)]
        sin = [self.row_sin.index_select(0, row_N), self.column_sin.index_select(0, column_N)]
        return torch.cat([*cos, *cos], dim=-1), torch.cat([*sin, *sin], dim=-1)


class PixtralTower(AlikeLayers):
    """Raw patches [N, 3, S, S] uint8 and their places [N, 2] to features [1, N, D] of one picture.

    `layers`: how many are built; the features are those that leave the last of them.
    """

    def __init__(self, config: PixtralVisionConfig, pixels: RasterProcessor, layers: int) -> None:
        super().__init__()
        self.normalize = NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        self.patch_conv = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.ln_pre = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = PixtralRotary(config.head_width, max(pixels.most), config.rope_theta)
        self.layers = nn.ModuleList(GatedEncoderLayer(config) for _ in range(layers))

    def forward(self, patches_NCSS: Tensor, place_N2: Tensor) -> Tensor:
        x_1ND = self.ln_pre(self.patch_conv(self.normalize(patches_NCSS).flatten(1))).unsqueeze(0)
        turn = self.rotary(place_N2)
        for layer in self.layers:
            x_1ND = layer(x_1ND, turn=turn)
        return x_1ND
