"""AIMv2's vision tower and pooling (Fini et al., arXiv 2411.14402): RMS norms and gated MLPs, no class token.

Shape suffixes: B batch, C channels, H W pixels, N patches, S side of a patch in pixels, D width, A heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.gated_encoder import GatedEncoderConfig, GatedEncoderLayer
from graphs.components.stack import AlikeLayers
from graphs.components.vision.pixels import NormalizePixels
from graphs.config import ConfigReader
from graphs.preprocess.picture import Normalized

#: rows or columns of patches that the native tower's table of positions has
PLACES = 64


@dataclass(frozen=True)
class Aimv2VisionConfig:
    """Field names are those of an Aimv2VisionConfig's JSON, but `attention_bias`, its `qkv_bias`.

    `use_head`: whether pooling by attention follows. `is_native`: whether pictures may have any size, their positions
    being sines and cosines of rows and columns instead of learned ones.
    """

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    use_head: bool = True
    is_native: bool = False

    @property
    def patches(self) -> int:
        """Patches of a picture of the tower's size."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_reader(cls, config: ConfigReader, *, head: bool = True) -> Self:
        """The tower that a `vision_config` describes, with transformers' defaults, but for `head`. Raises: UserError.

        Apple's files say `use_bias` for what is now `mlp_bias`.
        """
        base = cls()
        config.int("num_channels", 3, low=3, high=3)
        tower = cls(
            hidden_size=config.int("hidden_size", base.hidden_size),
            intermediate_size=config.int("intermediate_size", base.intermediate_size),
            num_hidden_layers=config.int("num_hidden_layers", base.num_hidden_layers, high=1024),
            num_attention_heads=config.int("num_attention_heads", base.num_attention_heads, high=1024),
            image_size=config.int("image_size", base.image_size, high=8192),
            patch_size=config.int("patch_size", base.patch_size, high=1024),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default=base.hidden_act),
            rms_norm_eps=config.float("rms_norm_eps", base.rms_norm_eps, low=0.0, high=1.0),
            attention_bias=config.bool("qkv_bias", False),
            mlp_bias=config.bool("mlp_bias", config.bool("use_bias", False)),
            use_head=config.bool("use_head", head),
            is_native=config.bool("is_native", False),
        )
        check_heads(config, tower)
        if tower.patch_size > tower.image_size:
            raise config.error(f"patch_size {tower.patch_size} is larger than image_size {tower.image_size}")
        if tower.is_native and tower.hidden_size % 4:
            raise config.error(f"hidden_size {tower.hidden_size} is no multiple of 4, which 2-D positions need")
        return tower


def check_heads(config: ConfigReader, tower: GatedEncoderConfig) -> None:
    """Raise UserError where heads do not divide the width."""
    if tower.hidden_size % tower.num_attention_heads:
        raise config.error(
            f"hidden_size {tower.hidden_size} is not a multiple of num_attention_heads {tower.num_attention_heads}"
        )


class LearnedEmbeddings(nn.Module):
    """Normalised pixels [B, 3, H, W] to normed patches at learned positions [B, N, D]."""

    def __init__(self, config: Aimv2VisionConfig) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.rms_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.position_embedding = nn.Embedding(config.patches, config.hidden_size)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BND = self.patch_embed(pixels_BCHW).flatten(2).transpose(1, 2)
        return self.rms_norm(x_BND) + self.position_embedding.weight


class SinusoidalPositions(nn.Module):
    """Rows and columns [N, 2] (int64) to sines and cosines [N, D]: of the column, then of the row."""

    table: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("table", self.tables()["table"])

    def tables(self) -> dict[str, Tensor]:
        """The value of the buffer; asked for again where the module was built on fake tensors."""
        quarter = self.width // 4
        frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
        angle = torch.outer(torch.arange(PLACES, dtype=torch.float64), frequency)
        return {"table": torch.cat([angle.sin(), angle.cos()], dim=1).float()}

    def forward(self, place_N2: Tensor) -> Tensor:
        row_N, column_N = place_N2[:, 0], place_N2[:, 1]
        return torch.cat([self.table.index_select(0, column_N), self.table.index_select(0, row_N)], dim=-1)


class NativeEmbeddings(nn.Module):
    """Normalised patches [N, 3, S, S] and their places [N, 2] to normed patches [1, N, D]."""

    def __init__(self, config: Aimv2VisionConfig) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.rms_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.positions = SinusoidalPositions(config.hidden_size)

    def forward(self, patches_NCSS: Tensor, place_N2: Tensor) -> Tensor:
        x_ND = self.rms_norm(self.patch_embed(patches_NCSS.flatten(1)))
        return (x_ND + self.positions(place_N2)).unsqueeze(0)


class Aimv2Tower(AlikeLayers):
    """What the embeddings take to normed features [B, N, D]."""

    def __init__(self, config: Aimv2VisionConfig) -> None:
        super().__init__()
        kind: Callable[[Aimv2VisionConfig], nn.Module] = NativeEmbeddings if config.is_native else LearnedEmbeddings
        self.embeddings = kind(config)
        self.layers = nn.ModuleList(GatedEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.rms_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, pixels: Tensor, place_N2: Tensor | None = None) -> Tensor:
        x_BND = self.embeddings(pixels) if place_N2 is None else self.embeddings(pixels, place_N2)
        for layer in self.layers:
            x_BND = layer(x_BND)
        return self.rms_norm(x_BND)


class Aimv2Pool(nn.Module):
    """Features [B, N, D] to [B, D]: a learned query, not projected, attends to all of them."""

    def __init__(self, config: Aimv2VisionConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.heads = config.num_attention_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.k_proj = nn.Linear(width, width, bias)
        self.v_proj = nn.Linear(width, width, bias)
        self.output_proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        query_B1D = self.cls_token.expand(x_BND.shape[0], -1, -1)
        q_BA1K, k_BANK, v_BANK = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (query_B1D, self.k_proj(x_BND), self.v_proj(x_BND))
        )
        out_BA1K = F.scaled_dot_product_attention(q_BA1K, k_BANK, v_BANK)
        return self.output_proj(out_BA1K.transpose(1, 2).flatten(2)[:, 0])


class FeatureEncoder(nn.Module):
    """Raw pixels [1, 3, H, W] uint8, or patches and their places, to features [1, N, D]; pooled too, [1, D]."""

    def __init__(self, pixels: Normalized, tower: Aimv2Tower, pool: Aimv2Pool | None) -> None:
        super().__init__()
        self.normalize = NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        self.tower = tower
        self.pool = pool

    def forward(self, pixel_values: Tensor, patch_position: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        features_BND = self.tower(self.normalize(pixel_values), patch_position)
        return features_BND if self.pool is None else (features_BND, self.pool(features_BND))
