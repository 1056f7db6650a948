"""InternViT (Chen et al., InternVL, arXiv 2312.14238), in the sizes of InternVL 2.5: 300M and 6B.

A pre-norm vision transformer whose branches are scaled by a learned vector (layer scale, arXiv 2103.17239). The small
one has layer norms and biases on queries, keys and values; the large one RMS norms, no such biases, and an RMS norm
over the whole width of queries and of keys.
Shape suffixes: B batch, C channels, H W pixels, T tokens with the class token, N patches, D width, A heads, K head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphs.components.activations import ACTIVATIONS
from graphs.components.encoder import EncoderMLP
from graphs.components.stack import AlikeLayers
from graphs.config import ConfigReader

#: `norm_type` of a vision_config -> its module, from a width and an epsilon
NORMS: Mapping[str, Callable[[int, float], nn.Module]] = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


@dataclass(frozen=True)
class InternVisionConfig:
    """Field names are those of an InternVLVisionConfig's JSON, but for the last three.

    `image_size` and `patch_size`: sides of squares, in pixels. `qk_norm_eps`: of the norms of queries and keys.
    `position`: whether there are learned positions. `last_norm`: whether a layer norm stands behind the last layer.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    norm_type: str = "layer_norm"
    attention_bias: bool = False
    use_qk_norm: bool = False
    qk_norm_eps: float = 1e-6
    position: bool = True
    last_norm: bool = False

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return self.grid**2 + 1

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        width, inner = self.hidden_size, self.intermediate_size
        matrices = 4 * width * width + 2 * width * inner
        biases = inner + 2 * width + 3 * width * self.attention_bias
        norms = 2 * width * (2 if self.norm_type == "layer_norm" else 1) + 2 * width * self.use_qk_norm
        return matrices + biases + norms + 2 * width


INTERN_VIT_300M = InternVisionConfig(1024, 4096, 24, 16, 448, 14, attention_bias=True)
INTERN_VIT_6B = InternVisionConfig(3200, 12800, 45, 25, 448, 14, norm_type="rms_norm", use_qk_norm=True)


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.weight


class InternEmbeddings(nn.Module):
    """Patches, the class token in front, learned positions."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.projection = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.tokens, width)) if config.position else None

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BND = self.projection(pixels_BCHW).flatten(2).transpose(1, 2)
        # The class token is not expanded: Core ML cannot by an unknown number of tiles.
        x_BTD = torch.cat([x_BND[:, :1] * 0 + self.cls_token, x_BND], dim=1)
        return x_BTD if self.position_embeddings is None else x_BTD + self.position_embeddings


class InternAttention(nn.Module):
    """Multi-head attention of tokens to themselves; norms of queries and keys span all heads."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias) for _ in range(3))
        self.q_norm = nn.RMSNorm(width, config.qk_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width, config.qk_norm_eps) if config.use_qk_norm else nn.Identity()
        self.projection_layer = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BATK, k_BATK, v_BATK = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_norm(self.q_proj(x_BTD)), self.k_norm(self.k_proj(x_BTD)), self.v_proj(x_BTD))
        )
        out_BATK = F.scaled_dot_product_attention(q_BATK, k_BATK, v_BATK)
        return self.projection_layer(out_BATK.transpose(1, 2).flatten(2))


class InternLayer(nn.Module):
    """A pre-norm block with layer scale on both branches."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        norm = NORMS[config.norm_type]
        self.layernorm_before = norm(config.hidden_size, config.layer_norm_eps)
        self.attention = InternAttention(config)
        self.attention_scale = LayerScale(config.hidden_size)
        self.layernorm_after = norm(config.hidden_size, config.layer_norm_eps)
        self.mlp = EncoderMLP(config)
        self.mlp_scale = LayerScale(config.hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention_scale(self.attention(self.layernorm_before(x_BTD)))
        return x_BTD + self.mlp_scale(self.mlp(self.layernorm_after(x_BTD)))


class InternVisionTower(AlikeLayers):
    """Normalised pixels [B, 3, H, W] to the patches' features [B, N, D] that leave layer `select_layer`.

    `select_layer` counts hidden states: 0 is what enters the first layer, -1 the output of the last, behind the last
    norm where there is one. Layers above are never built.
    """

    def __init__(self, config: InternVisionConfig, select_layer: int = -1) -> None:
        super().__init__()
        self.embeddings = InternEmbeddings(config)
        count = select_layer % (config.num_hidden_layers + 1)
        self.layers = nn.ModuleList(InternLayer(config) for _ in range(count))
        norms = config.last_norm and select_layer == -1
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if norms else nn.Identity()

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x_BTD = self.embeddings(pixels_BCHW)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.layernorm(x_BTD)[:, 1:]


def read_tower(config: ConfigReader) -> InternVisionConfig:
    """The tower that a `vision_config` of transformers describes, with its defaults. Raises: UserError."""
    return checked(
        config,
        InternVisionConfig(
            **read_sizes(config),
            norm_type=config.choice("norm_type", NORMS, default="layer_norm"),
            attention_bias=config.bool("attention_bias", False),
            use_qk_norm=config.bool("use_qk_norm", False),
            position=config.bool("use_absolute_position_embeddings", True),
            last_norm=not config.bool("use_mean_pooling", True),
        ),
    )


def read_original(config: ConfigReader, image_size: int) -> InternVisionConfig:
    """The tower that a `vision_config` of OpenGVLab describes, whose code has the defaults of the large one.

    `image_size`: what the whole model forces; 0 where it does not. Raises: UserError.
    """
    large = {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 48, "num_attention_heads": 25}
    given = {**large, "image_size": 224, **config.values}
    reader = ConfigReader(given, config.where)
    tower = InternVisionConfig(
        **read_sizes(reader),
        norm_type=reader.choice("norm_type", NORMS, default="rms_norm"),
        attention_bias=reader.bool("qkv_bias", False),
        use_qk_norm=reader.bool("qk_normalization", True),
        qk_norm_eps=reader.float("layer_norm_eps", 1e-6, high=1.0),
    )
    if image_size not in (0, tower.image_size):
        raise config.error(f"image_size is {tower.image_size}, force_image_size {image_size}: the positions are of one")
    return checked(config, tower)


def read_sizes(config: ConfigReader) -> dict[str, Any]:
    """The keys that both layouts share, with the defaults of the small tower."""
    return {
        "hidden_size": config.int("hidden_size", 1024),
        "intermediate_size": config.int("intermediate_size", 4096),
        "num_hidden_layers": config.int("num_hidden_layers", 24, high=1024),
        "num_attention_heads": config.int("num_attention_heads", 16, high=1024),
        "image_size": read_side(config, "image_size", 448),
        "patch_size": read_side(config, "patch_size", 14),
        "hidden_act": config.choice("hidden_act", ACTIVATIONS, default="gelu"),
        "layer_norm_eps": config.float("layer_norm_eps", 1e-6, low=0.0, high=1.0),
    }


def read_side(config: ConfigReader, key: str, default: int) -> int:
    """The side of a square, given as a number or as two that are the same. Raises: UserError for a rectangle."""
    given = config.values.get(key)
    if isinstance(given, list) and len(given) == 2 and given[0] != given[1]:
        raise config.error(f"{key} is {given}; this tower takes squares")
    side = given[0] if isinstance(given, list) and given else given
    return ConfigReader({key: side}, config.where).int(key, default, high=8192)


def checked(config: ConfigReader, tower: InternVisionConfig) -> InternVisionConfig:
    """`tower`, whose sizes fit each other. Raises: UserError."""
    config.int("num_channels", 3, low=3, high=3)
    if tower.hidden_size % tower.num_attention_heads:
        raise config.error(
            f"hidden_size {tower.hidden_size} is not a multiple of num_attention_heads {tower.num_attention_heads}"
        )
    if tower.patch_size > tower.image_size:
        raise config.error(f"patch_size {tower.patch_size} is larger than image_size {tower.image_size}")
    return tower
