"""SmolVLM (Marafioti et al., arXiv 2504.05299): Idefics 3 with small towers and SmolLM2, and fewer embeddings a tile.

The first checkpoints are of transformers' Idefics3 class, those of SmolVLM2 of its SmolVLM class: one graph and one
layout of weights. Frames of a video are pictures that are not split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphs.architectures.idefics3 import IDEFICS, Idefics3, tiny
from graphs.components.image_text import MAX_CONTEXT
from graphs.components.text.config import TextConfig
from graphs.components.vision.clip import SIGLIP_BASE_16
from graphs.components.vision.navit import siglip_so400m
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Variant

#: SmolLM2 (arXiv 2502.02737) of 135M, 360M and 1.7B parameters, with words for pictures
SMOLLM2_135M = TextConfig(576, 1536, 30, 9, 3, 49280, 8192, rms_norm_eps=1e-5, rope_theta=100000.0)
SMOLLM2_360M = TextConfig(960, 2560, 32, 15, 5, 49280, 8192, rms_norm_eps=1e-5, rope_theta=100000.0)
SMOLLM2_1700M = TextConfig(2048, 8192, 24, 32, 32, 49155, 16384, rms_norm_eps=1e-5, rope_theta=273768.0)


@dataclass(frozen=True)
class SmolVLM(Idefics3):
    """Configuration of one SmolVLM or SmolVLM2."""

    name = "smolvlm"

    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        base, large = replace(SIGLIP_BASE_16, image_size=512), siglip_so400m(384)
        small, middle, biggest = cls(base, SMOLLM2_135M, 4), cls(base, SMOLLM2_360M, 4), cls(large, SMOLLM2_1700M, 3)
        hub = "HuggingFaceTB/SmolVLM"
        return (
            tiny(cls),
            Variant("smolvlm-256m", small, f"{hub}-256M-Instruct", 256_000_000),
            Variant("smolvlm-500m", middle, f"{hub}-500M-Instruct", 507_000_000),
            Variant("smolvlm-2.2b", biggest, f"{hub}-Instruct", 2_250_000_000),
            Variant("smolvlm2-256m", small, f"{hub}2-256M-Video-Instruct", 256_000_000),
            Variant("smolvlm2-500m", middle, f"{hub}2-500M-Video-Instruct", 507_000_000),
            Variant("smolvlm2-2.2b", biggest, f"{hub}2-2.2B-Instruct", 2_250_000_000),
        )

    @property
    def template(self) -> PromptTemplate:
        return replace(IDEFICS, system="<|im_start|>")


ARCHITECTURE = SmolVLM
