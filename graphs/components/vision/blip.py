"""The vision towers of BLIP (Li et al., arXiv 2201.12086) and BLIP-2 (arXiv 2301.12597; EVA, arXiv 2211.07636).

CLIP's blocks without its norm in front and with one behind. Public checkpoints keep queries, keys and values in one
tensor; here they are apart, as in every other tower, so that passes find attention in one form.
Shape suffixes: B batch, C channels, H W pixels, T tokens with the class token, D width.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from graphs.components.vision.clip import ClipVisionConfig, ClipVisionTower
from graphs.config import ConfigReader
from graphs.sources import Reshape, Rows, Source, by_prefix

BLIP_BASE = ClipVisionConfig(768, 3072, 12, 12, 384, 16, "gelu", patch_bias=True, pre_norm=False)
EVA_GIANT = replace(
    BLIP_BASE,
    hidden_size=1408,
    intermediate_size=6144,
    num_hidden_layers=39,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    layer_norm_eps=1e-6,
)


def read_blip_tower(config: ConfigReader, family: ClipVisionConfig) -> ClipVisionConfig:
    """The tower that a `vision_config` describes; keys it lacks are those of `family`. Raises: UserError."""
    if not config.bool("qkv_bias", True):
        raise config.error("qkv_bias is false; the published towers, which are supported, all have it")
    return ClipVisionConfig.from_reader(config, family)


class BlipVisionTower(nn.Module):
    """Normalised pixels [B, 3, H, W] to the normed states [B, T, D] of the last layer, the class token first."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.blocks = ClipVisionTower(config, select_layer=-1, drop_first=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.post_layernorm(self.blocks(pixels_BCHW))


def tower_source(parameter: str, config: ClipVisionConfig, public: str = "vision_model.") -> Source:
    """Where checkpoints keep a parameter of a `BlipVisionTower`, given by its name there."""
    layer, _, part = parameter.partition(".self_attn.")
    which, _, kind = part.partition("_proj.")
    if part and which in ("q", "k", "v"):
        number, width = layer.rsplit(".", 1)[1], config.hidden_size
        start = "qkv".index(which) * width
        return Source(f"{public}encoder.layers.{number}.self_attn.qkv.{kind}", (Rows(start, start + width),))
    if parameter == "blocks.embeddings.class_embedding":
        return Source(f"{public}embeddings.class_embedding", (Reshape((config.hidden_size,)),))
    if parameter == "blocks.embeddings.position_embedding.weight":
        shape = (config.tokens, config.hidden_size)
        return Source(f"{public}embeddings.position_embedding", (Reshape(shape),))
    return by_prefix(
        parameter.replace(".self_attn.out_proj.", ".self_attn.projection."),
        {"blocks.layers.": f"{public}encoder.layers.", "blocks.": public, "": public},
    )
