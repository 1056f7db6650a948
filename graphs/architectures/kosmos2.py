"""KOSMOS-2 (Peng et al., arXiv 2306.14824): CLIP tower, latent queries, a Magneto decoder that grounds what it says.

Embeddings of pictures and of text alike are multiplied by the decoder's scale before positions are added, here where
they are made. Boxes are pairs of location tokens. Weights in the layout of transformers'
Kosmos2ForConditionalGeneration, which is that of the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from graphs.components.connectors.latent import LatentResampler
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder, VisionEncoder
from graphs.components.text.config import TextConfig
from graphs.components.text.magneto import MagnetoDecoder, read_magneto
from graphs.components.vision.clip import CLIP_LARGE_336, ClipVisionConfig, ClipVisionTower
from graphs.config import ConfigReader
from graphs.preprocess.framed import FramedProcessor
from graphs.preprocess.image import ImageProcessor, read_processor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Variant
from graphs.weights import Source, by_prefix

#: the token that holds a place for an embedding; its own vocabulary has no use for it in a prompt of one picture,
#: while the one called <image> announces the picture
PLACEHOLDER = "</chunk>"

CLIP_LARGE_224 = ClipVisionConfig(1024, 4096, 24, 16, 224, CLIP_LARGE_336.patch_size)


@dataclass(frozen=True)
class Kosmos2(ImageTextDecoder):
    """Configuration of one KOSMOS-2.

    `queries`: embeddings that a picture becomes. `pad_id`: positions are counted from the number behind it.
    """

    name = "kosmos2"
    unused = (
        r"vision_model\.model\.embeddings\.position_ids",
        r"text_model\.model\.embed_positions\.weights",
        r"text_model\.lm_head\.weight",  # a tied head saved all the same
    )

    vision: ClipVisionConfig
    text: TextConfig
    queries: int = 64
    pad_id: int = 1
    processor: ImageProcessor | None = None  # None: CLIP's, stretched to the tower's size
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        sizes = {"embed_dim": 64, "ffn_dim": 96, "layers": 2, "attention_heads": 4, "vocab_size": 256}
        tiny = read_magneto(ConfigReader({**sizes, "max_position_embeddings": 96}))
        hub = "microsoft/kosmos-2-patch14-224"
        return (
            Variant("tiny", cls(ClipVisionConfig(48, 96, 2, 4, 48, 8), tiny, 8)),
            Variant("kosmos-2", cls(CLIP_LARGE_224, read_magneto(ConfigReader({}))), hub, 1_660_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision = ClipVisionConfig.from_reader(reader.section("vision_config"), CLIP_LARGE_224)
        section = reader.section("text_config")
        tied = section.bool("tie_word_embeddings", True) and reader.bool("tie_word_embeddings", True)
        text = read_magneto(ConfigReader({**section.values, "tie_word_embeddings": tied}, section.where))
        return cls(
            vision=vision,
            text=text,
            queries=reader.int("latent_query_num", 64, high=4096),
            pad_id=section.int("pad_token_id", 1, low=0, high=text.vocab_size - 1),
            processor=read_processor(stretched(preprocessor), vision.image_size),
        )

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def visual_tokens(self) -> int:
        return self.queries

    def encoder(self) -> nn.Module:
        tower = ClipVisionTower(self.vision, select_layer=-1, drop_first=False)
        resampler = LatentResampler(self.vision, self.text, self.queries, self.text.embedding_scale)
        return VisionEncoder(self.image_processor, tower, resampler)

    def decoder(self) -> nn.Module:
        return MagnetoDecoder(self.text, self.context, self.pad_id + 1)

    def source(self, parameter: str) -> Source:
        head = "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        return by_prefix(
            parameter,
            {
                "vision_encoder.tower.layers.": "vision_model.model.encoder.layers.",
                "vision_encoder.tower.": "vision_model.model.",
                "vision_encoder.projector.post_layernorm.": "vision_model.model.post_layernorm.",
                "vision_encoder.projector.": "image_to_text_projection.",
                "token_embedding.": "text_model.model.embed_tokens.",
                "text_decoder.lm_head.": f"text_model.{head}",
                "text_decoder.": "text_model.model.",
            },
        )

    @property
    def image_processor(self) -> FramedProcessor:
        side = self.vision.image_size
        pixels = self.processor or ImageProcessor(None, side, side, crop_size=(side, side))
        return FramedProcessor.of(pixels, "<image>", PLACEHOLDER, self.queries, "</image>")

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(image=PLACEHOLDER, image_separator=" ")


def stretched(preprocessor: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A preprocessor_config.json with the key that only KOSMOS-2's has written out: pictures become squares."""
    if not preprocessor or not preprocessor.get("use_square_size"):
        return preprocessor
    size = preprocessor.get("size")
    edge = size.get("shortest_edge", 224) if isinstance(size, Mapping) else size or 224
    return {**preprocessor, "size": {"height": edge, "width": edge}}


ARCHITECTURE = Kosmos2
