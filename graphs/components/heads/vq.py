"""Pictures drawn token by token: the head that chooses codes, their embeddings, and the decoder from codes to pixels.

The decoder is that of VQGAN (Esser et al., arXiv 2012.09841) as LlamaGen trained it (Sun et al., arXiv 2406.06525), its
codes of unit length; Janus (arXiv 2410.13848) generates with it. The encoder that made codes for training is no part.
Shape suffixes: B batch, N codes, S tokens, D width, C channels, H W rows and columns, E width of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.connectors.deep import DeepMLP
from graphs.config import ConfigReader

GROUPS = 32
EPS = 1e-6


@dataclass(frozen=True)
class VQConfig:
    """Field names are those of a JanusVQVAEConfig's JSON, but `aligner_depth`, there `num_hidden_layers`.

    `grid`: the side of the square of codes. `projection_dim`: the width of the text decoder.
    """

    grid: int
    projection_dim: int
    embed_dim: int = 8
    num_embeddings: int = 16384
    latent_channels: int = 256
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    aligner_depth: int = 2
    hidden_act: str = "gelu"
    double_latent: bool = False  # of the encoder

    @property
    def codes(self) -> int:
        """Tokens that a picture is drawn in."""
        return self.grid**2

    @property
    def image_size(self) -> int:
        """Side of the picture drawn, in pixels."""
        return self.grid * 2 ** (len(self.channel_multiplier) - 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels at each resolution, the finest first."""
        return tuple(self.base_channels * factor for factor in self.channel_multiplier)

    @classmethod
    def from_reader(cls, config: ConfigReader, grid: int, width: int) -> Self:
        """What a `vq_config` describes, for codes in a square of side `grid` beside embeddings of `width`.

        Raises: UserError naming the key at fault.
        """
        multipliers = config.values.get("channel_multiplier")
        multipliers = [1, 1, 2, 2, 4] if multipliers is None else multipliers
        if not isinstance(multipliers, list) or not multipliers:
            raise config.error("channel_multiplier must be a list of numbers")
        factors = (ConfigReader({"channel_multiplier": factor}, config.where) for factor in multipliers)
        found = cls(
            grid=grid,
            projection_dim=width,
            embed_dim=config.int("embed_dim", 8),
            num_embeddings=config.int("num_embeddings", 16384, high=1 << 24),
            latent_channels=config.int("latent_channels", 256),
            base_channels=config.int("base_channels", 128),
            channel_multiplier=tuple(factor.int("channel_multiplier", high=64) for factor in factors),
            num_res_blocks=config.int("num_res_blocks", 2, high=64),
            aligner_depth=config.int("num_hidden_layers", 2, high=64),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default="gelu"),
            double_latent=config.bool("double_latent", False),
        )
        for key in ("projection_dim", "image_token_embed_dim"):
            if config.int(key, 2048) != width:
                raise config.error(f"{key} is {config.int(key, 2048)}; the decoder's embeddings are {width} wide")
        if found.base_channels % GROUPS:
            raise config.error(
                f"base_channels {found.base_channels} is not a multiple of {GROUPS}, the groups of norms"
            )
        config.int("out_channels", 3, low=3, high=3)
        return found

    @property
    def encoder_parameters(self) -> int:
        """Parameters of the encoder and its projection, which published checkpoints carry."""

        def convolution(before: int, after: int, side: int = 3) -> int:
            return before * after * side**2 + after

        def residual(before: int, after: int) -> int:
            inner = 2 * (before + after) + convolution(before, after) + convolution(after, after)
            return inner + (convolution(before, after, 1) if before != after else 0)

        def attention(width: int) -> int:
            return 2 * width + 4 * convolution(width, width, 1)

        *finer, last = self.channels
        total = convolution(3, self.base_channels) + 2 * residual(last, last) + attention(last) + 2 * last
        before = self.base_channels
        for after in self.channels:
            total += residual(before, after) + (self.num_res_blocks - 1) * residual(after, after)
            before = after
        total += sum(convolution(width, width) for width in finer) + self.num_res_blocks * attention(last)
        out = self.latent_channels * (2 if self.double_latent else 1)
        return total + convolution(last, out) + convolution(self.latent_channels, self.embed_dim, 1)


class Groups(nn.Module):
    """A group norm over [B, C, H, W], as a layer norm over each group, which every target has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        size = channels // GROUPS * height * width
        normed = F.layer_norm(x_BCHW.reshape(batch, GROUPS, size), (size,), eps=EPS).reshape(x_BCHW.shape)
        return normed * self.weight.reshape(1, -1, 1, 1) + self.bias.reshape(1, -1, 1, 1)


class Residual(nn.Module):
    """Two convolutions of 3 x 3, each behind a norm and an activation, beside a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Groups(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = Groups(after), nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.nin_shortcut(x_BCHW) + self.conv2(F.silu(self.norm2(inner)))


class PixelAttention(nn.Module):
    """Attention of every place to every other, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Groups(channels)
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed = self.norm(x_BCHW)
        q, k, v = (part(normed).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        out_BNC = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x_BCHW + self.proj_out(out_BNC.transpose(1, 2).reshape(x_BCHW.shape))


class Level(nn.Module):
    """One resolution: residual blocks, with attention behind each at the coarsest, then twice the size."""

    def __init__(self, before: int, after: int, blocks: int, attends: bool, grows: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(Residual(after if index else before, after) for index in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(after) for _ in range(blocks if attends else 0))
        self.conv = nn.Conv2d(after, after, 3, padding=1) if grows else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[index](x_BCHW)
        return x_BCHW if self.conv is None else self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class ImageDecoder(nn.Module):
    """Codes [1, N] (int64) to a picture [1, 3, H, W], float32 from 0 to 255, as `mean` and `std` were taken off it."""

    scale: Tensor
    shift: Tensor

    def __init__(self, config: VQConfig, mean: Sequence[float], std: Sequence[float], rescale: float) -> None:
        super().__init__()
        self.grid, self.mean, self.std, self.rescale = config.grid, tuple(mean), tuple(std), rescale
        *_, last = widths = config.channels
        self.codebook = nn.Embedding(config.num_embeddings, config.embed_dim)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels, last, 3, padding=1)
        self.mid = nn.ModuleList([Residual(last, last), PixelAttention(last), Residual(last, last)])
        coarse_first = [*reversed(widths)]
        self.up = nn.ModuleList(
            Level(before, after, config.num_res_blocks + 1, not index, index < len(widths) - 1)
            for index, (before, after) in enumerate(zip([last, *coarse_first], coarse_first, strict=False))
        )
        self.norm_out = Groups(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        for name, table in self.tables().items():
            self.register_buffer(name, table)

    def tables(self) -> dict[str, Tensor]:
        """From normalised pixels back: the values of the buffers."""
        mean, std = (torch.tensor(t, dtype=torch.float64).reshape(1, -1, 1, 1) for t in (self.mean, self.std))
        return {"scale": (std / self.rescale).float(), "shift": (mean / self.rescale).float()}

    def forward(self, image_ids: Tensor) -> Tensor:
        code_1NE = self.codebook(image_ids)
        length = (code_1NE * code_1NE).sum(-1, keepdim=True).sqrt()
        code_1NE = code_1NE / length.clamp(min=1e-12)
        x = self.post_quant_conv(code_1NE.transpose(1, 2).unflatten(-1, (self.grid, self.grid)))
        x = self.conv_in(x)
        for module in (*self.mid, *self.up):
            x = module(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return (x * self.scale + self.shift).clamp(0.0, 255.0)


class ImageTokenEmbedding(nn.Module):
    """Codes [1, S] (int64) to embeddings [1, S, D] that the text decoder reads."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.codes = nn.Embedding(config.num_embeddings, config.embed_dim)
        self.aligner = DeepMLP(config.embed_dim, config.projection_dim, config.aligner_depth, config.hidden_act)

    def forward(self, image_ids: Tensor) -> Tensor:
        return self.aligner(self.codes(image_ids))


class ImageHead(nn.Module):
    """States [1, S, D] of the text decoder to logits [1, S, codes] of the next code."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.proj_out = nn.Linear(config.projection_dim, config.projection_dim)
        self.vision_head = nn.Linear(config.projection_dim, config.num_embeddings)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.vision_head(self.activation(self.proj_out(hidden_states)))
