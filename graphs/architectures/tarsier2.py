"""Tarsier2 (Yuan et al., arXiv 2501.07888): the graph of Qwen2-VL-7B, trained to describe videos.

Its checkpoints wrap that model in the shell of a LLaVA: `vision_tower.*`, `language_model.*`, and a `text_config` that
is the whole configuration of a Qwen2-VL (https://github.com/bytedance/tarsier). Frames are pictures of their own unless
they are given as one video.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from graphs.architectures.qwen2_vl import Qwen2VL, decoder
from graphs.components.vision.patches import PatchVisionConfig
from graphs.config import ConfigReader
from graphs.preprocess.patches import PatchProcessor
from graphs.spec import Variant

PROCESSOR = PatchProcessor(max_pixels=460_800)  # of a frame, where a checkpoint says nothing of them


@dataclass(frozen=True)
class Tarsier2(Qwen2VL):
    """Configuration of one Tarsier2; see `Qwen2VL`."""

    name = "tarsier2"
    aliases = (
        (r"(model\.)?vision_tower\.", "visual."),
        (r"language_model\.model\.", "model."),
        (r"language_model\.lm_head\.", "lm_head."),
        *Qwen2VL.aliases,
    )
    unused = (*Qwen2VL.unused, r"multi_modal_projector\..*")  # of the shell; embeddings come merged from the tower

    processor: PatchProcessor = PROCESSOR

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        tiny, *_ = Qwen2VL.variants()
        made = cls(PatchVisionConfig(1280, 5120, 32, 16), decoder(3584, 18944, 28, 28, 4, 152064))
        assert isinstance(tiny.architecture, Qwen2VL)
        small = tiny.architecture
        hub = "omni-research/Tarsier2"
        return (
            Variant("tiny", cls(small.vision, small.text, small.processor)),
            Variant("tarsier2-recap-7b", made, f"{hub}-Recap-7b", 8_290_000_000),
            Variant("tarsier2-7b", made, f"{hub}-7b-0115", 8_290_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        """From the shell's config.json, or from that of the Qwen2-VL within."""
        reader = ConfigReader(config)
        if reader.values.get("model_type") != "llava":
            return super().from_config(config, preprocessor)
        inner = {"vision_config": config.get("vision_config"), **reader.section("text_config").values}
        return super().from_config(inner, preprocessor)

    @classmethod
    def made_by(cls, vision: PatchVisionConfig, config: ConfigReader) -> PatchProcessor:
        return PROCESSOR


ARCHITECTURE = Tarsier2
