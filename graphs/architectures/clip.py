"""CLIP (Radford et al. 2021, arXiv 2103.00020): pictures and texts in one space, trained by contrast.

Weights in the layout of transformers' CLIPModel, which is that of the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from graphs.components.dual import DualEncoder, Similarity
from graphs.components.text.clip import CLIP_TEXT, ClipTextConfig
from graphs.components.vision.clip import CLIP_BASE_32, CLIP_LARGE_336, ClipVisionConfig
from graphs.components.vision.pooling import ClassPool
from graphs.config import ConfigReader
from graphs.preprocess.image import ImageProcessor, read_processor
from graphs.spec import Variant
from graphs.weights import Source, by_prefix

CLIP_TEXT_LARGE = ClipTextConfig(768, 3072, 12, 12, 49408, 768)
TINY_VISION = ClipVisionConfig(64, 128, 2, 4, 48, 8)
TINY_TEXT = ClipTextConfig(48, 96, 2, 4, 256, 32, max_position_embeddings=20, eos_token_id=255)


@dataclass(frozen=True)
class Clip(DualEncoder):
    """Configuration of one CLIP."""

    name = "clip"
    unused = (r"(text|vision)_model\.embeddings\.position_ids",)

    vision: ClipVisionConfig
    text: ClipTextConfig
    processor: ImageProcessor | None = None  # None: CLIP's, at the tower's size

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        base_16 = replace(CLIP_BASE_32, patch_size=16)
        large = replace(CLIP_LARGE_336, image_size=224)
        return (
            Variant("tiny", cls(TINY_VISION, TINY_TEXT)),
            Variant("clip-vit-b-32", cls(CLIP_BASE_32, CLIP_TEXT), "openai/clip-vit-base-patch32", 151_000_000),
            Variant("clip-vit-b-16", cls(base_16, CLIP_TEXT), "openai/clip-vit-base-patch16", 150_000_000),
            Variant("clip-vit-l-14", cls(large, CLIP_TEXT_LARGE), "openai/clip-vit-large-patch14", 428_000_000),
            Variant(
                "clip-vit-l-14-336",
                cls(CLIP_LARGE_336, CLIP_TEXT_LARGE),
                "openai/clip-vit-large-patch14-336",
                428_000_000,
            ),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        # The first published files repeat a section as `*_config_dict`, which then says everything about it.
        vision, text = (
            reader.section(f"{name}_config_dict" if f"{name}_config_dict" in reader else f"{name}_config")
            for name in ("vision", "text")
        )
        tower = ClipVisionConfig.from_reader(vision, CLIP_BASE_32)
        width = reader.int("projection_dim", CLIP_TEXT.projection_dim)
        return cls(
            vision=tower,
            text=ClipTextConfig.from_reader(text, CLIP_TEXT, width),
            processor=read_processor(preprocessor, tower.image_size),
        )

    @property
    def pixels(self) -> ImageProcessor:
        side = self.vision.image_size
        return self.processor or ImageProcessor(side, crop_size=(side, side))

    def head(self) -> tuple[nn.Module, nn.Module]:
        return ClassPool(self.vision), nn.Linear(self.vision.hidden_size, self.text.projection_dim, bias=False)

    def similarity(self) -> Similarity:
        return Similarity(shape=(), bias=False)

    def source(self, parameter: str) -> Source:
        return by_prefix(
            parameter,
            {
                "image_encoder.tower.layers.": "vision_model.encoder.layers.",
                "image_encoder.tower.": "vision_model.",
                "image_encoder.pool.": "vision_model.",
                "image_encoder.projection.": "visual_projection.",
                "text_encoder.layers.": "text_model.encoder.layers.",
                "text_encoder.projection.": "text_projection.",
                "text_encoder.": "text_model.",
                "similarity.": "",
            },
        )


ARCHITECTURE = Clip
