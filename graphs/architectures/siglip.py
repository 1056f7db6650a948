"""SigLIP (Zhai et al. 2023, arXiv 2303.15343): pictures and texts in one space, trained by a sigmoid of each pair.

Weights in the layout of transformers' SiglipModel, which is that of the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from graphs.components.dual import DualEncoder, Similarity
from graphs.components.text.clip import SIGLIP_TEXT, ClipTextConfig
from graphs.components.vision.clip import SIGLIP_BASE_16, ClipVisionConfig
from graphs.components.vision.pooling import AttentionPool
from graphs.config import ConfigReader
from graphs.preprocess.image import ImageProcessor, read_processor
from graphs.spec import Variant
from graphs.weights import Rows, Source, by_prefix

HALF = (0.5, 0.5, 0.5)
POOL = "image_encoder.pool.attention."


@dataclass(frozen=True)
class Siglip(DualEncoder):
    """Configuration of one SigLIP."""

    name = "siglip"
    unused = (r"(text|vision)_model\.embeddings\.position_ids",)

    vision: ClipVisionConfig
    text: ClipTextConfig
    processor: ImageProcessor | None = None  # None: stretched to the tower's size, means and deviations a half

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        sizes: dict[str, Any] = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        }
        large = replace(SIGLIP_BASE_16, image_size=256, **sizes)
        large_text = replace(SIGLIP_TEXT, projection_dim=1024, **sizes)
        sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
        so400m = replace(SIGLIP_BASE_16, image_size=384, patch_size=14, **sizes)
        so400m_text = replace(SIGLIP_TEXT, projection_dim=1152, **sizes)
        small: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        tiny = replace(SIGLIP_BASE_16, image_size=48, patch_size=8, **small)
        tiny_text = replace(SIGLIP_TEXT, vocab_size=256, max_position_embeddings=16, projection_dim=64, **small)
        return (
            Variant("tiny", cls(tiny, tiny_text)),
            Variant("siglip-base-224", cls(SIGLIP_BASE_16, SIGLIP_TEXT), "google/siglip-base-patch16-224", 203_000_000),
            Variant("siglip-large-256", cls(large, large_text), "google/siglip-large-patch16-256", 652_000_000),
            Variant("siglip-so400m-384", cls(so400m, so400m_text), "google/siglip-so400m-patch14-384", 878_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision, text = reader.section("vision_config"), reader.section("text_config")
        if not vision.bool("vision_use_head", True):
            raise vision.error("vision_use_head is false; without the head a picture has no embedding")
        tower = ClipVisionConfig.from_reader(vision, SIGLIP_BASE_16)
        width = text.int("projection_size", text.int("hidden_size", SIGLIP_TEXT.hidden_size))
        if width != tower.hidden_size:
            raise reader.error(f"texts are {width} wide (text_config), pictures {tower.hidden_size} (vision_config)")
        return cls(
            vision=tower,
            text=ClipTextConfig.from_reader(text, SIGLIP_TEXT, width),
            processor=read_processor(preprocessor, tower.image_size),
        )

    @property
    def pixels(self) -> ImageProcessor:
        side = self.vision.image_size
        return self.processor or ImageProcessor(None, side, side, crop_size=None, image_mean=HALF, image_std=HALF)

    def head(self) -> tuple[nn.Module, nn.Module]:
        return AttentionPool(self.vision), nn.Identity()

    def similarity(self) -> Similarity:
        return Similarity(shape=(1,), bias=True)

    def source(self, parameter: str) -> Source:
        """The probe's attention keeps queries, keys and values in one tensor, in this order."""
        part, _, kind = parameter.removeprefix(POOL).partition("_proj.")
        if parameter.startswith(POOL) and part in "qkv":
            width = self.vision.hidden_size
            start = "qkv".index(part) * width
            return Source(f"vision_model.head.attention.in_proj_{kind}", (Rows(start, start + width),))
        return by_prefix(
            parameter,
            {
                "image_encoder.tower.layers.": "vision_model.encoder.layers.",
                "image_encoder.tower.": "vision_model.",
                "image_encoder.pool.post_layernorm.": "vision_model.post_layernorm.",
                "image_encoder.pool.": "vision_model.head.",
                "text_encoder.layers.": "text_model.encoder.layers.",
                "text_encoder.projection.": "text_model.head.",
                "text_encoder.": "text_model.",
                "similarity.": "",
            },
        )


ARCHITECTURE = Siglip
