"""The image encoder of SAM (Kirillov et al., arXiv 2304.02643): a ViT with windows and decomposed relative positions.

After ViTDet (Li et al., arXiv 2203.16527); positions along each axis are compared with the queries (arXiv 2112.01526).
One picture at a time. Shape suffixes: W windows (1 where a layer sees all), H and V rows and columns of patches in one,
T = H * V, D width, A heads, K head width, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.config import ConfigReader


@dataclass(frozen=True)
class SamConfig:
    """Field names are those of a SamVisionConfig's JSON, but `global_layers`, there `global_attn_indexes`."""

    hidden_size: int = 768
    mlp_dim: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 1024
    patch_size: int = 16
    output_channels: int = 256
    window_size: int = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @classmethod
    def from_reader(cls, config: ConfigReader) -> Self:
        """The encoder that a SamVisionConfig's JSON describes. Raises: UserError naming the key at fault."""
        base = cls()
        width = config.int("hidden_size", base.hidden_size)
        ratio = config.float("mlp_ratio", 4.0, low=0.0, high=64.0)
        layers = config.int("num_hidden_layers", base.num_hidden_layers, high=1024)
        encoder = cls(
            hidden_size=width,
            mlp_dim=config.int("mlp_dim", int(width * ratio)),
            num_hidden_layers=layers,
            num_attention_heads=config.int("num_attention_heads", base.num_attention_heads, high=1024),
            image_size=config.int("image_size", base.image_size, high=8192),
            patch_size=config.int("patch_size", base.patch_size, high=1024),
            output_channels=config.int("output_channels", base.output_channels),
            window_size=config.int("window_size", base.window_size, high=1024),
            global_layers=read_layers(config, layers, base.global_layers),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default=base.hidden_act),
            layer_norm_eps=config.float("layer_norm_eps", base.layer_norm_eps, low=0.0, high=1.0),
            qkv_bias=config.bool("qkv_bias", True),
        )
        for key in ("use_abs_pos", "use_rel_pos"):
            if not config.bool(key, True):
                raise config.error(f"{key} is false; this encoder has absolute and relative positions")
        config.int("num_channels", 3, low=3, high=3)
        if width % encoder.num_attention_heads:
            raise config.error(
                f"hidden_size {width} is not a multiple of num_attention_heads {encoder.num_attention_heads}"
            )
        if encoder.patch_size > encoder.image_size:
            raise config.error(f"patch_size {encoder.patch_size} is larger than image_size {encoder.image_size}")
        return encoder


def read_layers(config: ConfigReader, layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """`global_attn_indexes`, the layers without windows. Raises: UserError."""
    given = config.values.get("global_attn_indexes")
    given = list(default) if given is None else given
    if not isinstance(given, list) or not given or not all(isinstance(n, int) and 0 <= n < layers for n in given):
        raise config.error(f"global_attn_indexes must be numbers of layers, below {layers}")
    return tuple(given)


class RelativePositions(nn.Module):
    """What queries [N, H, H, K] add to their scores [N, H * H, H * H] by the distance of keys, along each axis."""

    offset: Tensor

    def __init__(self, side: int, head_width: int) -> None:
        super().__init__()
        self.side = side
        self.h = nn.Parameter(torch.zeros(2 * side - 1, head_width))
        self.w = nn.Parameter(torch.zeros(2 * side - 1, head_width))
        self.register_buffer("offset", self.tables()["offset"])

    def tables(self) -> dict[str, Tensor]:
        """Which distance lies between query and key: from -(side - 1), the first, on."""
        place = torch.arange(self.side)
        return {"offset": (place.unsqueeze(1) - place + self.side - 1).reshape(-1)}

    def forward(self, q_NHVK: Tensor) -> Tensor:
        shape = (self.side, self.side, q_NHVK.shape[-1])
        rows_KH, columns_KV = (
            table.index_select(0, self.offset).reshape(shape).transpose(1, 2) for table in (self.h, self.w)
        )
        by_row_NHVH = q_NHVK @ rows_KH
        by_column_NHVV = (q_NHVK.transpose(1, 2) @ columns_KV).transpose(1, 2)
        return (by_row_NHVH.unsqueeze(-1) + by_column_NHVV.unsqueeze(-2)).flatten(3).flatten(1, 2)


class SamAttention(nn.Module):
    """Attention within each of W windows [W, H, H, D]."""

    def __init__(self, config: SamConfig, side: int) -> None:
        super().__init__()
        self.heads, self.side = config.num_attention_heads, side
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.rel_pos = RelativePositions(side, config.hidden_size // config.num_attention_heads)

    def forward(self, x_WHVD: Tensor) -> Tensor:
        q_WATK, k_WATK, v_WATK = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x_WHVD.flatten(1, 2)).chunk(3, dim=-1)
        )
        bias_NTT = self.rel_pos(q_WATK.flatten(0, 1).unflatten(1, (self.side, self.side)))
        bias_WATT = bias_NTT.unflatten(0, (-1, self.heads))
        out_WATK = F.scaled_dot_product_attention(q_WATK, k_WATK, v_WATK, attn_mask=bias_WATT)
        return self.proj(out_WATK.transpose(1, 2).flatten(2)).unflatten(1, (self.side, self.side))


class SamMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.lin1 = nn.Linear(config.hidden_size, config.mlp_dim)
        self.lin2 = nn.Linear(config.mlp_dim, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.activation(self.lin1(x)))


class SamLayer(nn.Module):
    """A pre-norm block over a grid [1, H, H, D], which attends in windows of `window` patches; 0: to all of it."""

    def __init__(self, config: SamConfig, window: int) -> None:
        super().__init__()
        self.grid, self.window = config.grid, window
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attn = SamAttention(config, window or config.grid)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SamMLP(config)

    def windowed(self, x_1HVD: Tensor) -> Tensor:
        """Attention in windows; what fills up the last of them is attended to as well, as SAM was trained."""
        side, count = self.window, -(-self.grid // self.window)
        short = count * side - self.grid
        x_HVD = F.pad(x_1HVD[0], (0, 0, 0, short, 0, short)) if short else x_1HVD[0]
        grid = (count, side, count, side, -1)
        windows = x_HVD.reshape(grid).transpose(1, 2).flatten(0, 1)
        attended = self.attn(windows).reshape(count, count, side, side, -1).transpose(1, 2)
        whole_HVD = attended.reshape(count * side, count * side, -1)
        return whole_HVD[: self.grid, : self.grid].unsqueeze(0)

    def forward(self, x_1HVD: Tensor) -> Tensor:
        normed = self.layer_norm1(x_1HVD)
        x_1HVD = x_1HVD + (self.windowed(normed) if self.window else self.attn(normed))
        return x_1HVD + self.mlp(self.layer_norm2(x_1HVD))


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of [1, C, H, W]."""

    def forward(self, x_1CHW: Tensor) -> Tensor:
        return super().forward(x_1CHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SamNeck(nn.Module):
    """States [1, H, H, D] to features [1, C, H, H]."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        channels = config.output_channels
        self.conv1 = nn.Conv2d(config.hidden_size, channels, 1, bias=False)
        self.layer_norm1 = ChannelNorm(channels, 1e-6)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.layer_norm2 = ChannelNorm(channels, 1e-6)

    def forward(self, x_1HVD: Tensor) -> Tensor:
        return self.layer_norm2(self.conv2(self.layer_norm1(self.conv1(x_1HVD.permute(0, 3, 1, 2)))))


class SamEncoder(nn.Module):
    """Normalised pixels [1, 3, S, S] to the states [1, H, H, D] of the first layer without windows and of the last."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.first = config.global_layers[0]
        self.patch_embed = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, config.hidden_size))
        self.layers = nn.ModuleList(
            SamLayer(config, 0 if index in config.global_layers else config.window_size)
            for index in range(config.num_hidden_layers)
        )

    def forward(self, pixels_1CSS: Tensor) -> tuple[Tensor, Tensor]:
        states = [self.patch_embed(pixels_1CSS).permute(0, 2, 3, 1) + self.pos_embed]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states[self.first + 1], states[-1]
