"""MetaCLIP (Xu et al. 2023, arXiv 2309.16671): CLIP's graph, trained on data that metadata balances.

All its sizes keep CLIP's quick GELU. Weights in the layout of transformers' CLIPModel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphs.architectures.clip import CLIP_TEXT_LARGE, TINY_TEXT, TINY_VISION, Clip
from graphs.components.text.clip import CLIP_TEXT
from graphs.components.vision.clip import CLIP_BASE_32, CLIP_LARGE_336, ClipVisionConfig
from graphs.spec import Variant


@dataclass(frozen=True)
class MetaClip(Clip):
    """Configuration of one MetaCLIP."""

    name = "metaclip"

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        base_16 = replace(CLIP_BASE_32, patch_size=16)
        large = replace(CLIP_LARGE_336, image_size=224)
        huge = ClipVisionConfig(1280, 5120, 32, 16, 224, 14)
        text_huge = replace(
            CLIP_TEXT,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            projection_dim=1024,
        )
        return (
            Variant("tiny", cls(TINY_VISION, TINY_TEXT)),
            Variant("metaclip-b32", cls(CLIP_BASE_32, CLIP_TEXT), "facebook/metaclip-b32-400m", 151_000_000),
            Variant("metaclip-b16", cls(base_16, CLIP_TEXT), "facebook/metaclip-b16-fullcc2.5b", 150_000_000),
            Variant("metaclip-l14", cls(large, CLIP_TEXT_LARGE), "facebook/metaclip-l14-fullcc2.5b", 428_000_000),
            Variant("metaclip-h14", cls(huge, text_huge), "facebook/metaclip-h14-fullcc2.5b", 986_000_000),
        )


ARCHITECTURE = MetaClip
