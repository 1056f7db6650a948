"""SigLIP towers (Zhai et al., arXiv 2303.15343) whose last, normed states are all read, as image-text decoders do.

DeepSeek's checkpoints keep them as timm does (https://github.com/huggingface/pytorch-image-models): queries, keys and
values in one tensor, positions with a leading 1, and a pooling head that nothing here uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from graphs.components.vision.clip import ClipVisionConfig, ClipVisionTower
from graphs.sources import Reshape, Rows, Source


class SiglipTower(ClipVisionTower):
    """Normalised pixels [B, 3, H, W] to the normed states [B, N, D] of the last layer."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__(config, select_layer=-1, drop_first=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.post_layernorm(self.states(pixels_BCHW))


def siglip(width: int, inner: int, layers: int, side: int, patch: int, activation: str) -> ClipVisionConfig:
    """A SigLIP with heads that are 64 or 72 wide, as all published ones are."""
    return ClipVisionConfig(
        width, inner, layers, 16, side, patch, activation, 1e-6, class_token=False, patch_bias=True, pre_norm=False
    )


SIGLIP_LARGE_384 = siglip(1024, 4096, 24, 384, 16, "gelu")

#: towers that a config.json of DeepSeek's names instead of describing
TIMM_TOWERS: Mapping[str, ClipVisionConfig] = {
    "siglip_large_patch16_384": SIGLIP_LARGE_384,
    "siglip_so400m_patch14_384": siglip(1152, 4304, 27, 384, 14, "gelu"),
}


def timm_aliases(prefix: str) -> tuple[tuple[str, str], ...]:
    """How timm's names behind `prefix`, a regular expression, become transformers' behind `vision_model.`."""
    layer = prefix + r"blocks\.(\d+)\."
    return (
        (layer + r"attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
        (layer + r"attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.out_proj."),
        (layer + r"norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
        (layer + r"mlp\.", r"vision_model.encoder.layers.\1.mlp."),
        (prefix + r"patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (prefix + "pos_embed", "vision_model.embeddings.position_embedding.weight"),
        (prefix + r"norm\.", "vision_model.post_layernorm."),
        (prefix + r"attn_pool\.", "vision_model.head."),
    )


#: parameters of a whole SigLIP that its tower is read without
UNUSED_HEAD = (r"vision_model\.(head\..*|embeddings\.position_ids)",)


def tower_source(parameter: str, vision: ClipVisionConfig, timm: bool) -> Source:
    """The tensor of a parameter of a `SiglipTower`; `timm`: in that layout, once `timm_aliases` have renamed it."""
    key = "vision_model." + re.sub(r"^layers\.", "encoder.layers.", parameter)
    if not timm:
        return Source(key)
    if parameter == "embeddings.position_embedding.weight":
        return Source(key, (Reshape((vision.tokens, vision.hidden_size)),))
    found = re.search(r"self_attn\.([qkv])_proj\.", key)
    if found is None:
        return Source(key)
    start = "qkv".index(found[1]) * vision.hidden_size
    return Source(key.replace(found[0], "self_attn.qkv."), (Rows(start, start + vision.hidden_size),))


def head_parameters(vision: ClipVisionConfig) -> int:
    """Parameters of the attention pooling that published checkpoints carry along."""
    return vision.layer_parameters - 2 * vision.hidden_size + vision.hidden_size  # one norm fewer, and the probe
