"""Towers over patches of pictures of any size with 2-D rotary positions: Qwen2-VL's, Qwen2.5-VL's, VideoLLaMA 3's.

One tower, whose configuration says where they differ (arXiv 2409.12191, 2502.13923, 2501.13106). Patches come cut, in
any number; which of them see each other is said by a number per patch: those with the same one.
Shape suffixes: N patches, B windows, T patches of one (B = 1 and T = N without windows), D width, A heads, K head
width, V pixel values of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.encoder import EncoderMLP
from graphs.components.stack import AlikeLayers
from graphs.components.text.cache import MASKED
from graphs.components.vision.pixels import NormalizePixels
from graphs.config import ConfigReader
from graphs.preprocess.patches import PatchProcessor


@dataclass(frozen=True)
class PatchVisionConfig:
    """A tower.

    `merge`: patches along the side of the square that becomes one embedding. `frames`: pictures in time that one patch
    spans. `norm`: "layer" or "rms". `gated`: whether the MLP is. `window`: side in pixels of the squares within which
    patches see each other, in all layers but `full_layers`; 0 where they see the whole picture.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int = 14
    frames: int = 2
    merge: int = 2
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-6
    norm: str = "layer"
    gated: bool = False
    patch_bias: bool = False
    rope_theta: float = 10000.0
    window: int = 0
    full_layers: tuple[int, ...] = ()

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def unit(self) -> int:
        """Patches that become one embedding."""
        return self.merge**2

    @property
    def values(self) -> int:
        """Pixel values of a patch."""
        return 3 * self.frames * self.patch_size**2

    @property
    def window_side(self) -> int:
        """Embeddings along the side of a window."""
        return self.window // self.merge // self.patch_size

    def check(self, config: ConfigReader) -> None:
        """Raise UserError where heads do not divide the width into multiples of four, which 2-D positions need."""
        if self.hidden_size % self.num_attention_heads or self.head_width % 4:
            raise config.error(
                f"width {self.hidden_size} does not split into {self.num_attention_heads} heads of a multiple of 4"
            )


class AxialRotary(nn.Module):
    """Rows and columns [N, 2] (int64) to cosines and sines [N, K].

    Half of the pairs turn by the row, half by the column. Looked up, for the reason that `RotaryTable` gives.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, positions: int, theta: float) -> None:
        super().__init__()
        self.head_width, self.positions, self.theta = head_width, positions, theta
        for name, table in self.tables().items():
            self.register_buffer(name, table)

    def tables(self) -> dict[str, Tensor]:
        """The values of the buffers; asked for again where the module was built on fake tensors."""
        spatial = self.head_width // 2
        frequency = self.theta ** -(torch.arange(0, spatial, 2, dtype=torch.float64) / spatial)
        angle = torch.outer(torch.arange(self.positions, dtype=torch.float64), frequency)
        return {"cos": angle.cos().float(), "sin": angle.sin().float()}

    def forward(self, position_N2: Tensor) -> tuple[Tensor, Tensor]:
        flat = position_N2.reshape(-1)
        cos, sin = (table.index_select(0, flat).reshape(-1, self.head_width // 2) for table in (self.cos, self.sin))
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate` of text decoders, but sliced: ExecuTorch fixes a first dimension, dynamic here, of what is split."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class PatchEmbedding(nn.Module):
    """Raw patches [.., V] uint8, channel by channel, to their embeddings [N, D]: normalisation and one projection."""

    def __init__(self, config: PatchVisionConfig, pixels: PatchProcessor) -> None:
        super().__init__()
        self.shape = (-1, 3, config.frames * config.patch_size, config.patch_size)
        self.normalize = NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        self.projection = nn.Linear(config.values, config.hidden_size, bias=config.patch_bias)

    def forward(self, patches: Tensor) -> Tensor:
        pixels = patches.to(self.normalize.scale.dtype)  # before they are reshaped: TensorRT does not reshape bytes
        return self.projection(self.normalize(pixels.reshape(self.shape)).flatten(1))


class PatchAttention(nn.Module):
    """Multi-head attention of patches with rotary positions, biases everywhere.

    `cos`, `sin` broadcast to [B, A, T, K], the mask adds to [B, A, T, T].
    """

    def __init__(self, config: PatchVisionConfig) -> None:
        super().__init__()
        self.heads, width = config.num_attention_heads, config.hidden_size
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        q_BATK, k_BATK, v_BATK = (
            proj(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BATK, k_BATK = turned(q_BATK, cos, sin), turned(k_BATK, cos, sin)
        out_BATK = F.scaled_dot_product_attention(q_BATK, k_BATK, v_BATK, attn_mask=mask)
        return self.out_proj(out_BATK.transpose(1, 2).flatten(2))


class PatchGatedMLP(nn.Module):
    """The gated feed-forward network (Shazeer, arXiv 2002.05202), with biases."""

    def __init__(self, config: PatchVisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


def tower_norm(config: PatchVisionConfig) -> nn.Module:
    """The tower's kind of norm over its width."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, config.layer_norm_eps)


class PatchLayer(nn.Module):
    """A pre-norm block."""

    def __init__(self, config: PatchVisionConfig) -> None:
        super().__init__()
        self.norm1 = tower_norm(config)
        self.attn = PatchAttention(config)
        self.norm2 = tower_norm(config)
        self.mlp = PatchGatedMLP(config) if config.gated else EncoderMLP(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD), cos, sin, mask)
        return x_BTD + self.mlp(self.norm2(x_BTD))


class PatchTower(AlikeLayers):
    """Raw patches [.., V] uint8, rows and columns [.., 2] and groups [..] (int64) to features [N, D].

    Patches of the same group see each other. With windows, the patches of one stand side by side, `window_side`**2
    units of them, those outside the picture in a group of their own; layers without windows see all of them.
    `positions`: rows or columns that a picture may have.
    """

    def __init__(self, config: PatchVisionConfig, pixels: PatchProcessor, positions: int) -> None:
        super().__init__()
        self.length = config.window_side**2 * config.unit  # patches of a window; 0 without windows
        self.full_layers, self.width = config.full_layers, config.hidden_size
        self.embedding = PatchEmbedding(config, pixels)
        self.rotary = AxialRotary(config.head_width, positions, config.rope_theta)
        self.layers = nn.ModuleList(PatchLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, patches: Tensor, patch_position: Tensor, groups: Tensor) -> Tensor:
        x_ND = self.embedding(patches)
        cos_NK, sin_NK = self.rotary(patch_position.reshape(-1, 2))

        def seen(length: int) -> tuple[Tensor, Tensor, Tensor]:
            """Cosines, sines and mask of stretches of `length` patches, or of all of them at once where it is 0."""
            shape = (-1, 1, length) if length else (-1,)
            group = groups.reshape(shape)
            mask = torch.where(group.unsqueeze(-1) == group.unsqueeze(-2), 0.0, MASKED).to(x_ND.dtype)
            return cos_NK.reshape(*shape, cos_NK.shape[-1]), sin_NK.reshape(*shape, cos_NK.shape[-1]), mask

        lengths = [0 if index in self.full_layers else self.length for index in range(len(self.layers))]
        turned = {length: seen(length) for length in dict.fromkeys((self.length, 0))}
        x_BTD, stands = x_ND, -1
        for layer, length in zip(self.layers, lengths, strict=True):
            if length != stands:  # nothing stands between alike layers: they are one stack
                x_BTD, stands = x_BTD.reshape((-1, length, self.width) if length else (1, -1, self.width)), length
            x_BTD = layer(x_BTD, *turned[length])
        return x_BTD.reshape(-1, self.width)

    def repeated(self) -> nn.ModuleList | None:
        """The layers, where none has windows."""
        return None if self.length else self.layers


class PatchMerger(nn.Module):
    """Features [N, D] of patches, the `unit` of each square side by side, to embeddings [N / unit, out]."""

    def __init__(self, config: PatchVisionConfig, out_features: int) -> None:
        super().__init__()
        self.width = config.hidden_size * config.unit
        self.norm = tower_norm(config)
        self.fc1 = nn.Linear(self.width, self.width)
        self.fc2 = nn.Linear(self.width, out_features)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x_ND).reshape(-1, self.width))))
