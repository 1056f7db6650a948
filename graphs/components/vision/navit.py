"""SigLIP's tower for pictures of any shape (NaViT, arXiv 2307.06304), as Idefics 2 (arXiv 2405.02246) made it.

Patches of any picture share one square table of learned positions, see `graphs.preprocess.buckets`. Weights are named
as Hugging Face publishes them.
Shape suffixes: P pictures or tiles, C channels, H W pixels, N patches, K side of a patch, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from graphs.components.encoder import EncoderLayer
from graphs.components.stack import AlikeLayers
from graphs.components.text.cache import MASKED
from graphs.components.vision.clip import SIGLIP_BASE_16, ClipVisionConfig
from graphs.components.vision.pixels import NormalizePixels
from graphs.config import ConfigReader
from graphs.preprocess.buckets import bucketed
from graphs.preprocess.picture import Normalized

#: the defaults of Idefics 3's tower and of its twins, and those of Idefics 2's
IDEFICS3_BASE = replace(SIGLIP_BASE_16, hidden_size=1152, num_attention_heads=16, patch_size=32)
IDEFICS2_BASE = replace(SIGLIP_BASE_16, patch_size=32)


def siglip_so400m(image_size: int) -> ClipVisionConfig:
    """The shape-optimised SigLIP of 400M parameters (arXiv 2305.13035) for pictures of `image_size` pixels."""
    sizes = replace(IDEFICS3_BASE, intermediate_size=4304, num_hidden_layers=27)
    return replace(sizes, image_size=image_size, patch_size=14)


def read_navit(section: ConfigReader, families: Mapping[str, ClipVisionConfig], default: str) -> ClipVisionConfig:
    """The tower that a `vision_config` describes, `families` by its `model_type`. Raises: UserError."""
    return ClipVisionConfig.from_reader(section, families[section.choice("model_type", families, default=default)])


class TileEmbeddings(nn.Module):
    """Normalised tiles [P, 3, S, S], all full, to patches [P, N, D] at positions that are known when it is built."""

    positions: Tensor

    def __init__(self, config: ClipVisionConfig, side: int) -> None:
        super().__init__()
        self.cells, self.table = side // config.patch_size, config.grid
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)
        self.register_buffer("positions", self.tables()["positions"])

    def tables(self) -> dict[str, Tensor]:
        """The values of the buffers; asked for again where the module was built on fake tensors."""
        return {"positions": torch.from_numpy(bucketed(self.cells, self.cells, self.table))}

    def forward(self, pixels_PCHW: Tensor) -> Tensor:
        x_PND = self.patch_embedding(pixels_PCHW).flatten(2).transpose(1, 2)
        return x_PND + self.position_embedding(self.positions)


class PatchEmbeddings(nn.Module):
    """Raw patches [P, N, 3, K, K] of pictures of any shape, and where in the table they are [P, N], to [P, N, D]."""

    def __init__(self, config: ClipVisionConfig, pixels: Normalized) -> None:
        super().__init__()
        self.normalize = NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)

    def forward(self, patches_PNCKK: Tensor, positions_PN: Tensor) -> Tensor:
        normal = self.normalize(patches_PNCKK)
        return self.patch_embedding(normal.flatten(2)) + self.position_embedding(positions_PN)


class NavitTower(AlikeLayers):
    """What `embeddings` takes to features [P, N, D]; `mask` [P, 1, 1, N] adds to the scores of the patches seen.

    `layers`: how many are built, None for all. `post_norm`: whether the last state is normed.
    """

    def __init__(
        self, config: ClipVisionConfig, embeddings: nn.Module, layers: int | None = None, post_norm: bool = True
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        built = config.num_hidden_layers if layers is None else layers
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(built))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if post_norm else None

    def forward(self, *inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        x_PND = self.embeddings(*inputs)
        for layer in self.layers:
            x_PND = layer(x_PND, mask)
        return x_PND if self.post_layernorm is None else self.post_layernorm(x_PND)


def key_mask(real_PN: Tensor, dtype: torch.dtype) -> Tensor:
    """Patches that are real, 1, or padding, 0 (int64 [P, N]), as a mask [P, 1, 1, N] to add to scores."""
    return torch.where(real_PN > 0, 0.0, MASKED).to(dtype).unsqueeze(1).unsqueeze(1)
