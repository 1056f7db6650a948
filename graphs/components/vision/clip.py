"""The vision towers of CLIP (Radford et al. 2021, arXiv 2103.00020) and SigLIP (Zhai et al. 2023, arXiv 2303.15343).

One tower, whose configuration says where the two differ; weights are named as Hugging Face publishes them.
Shape suffixes: B batch, C channels, H W pixels, T tokens with the class token, N patches, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.encoder import EncoderLayer
from graphs.components.stack import AlikeLayers
from graphs.config import ConfigReader


@dataclass(frozen=True)
class ClipVisionConfig:
    """Field names are those of a CLIPVisionConfig's JSON; the last three tell CLIP from SigLIP."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True  # a norm before the first layer

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches, and the class token where there is one."""
        return self.grid**2 + self.class_token

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        width, inner = self.hidden_size, self.intermediate_size
        return 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width

    @classmethod
    def from_reader(cls, config: ConfigReader, family: ClipVisionConfig | None = None) -> Self:
        """The tower that a `vision_config` describes; keys it lacks are those of `family`, sizes required without one.

        Raises: UserError naming the key at fault.
        """
        base = family or cls(0, 0, 0, 0, 0, 0)
        tower = cls(
            hidden_size=config.int("hidden_size", base.hidden_size or None),
            intermediate_size=config.int("intermediate_size", base.intermediate_size or None),
            num_hidden_layers=config.int("num_hidden_layers", base.num_hidden_layers or None, high=1024),
            num_attention_heads=config.int("num_attention_heads", base.num_attention_heads or None, high=1024),
            image_size=config.int("image_size", base.image_size or None, high=8192),
            patch_size=config.int("patch_size", base.patch_size or None, high=1024),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default=base.hidden_act),
            layer_norm_eps=config.float("layer_norm_eps", base.layer_norm_eps, low=0.0, high=1.0),
            class_token=base.class_token,
            patch_bias=base.patch_bias,
            pre_norm=base.pre_norm,
        )
        config.int("num_channels", 3, low=3, high=3)
        if tower.hidden_size % tower.num_attention_heads:
            raise config.error(
                f"hidden_size {tower.hidden_size} is not a multiple of num_attention_heads {tower.num_attention_heads}"
            )
        if tower.patch_size > tower.image_size:
            raise config.error(f"patch_size {tower.patch_size} is larger than image_size {tower.image_size}")
        return tower


CLIP_BASE_32 = ClipVisionConfig(768, 3072, 12, 12, 224, 32)
CLIP_LARGE_336 = ClipVisionConfig(1024, 4096, 24, 16, 336, 14)
SIGLIP_BASE_16 = ClipVisionConfig(
    768, 3072, 12, 12, 224, 16, "gelu_pytorch_tanh", 1e-6, class_token=False, patch_bias=True, pre_norm=False
)

#: `model_type` of a vision_config -> the configuration of its class's defaults
FAMILIES: Mapping[str, ClipVisionConfig] = {"clip_vision_model": CLIP_BASE_32, "siglip_vision_model": SIGLIP_BASE_16}

#: published towers that a config.json may name instead of describing
TOWERS: Mapping[str, ClipVisionConfig] = {
    "openai/clip-vit-large-patch14-336": CLIP_LARGE_336,
    "openai/clip-vit-large-patch14": replace(CLIP_LARGE_336, image_size=224),
    "openai/clip-vit-base-patch16": replace(CLIP_BASE_32, patch_size=16),
    "openai/clip-vit-base-patch32": CLIP_BASE_32,
}


def read_tower(config: ConfigReader) -> ClipVisionConfig:
    """LLaVA's tower: described by `vision_config`, or one of `TOWERS` named by `mm_vision_tower`. Raises: UserError."""
    if "vision_config" not in config:
        return TOWERS[config.choice("mm_vision_tower", TOWERS)]
    return ClipVisionConfig.from_reader(config.section("vision_config"))


class ClipEmbeddings(nn.Module):
    """Patches, the class token in front where there is one, learned positions."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size)) if config.class_token else None
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=config.patch_bias
        )
        self.position_embedding = nn.Embedding(config.tokens, config.hidden_size)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BTD = self.patch_embedding(pixels_BCHW).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:  # not expanded: Core ML cannot by an unknown number of tiles
            class_11D = self.class_embedding.reshape(1, 1, -1)
            x_BTD = torch.cat([x_BTD[:, :1] * 0 + class_11D, x_BTD], dim=1)
        return x_BTD + self.position_embedding.weight


class ClipVisionTower(AlikeLayers):
    """Normalised pixels [B, 3, H, W] to features [B, T - drop_first, D] of the layer `select_layer`.

    `select_layer` counts hidden states as LLaVA does (arXiv 2304.08485): 0 is what enters the first layer, -1 the
    output of the last layer, -2 that of the layer before it; of several, features stand side by side, [B, T, n * D].
    Layers above the highest are never built. `drop_first` leaves out the first token, CLIP's class token.
    """

    def __init__(
        self, config: ClipVisionConfig, select_layer: int | tuple[int, ...] = -2, drop_first: bool = True
    ) -> None:
        super().__init__()
        self.selected, self.drop_first = selected(config, select_layer), drop_first
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.pre_norm else None
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(max(self.selected)))

    def repeated(self) -> nn.ModuleList | None:
        """The layers, where only the last one's output is selected."""
        return self.layers if len(self.selected) == 1 else None

    def states(self, pixels_BCHW: Tensor) -> Tensor:
        """States [B, T, n * D] of the selected layers, the class token in front."""
        x_BTD = self.embeddings(pixels_BCHW)
        if self.pre_layrnorm is not None:
            x_BTD = self.pre_layrnorm(x_BTD)
        states = [x_BTD]
        for layer in self.layers:
            states.append(layer(states[-1]))
        if len(self.selected) == 1:
            return states[-1]
        return torch.cat([states[index] for index in self.selected], dim=-1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        states_BTD = self.states(pixels_BCHW)
        return states_BTD[:, 1:] if self.drop_first else states_BTD


def selected(config: ClipVisionConfig, select_layer: int | tuple[int, ...]) -> tuple[int, ...]:
    """`select_layer` as indices from 0 among the states of a tower."""
    layers = select_layer if isinstance(select_layer, tuple) else (select_layer,)
    return tuple(layer % (config.num_hidden_layers + 1) for layer in layers)
