"""PaliGemma (Beyer et al., arXiv 2407.07726): a SigLIP tower, one linear layer, a Gemma decoder over a whole prefix.

Picture and question see each other whatever their order, what is generated is causal: `text_decoder` takes the prompt
in one call (`prefix` of its configuration). transformers counts positions from 1, which changes nothing, as rotary
positions are relative. Text embeddings are scaled by the root of their width, those of pictures are not.
Weights in the layouts that transformers has written (`vision_tower.*`, `multi_modal_projector.*`, `language_model.*`).
Boxes and masks are written in tokens (`<loc0000>`, `<seg000>`); what draws a mask from those is a model of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from graphs.architectures.siglip import HALF
from graphs.components.connectors.linear import LinearProjector
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder, VisionEncoder
from graphs.components.text.config import FAMILIES, GEMMA, TextConfig
from graphs.components.vision.clip import SIGLIP_BASE_16, ClipVisionConfig
from graphs.components.vision.siglip import SiglipTower, siglip
from graphs.config import ConfigReader
from graphs.preprocess.image import ImageProcessor, read_processor
from graphs.preprocess.prompt import PromptTemplate
from graphs.sources import Plus
from graphs.spec import Variant
from graphs.weights import Source, by_prefix

SIGLIP_SO400M = siglip(1152, 4304, 27, 224, 14, "gelu_pytorch_tanh")
GEMMA_2B = replace(
    GEMMA,
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    vocab_size=257216,
    embedding_scale=2048**0.5,
    prefix=True,
)
TINY_VISION = replace(SIGLIP_BASE_16, image_size=48, patch_size=8, hidden_size=64, intermediate_size=128,
                      num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
TINY_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 96,
    "head_dim": 24,
    "embedding_scale": 8.0,
    "prefix": True,
}

#: tokens that a prompt and its answer have beside those of the picture, at least
ROOM = 1024


@dataclass(frozen=True)
class PaliGemma(ImageTextDecoder):
    """Configuration of one PaliGemma."""

    name = "paligemma"
    aliases = (
        (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
    )
    unused = (
        r"vision_tower\.(head\..*|embeddings\.position_ids)",
        r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"language_model\.lm_head\.weight",  # a tied head saved all the same
    )

    vision: ClipVisionConfig
    text: TextConfig
    processor: ImageProcessor | None = None  # None: stretched to the tower's size, means and deviations a half
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        tiny = replace(GEMMA, num_hidden_layers=2, num_key_value_heads=1, **TINY_SIZES)
        hub, parameters = "google/paligemma-3b", 2_920_000_000
        return (
            Variant("tiny", cls(TINY_VISION, tiny)),
            *(
                Variant(f"paligemma-3b-{name}", cls.sized(side, GEMMA_2B), f"{hub}-{kind}-{side}", parameters)
                for name, kind, side in (
                    ("224", "pt", 224),
                    ("448", "pt", 448),
                    ("896", "pt", 896),
                    ("mix-224", "mix", 224),
                    ("mix-448", "mix", 448),
                )
            ),
        )

    @classmethod
    def sized(cls, side: int, text: TextConfig) -> Self:
        """The published tower at another resolution over a decoder, with a context that holds such pictures."""
        vision = replace(SIGLIP_SO400M, image_size=side)
        return cls(vision, text, max_context=max(MAX_CONTEXT, vision.tokens + ROOM))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision, text = read_vision(reader.section("vision_config")), read_text(reader)
        width = reader.int("projection_dim", GEMMA_2B.hidden_size)
        if width != text.hidden_size:
            raise reader.error(f"projection_dim is {width}; the decoder's embeddings are {text.hidden_size} wide")
        processor = read_processor(preprocessor, vision.image_size)
        return cls(vision, text, processor, max(MAX_CONTEXT, vision.tokens + ROOM))

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def visual_tokens(self) -> int:
        return self.vision.tokens

    def encoder(self) -> nn.Module:
        projector = LinearProjector(self.vision.hidden_size, self.text.hidden_size)
        return VisionEncoder(self.image_processor, SiglipTower(self.vision), projector)

    def source(self, parameter: str) -> Source:
        """Norms of Gemma's family store their weights less 1."""
        head = "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        found = by_prefix(
            parameter,
            {
                "vision_encoder.tower.layers.": "vision_tower.encoder.layers.",
                "vision_encoder.tower.": "vision_tower.",
                "vision_encoder.projector.": "multi_modal_projector.",
                "token_embedding.": "language_model.model.embed_tokens.",
                "text_decoder.lm_head.": f"language_model.{head}",
                "text_decoder.": "language_model.model.",
            },
        )
        is_norm = parameter.startswith("text_decoder.") and parameter.endswith("norm.weight")
        return replace(found, operations=(Plus(1.0),)) if is_norm else found

    @property
    def image_processor(self) -> ImageProcessor:
        side = self.vision.image_size
        return self.processor or ImageProcessor(None, side, side, crop_size=None, image_mean=HALF, image_std=HALF)

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(question="<bos>", assistant="\n", image_separator="", begin=False)


def read_vision(config: ConfigReader) -> ClipVisionConfig:
    """The tower of a `vision_config`; PaliGemma's own only where it is not described at all, as in transformers."""
    config.choice("model_type", ("siglip_vision_model",), default="siglip_vision_model")
    if config.values:
        return ClipVisionConfig.from_reader(config, SIGLIP_BASE_16)
    return replace(SIGLIP_SO400M, intermediate_size=4096)


def read_text(config: ConfigReader) -> TextConfig:
    """The decoder of a `text_config`, a Gemma or a Gemma 2, its head tied unless the whole configuration says not."""
    section = config.section("text_config")
    if not section.values:
        return replace(GEMMA_2B, vocab_size=257152)
    kind = section.choice("model_type", ("gemma", "gemma2"), default="gemma")
    values = {**section.values, "tie_word_embeddings": config.bool("tie_word_embeddings", True)}
    if kind == "gemma" and values.get("hidden_act") == "gelu":  # an old slip: all Gemmas have the approximation
        values["hidden_act"] = "gelu_pytorch_tanh"
    return replace(TextConfig.from_reader(ConfigReader(values, section.where), FAMILIES[kind]), prefix=True)


ARCHITECTURE = PaliGemma
