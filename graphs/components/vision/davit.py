"""DaViT (Ding et al. 2022, arXiv 2204.03645): attention within windows and attention across channels, in turns.

The tower of Florence-2 (arXiv 2311.06242), whose depthwise convolutions before every attention and MLP stand for
positions. Weights are named as in transformers' Florence2VisionBackbone.
Shape suffixes: C channels, H W rows and columns of a map, N = H * W tokens, P windows, T tokens of one, S its side,
G groups of channels (heads), E channels of a group. The batch is 1 and left out where a sixth axis would appear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.encoder import EncoderMLP
from graphs.config import ConfigReader

EPS = 1e-5  # no config.json says another


@dataclass(frozen=True)
class DavitStage:
    """One resolution: a strided convolution and `depth` pairs of blocks.

    `pre_norm`: whether the norm stands before the convolution. `groups`: of channels, in attention across them.
    """

    hidden_size: int
    intermediate_size: int
    depth: int
    num_attention_heads: int
    groups: int
    kernel: int
    stride: int
    padding: int
    pre_norm: bool
    hidden_act: str = "gelu"
    layer_norm_eps: float = EPS

    def side(self, pixels: int) -> int:
        """Side of the map that a square of `pixels` becomes."""
        return (pixels + 2 * self.padding - self.kernel) // self.stride + 1


#: keys of a `vision_config` that have one entry a stage, as transformers and as the authors' files name them, and the
#: defaults of both
STAGE_KEYS: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "hidden_size": (("embed_dim", "dim_embed"), (128, 256, 512, 1024)),
    "depth": (("depths",), (1, 1, 9, 1)),
    "num_attention_heads": (("num_heads",), (4, 8, 16, 32)),
    "groups": (("num_groups",), (4, 8, 16, 32)),
    "kernel": (("patch_size",), (7, 3, 3, 3)),
    "stride": (("patch_stride",), (4, 2, 2, 2)),
    "padding": (("patch_padding",), (3, 1, 1, 1)),
    "pre_norm": (("patch_prenorm",), (False, True, True, True)),
}


@dataclass(frozen=True)
class DavitConfig:
    """The stages, and what they share. `image_size`: side of the square picture in pixels."""

    stages: tuple[DavitStage, ...]
    image_size: int = 768
    window_size: int = 12
    qkv_bias: bool = True

    @property
    def hidden_size(self) -> int:
        """Channels of the last map."""
        return self.stages[-1].hidden_size

    @property
    def grid(self) -> int:
        """Side of the last map."""
        side = self.image_size
        for stage in self.stages:
            side = stage.side(side)
        return side

    @classmethod
    def of(
        cls,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        image_size: int = 768,
        window_size: int = 12,
    ) -> Self:
        """A tower of the published proportions: as many groups as heads, MLPs of four times the width."""
        given: dict[str, Any] = {"embed_dim": list(widths), "depths": list(depths), "window_size": window_size}
        given |= {"num_heads": list(heads), "num_groups": list(heads)}
        return cls.from_reader(ConfigReader(given), image_size)

    @classmethod
    def from_reader(cls, config: ConfigReader, image_size: int) -> Self:
        """The tower that a `vision_config` describes, for pictures of `image_size`; absent keys are Florence-2 base's.

        Raises: UserError naming the key at fault.
        """
        config.int("in_channels", 3, low=3, high=3)
        columns: dict[str, tuple[Any, ...]] = {}
        for field, (names, default) in STAGE_KEYS.items():
            key = next((name for name in names if name in config), names[0])
            columns[field] = read_stages(config, key, default)
        counts = {len(column) for column in columns.values()}
        if len(counts) != 1:
            raise config.error(f"depths has {len(columns['depth'])} stages, other keys {sorted(counts)}")
        ratio, act = (
            config.float("mlp_ratio", 4.0, high=64.0),
            config.choice("activation_function", ACTIVATIONS, default="gelu"),
        )
        stages = tuple(
            DavitStage(
                **dict(zip(columns, values, strict=True)),
                intermediate_size=int(values[0] * ratio),
                hidden_act=act,
            )
            for values in zip(*columns.values(), strict=True)
        )
        for stage in stages:
            for parts in (stage.num_attention_heads, stage.groups):
                if stage.hidden_size % parts:
                    raise config.error(f"a stage {stage.hidden_size} wide cannot be split into {parts} heads or groups")
        tower = cls(stages, image_size, config.int("window_size", 12, high=1024), config.bool("qkv_bias", True))
        if tower.grid < 1:
            raise config.error(f"pictures of {image_size} pixels are too small for this tower")
        return tower


def read_stages(config: ConfigReader, key: str, default: Sequence[int]) -> tuple[Any, ...]:
    """A list with one number or truth value a stage. Raises: UserError."""
    given = config.values.get(key)
    if given is None:
        return tuple(default)
    if not isinstance(given, list) or not 0 < len(given) <= 16:
        raise config.error(f"{key} must be a list with one entry a stage")
    one = [ConfigReader({key: value}, config.where) for value in given]
    if isinstance(default[0], bool):
        return tuple(reader.bool(key) for reader in one)
    return tuple(reader.int(key, low=0 if key == "patch_padding" else 1) for reader in one)


def to_tokens(x_1CHW: Tensor) -> Tensor:
    """A map [1, C, H, W] as tokens [1, N, C]."""
    return x_1CHW.flatten(2).transpose(1, 2)


class DavitEmbedding(nn.Module):
    """The convolution that begins a stage, and its norm over channels."""

    def __init__(self, channels: int, stage: DavitStage) -> None:
        super().__init__()
        self.pre_norm = stage.pre_norm
        self.conv = nn.Conv2d(channels, stage.hidden_size, stage.kernel, stage.stride, stage.padding)
        self.norm = nn.LayerNorm(channels if stage.pre_norm else stage.hidden_size, stage.layer_norm_eps)

    def normed(self, x_1CHW: Tensor) -> Tensor:
        return self.norm(x_1CHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x_1CHW: Tensor) -> Tensor:
        return self.conv(self.normed(x_1CHW)) if self.pre_norm else self.normed(self.conv(x_1CHW))


class WindowAttention(nn.Module):
    """Tokens [1, N, C] of a map of `side` x `side` attend to those of their window, `window` tokens on a side.

    A map that is no whole number of windows is padded with zeros, which are attended to like tokens.
    """

    def __init__(self, stage: DavitStage, side: int, window: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads, self.side, self.window = stage.num_attention_heads, side, window
        self.count = -(-side // window)  # windows along one side
        self.qkv = nn.Linear(stage.hidden_size, 3 * stage.hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(stage.hidden_size, stage.hidden_size)

    def forward(self, x_1NC: Tensor) -> Tensor:
        side, window, count = self.side, self.window, self.count
        x_HWC = x_1NC.reshape(side, side, -1)
        if count * window > side:
            x_HWC = F.pad(x_HWC, (0, 0, 0, count * window - side, 0, count * window - side))
        x_PTC = x_HWC.reshape(count, window, count, window, -1).transpose(1, 2).reshape(count**2, window**2, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x_PTC).chunk(3, dim=-1))
        out_PTC = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out_HWC = out_PTC.reshape(count, count, window, window, -1).transpose(1, 2)
        out_HWC = out_HWC.reshape(count * window, count * window, -1)[:side, :side]
        return out_HWC.reshape(1, side * side, -1)


class ChannelAttention(nn.Module):
    """Channels of tokens [1, N, C] attend to those of their group, each seen as a vector over all tokens."""

    def __init__(self, stage: DavitStage, qkv_bias: bool) -> None:
        super().__init__()
        self.groups = stage.groups
        self.qkv = nn.Linear(stage.hidden_size, 3 * stage.hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(stage.hidden_size, stage.hidden_size)

    def forward(self, x_1NC: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.groups, -1)).permute(0, 2, 3, 1) for part in self.qkv(x_1NC).chunk(3, dim=-1)
        )
        out_1GEN = F.scaled_dot_product_attention(q, k, v)  # scaled by the root of N, as wide as a channel's vector
        # copied by name: whether a view would do depends on which kernel of attention made the output
        return self.proj(out_1GEN.permute(0, 3, 1, 2).contiguous().reshape(x_1NC.shape))


class DavitBlock(nn.Module):
    """A depthwise convolution and attention, then a depthwise convolution and an MLP, each added to its input."""

    def __init__(self, stage: DavitStage, attention: nn.Module) -> None:
        super().__init__()
        width, eps = stage.hidden_size, stage.layer_norm_eps
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = attention
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.ffn = EncoderMLP(stage)

    def forward(self, x_1CHW: Tensor) -> Tensor:
        size = x_1CHW.shape
        tokens_1NC = to_tokens(x_1CHW + self.conv1(x_1CHW))
        tokens_1NC = tokens_1NC + self.attention(self.norm1(tokens_1NC))
        x_1CHW = tokens_1NC.transpose(1, 2).reshape(size)
        tokens_1NC = to_tokens(x_1CHW + self.conv2(x_1CHW))
        tokens_1NC = tokens_1NC + self.ffn(self.norm2(tokens_1NC))
        return tokens_1NC.transpose(1, 2).reshape(size)


class DavitPair(nn.Module):
    """A block of attention within windows and one of attention across channels."""

    def __init__(self, stage: DavitStage, side: int, window: int, qkv_bias: bool) -> None:
        super().__init__()
        self.spatial_block = DavitBlock(stage, WindowAttention(stage, side, window, qkv_bias))
        self.channel_block = DavitBlock(stage, ChannelAttention(stage, qkv_bias))

    def forward(self, x_1CHW: Tensor) -> Tensor:
        return self.channel_block(self.spatial_block(x_1CHW))


class DavitTower(nn.Module):
    """Normalised pixels [1, 3, S, S] to the last map [1, C, grid, grid]."""

    def __init__(self, config: DavitConfig) -> None:
        super().__init__()
        self.convs, self.blocks = nn.ModuleList(), nn.ModuleList()
        channels, side = 3, config.image_size
        for stage in config.stages:
            side = stage.side(side)
            self.convs.append(DavitEmbedding(channels, stage))
            pairs = (DavitPair(stage, side, config.window_size, config.qkv_bias) for _ in range(stage.depth))
            self.blocks.append(nn.Sequential(*pairs))
            channels = stage.hidden_size

    def forward(self, pixels_1CHW: Tensor) -> Tensor:
        x_1CHW = pixels_1CHW
        for conv, blocks in zip(self.convs, self.blocks, strict=True):
            x_1CHW = blocks(conv(x_1CHW))
        return x_1CHW
