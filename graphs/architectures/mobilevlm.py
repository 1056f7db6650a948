"""MobileVLM (arXiv 2312.16886) and MobileVLM V2 (arXiv 2402.03766): CLIP ViT, LDP projector, LLaMA decoder.

Weights in the public layout of Meituan-AutoML/MobileVLM: `model.layers.*`, `model.mm_projector.*`,
`model.vision_tower.vision_tower.vision_model.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from graphs.components.connectors.ldp import LDP, LDPv2
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder, VisionEncoder
from graphs.components.text.config import TextConfig
from graphs.components.vision.clip import CLIP_LARGE_336, ClipVisionConfig, ClipVisionTower, read_tower
from graphs.config import ConfigReader
from graphs.preprocess.image import ImageProcessor, read_processor
from graphs.preprocess.prompt import VICUNA_V1, PromptTemplate
from graphs.spec import Variant
from graphs.weights import Source, by_prefix


@dataclass(frozen=True)
class Projector:
    """A kind of projector: how to build it and where the public layout keeps its parameters."""

    build: Callable[[int, int, int], nn.Module]
    tokens: Callable[[int], int]  # tokens out, from the side of the grid
    keys: Mapping[str, str]  # prefix in the module -> prefix in the checkpoint


PROJECTORS: dict[str, Projector] = {
    "ldpnet": Projector(
        build=LDP,
        tokens=lambda grid: ((grid + 1) // 2) ** 2,
        keys={"mlp.": "model.mlp.", "mb_block.": "model.mb_block."},
    ),
    "ldpnetv2": Projector(
        build=LDPv2, tokens=lambda grid: LDPv2.POOLED**2, keys={"mlp.": "mlp.mlp.", "peg.": "peg.peg.0."}
    ),
}


@dataclass(frozen=True)
class MobileVLM(ImageTextDecoder):
    """Configuration of one MobileVLM, v1 (`ldpnet`) or v2 (`ldpnetv2`)."""

    name = "mobilevlm"
    unused = (
        r"model\.vision_tower\.vision_tower\.vision_model\.encoder\.layers\..*",  # layers above the selected one
        r"model\.vision_tower\.vision_tower\.vision_model\.(post_layernorm\..*|embeddings\.position_ids)",
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"lm_head\.weight",  # a tied head saved all the same; an untied one is a source and never unused
    )

    vision: ClipVisionConfig
    text: TextConfig
    projector: str
    select_layer: int = -2
    processor: ImageProcessor | None = None  # None: padded to a square and resized to the tower's, CLIP's statistics
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        llama_1b = TextConfig(2048, 5632, 24, 16, 16, 32000)
        llama_3b = TextConfig(2560, 6912, 32, 32, 32, 32000)
        llama_7b = TextConfig(4096, 11008, 32, 32, 32, 32000, rms_norm_eps=1e-5)
        tiny_vision = ClipVisionConfig(64, 128, 3, 4, 48, 8)
        tiny_text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=64)
        # the second version pools to 144 tokens whatever the picture, which a context of 64 could not hold
        wide_vision = replace(tiny_vision, image_size=96, patch_size=4)
        long_text = replace(tiny_text, max_position_embeddings=192)
        return (
            Variant("tiny", cls(tiny_vision, tiny_text, "ldpnet")),
            Variant("tiny-v2", cls(wide_vision, long_text, "ldpnetv2")),
            Variant("mobilevlm-1.7b", cls(CLIP_LARGE_336, llama_1b, "ldpnet"), "mtgv/MobileVLM-1.7B", 1_700_000_000),
            Variant("mobilevlm-3b", cls(CLIP_LARGE_336, llama_3b, "ldpnet"), "mtgv/MobileVLM-3B", 3_000_000_000),
            Variant(
                "mobilevlm-v2-1.7b", cls(CLIP_LARGE_336, llama_1b, "ldpnetv2"), "mtgv/MobileVLM_V2-1.7B", 1_700_000_000
            ),
            Variant(
                "mobilevlm-v2-7b", cls(CLIP_LARGE_336, llama_7b, "ldpnetv2"), "mtgv/MobileVLM_V2-7B", 7_060_000_000
            ),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision = read_tower(reader)
        return cls(
            vision=vision,
            text=TextConfig.from_reader(reader),
            projector=reader.choice("mm_projector_type", PROJECTORS),
            select_layer=reader.int("mm_vision_select_layer", -2, low=-vision.num_hidden_layers, high=-1),
            processor=read_processor(preprocessor, vision.image_size, config.get("image_aspect_ratio")),
        )

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def visual_tokens(self) -> int:
        return PROJECTORS[self.projector].tokens(self.vision.grid)

    def encoder(self) -> nn.Module:
        return VisionEncoder(
            self.image_processor,
            ClipVisionTower(self.vision, self.select_layer),
            PROJECTORS[self.projector].build(self.vision.hidden_size, self.text.hidden_size, self.vision.grid),
        )

    def source(self, parameter: str) -> Source:
        tower = "model.vision_tower.vision_tower.vision_model."
        head = "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        prefixes = {
            "vision_encoder.tower.layers.": f"{tower}encoder.layers.",
            "vision_encoder.tower.": tower,
            **{
                f"vision_encoder.projector.{ours}": f"model.mm_projector.{theirs}"
                for ours, theirs in PROJECTORS[self.projector].keys.items()
            },
            "token_embedding.": "model.embed_tokens.",
            "text_decoder.lm_head.": head,
            "text_decoder.": "model.",
        }
        return by_prefix(parameter, prefixes)

    def unused_parameters(self) -> int:
        """The tower's layers above the selected one, and its last norm."""
        return -(self.select_layer + 1) * self.vision.layer_parameters + 2 * self.vision.hidden_size

    @property
    def image_processor(self) -> ImageProcessor:
        side = self.vision.image_size
        return self.processor or ImageProcessor(side, crop_size=(side, side), aspect_ratio="pad")

    @property
    def template(self) -> PromptTemplate:
        return VICUNA_V1


ARCHITECTURE = MobileVLM
