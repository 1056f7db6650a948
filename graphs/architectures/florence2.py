"""Florence-2 (Xiao et al., arXiv 2311.06242): a DaViT tower before the encoder of a BART, tasks as prompts.

Pictures and text are read together by `text_encoder`, which gives the keys and values that every layer of
`text_decoder` attends to; answers, locations included, are tokens. Weights in the layout that transformers writes
(`model.vision_tower.*`, `model.multi_modal_projector.*`, `model.language_model.*`), or in the authors' own on the hub
(`vision_tower.*`, `image_projection`, `language_model.model.*`), told apart by how config.json describes the tower.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from graphs.components.connectors.positioned import PositionedProjector
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder, VisionEncoder
from graphs.components.text.bart import BartDecoder, BartEncoder, read_bart
from graphs.components.text.config import TextConfig
from graphs.components.vision.davit import DavitConfig, DavitTower
from graphs.config import ConfigReader
from graphs.errors import UserError
from graphs.preprocess.image import ImageProcessor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Dim, Method, TensorSpec, Variant
from graphs.weights import Reshape, Rows, Source, Transpose, by_prefix

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: what the published models make of a map, and all that transformers' class does: its mean, and its tokens
FEATURES = ("spatial_avg_pool", "temporal_avg_pool")

OFFSET = 2  # BART's position tables begin with two rows that no token has

#: a task's token -> what the model is asked; `{input}` is what follows the token
TASKS = (
    ("<OCR>", "What is the text in the image?"),
    ("<OCR_WITH_REGION>", "What is the text in the image, with regions?"),
    ("<CAPTION>", "What does the image describe?"),
    ("<DETAILED_CAPTION>", "Describe in detail what is shown in the image."),
    ("<MORE_DETAILED_CAPTION>", "Describe with a paragraph what is shown in the image."),
    ("<OD>", "Locate the objects with category name in the image."),
    ("<DENSE_REGION_CAPTION>", "Locate the objects in the image, with their descriptions."),
    ("<REGION_PROPOSAL>", "Locate the region proposals in the image."),
    ("<CAPTION_TO_PHRASE_GROUNDING>", "Locate the phrases in the caption: {input}"),
    ("<REFERRING_EXPRESSION_SEGMENTATION>", "Locate {input} in the image with mask"),
    ("<REGION_TO_SEGMENTATION>", "What is the polygon mask of region {input}"),
    ("<OPEN_VOCABULARY_DETECTION>", "Locate {input} in the image."),
    ("<REGION_TO_CATEGORY>", "What is the region {input}?"),
    ("<REGION_TO_DESCRIPTION>", "What does the region {input} describe?"),
    ("<REGION_TO_OCR>", "What text is in the region {input}?"),
)

#: (in a parameter's name here, in the authors' checkpoint), in turn
ORIGINAL = (
    (r"(convs\.\d+)\.conv\.", r"\1.proj."),
    (r"\.(conv[12])\.", r".\1.fn.dw."),
    (r"\.norm2\.", ".ffn.norm."),
    (r"\.ffn\.(fc[12])\.", r".ffn.fn.net.\1."),
    (r"\.spatial_block\.norm1\.", ".spatial_block.window_attn.norm."),
    (r"\.channel_block\.norm1\.", ".channel_block.channel_attn.norm."),
    (r"\.(window_attn|channel_attn)\.(qkv|proj)\.", r".\1.fn.\2."),
)


@dataclass(frozen=True)
class Florence2(ImageTextDecoder):
    """Configuration of one Florence-2.

    `text`: its decoder. `reader`: its encoder. `positions`: rows and columns of a map that embeddings were learned for.
    `start`: ids that every answer begins with. `original`: in the authors' layout, whose logits have a bias.
    """

    name = "florence2"
    kind = "encoder_decoder"
    unused = (
        r"(model\.)?language_model\.(model\.)?(encoder|decoder)\.embed_tokens\.weight",  # the one vocabulary, repeated
        r"(language_model\.)?lm_head\.weight",
        r"(model\.multi_modal_projector\.)?visual_temporal_embed\.pos_idx_to_embed",  # sinusoids
    )

    vision: DavitConfig
    text: TextConfig
    reader: TextConfig
    positions: int = 50
    start: tuple[int, ...] = (2, 0)
    original: bool = False
    processor: ImageProcessor | None = None  # None: stretched to the tower's size, ImageNet's means and deviations
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        def bart(width: int, layers: int, heads: int, ffn: int, vocabulary: int, length: int = 1024) -> TextConfig:
            config = {"d_model": width, "vocab_size": vocabulary, "max_position_embeddings": length}
            for side in ("encoder", "decoder"):
                config |= {f"{side}_layers": layers, f"{side}_attention_heads": heads, f"{side}_ffn_dim": ffn}
            return read_bart(ConfigReader(config))[1]

        depths = (1, 1, 9, 1)
        base = DavitConfig.of((128, 256, 512, 1024), depths, (4, 8, 16, 32))
        large = DavitConfig.of((256, 512, 1024, 2048), depths, (8, 16, 32, 64))
        tiny = DavitConfig.of((16, 24, 32, 40), (1, 1, 1, 1), (2, 3, 4, 5), 70, 4)
        sizes = bart(768, 6, 12, 3072, 51289), bart(1024, 12, 16, 4096, 51289), bart(64, 2, 4, 128, 256, 96)
        hub = "florence-community/Florence-2"
        return (
            Variant("tiny", cls(tiny, sizes[2], sizes[2], 16)),
            Variant("florence-2-base", cls(base, sizes[0], sizes[0]), f"{hub}-base", 230_000_000),
            Variant("florence-2-large", cls(large, sizes[1], sizes[1]), "microsoft/Florence-2-large", 770_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        config_reader = ConfigReader(config)
        section, text = config_reader.section("vision_config"), config_reader.section("text_config")
        original = "dim_embed" in section
        if section.values.get("image_feature_source", list(FEATURES)) != list(FEATURES):
            raise section.error(f"image_feature_source must be {', '.join(FEATURES)}, in this order")
        processor = ImageProcessor.from_config(preprocessor) if preprocessor else None
        side = square(processor) if processor else DavitConfig.image_size
        vision = DavitConfig.from_reader(section, side)
        reader, decoder = read_bart(text)
        positions = section.section("image_pos_embed").int("max_pos_embeddings", 50, high=8192)
        positions = section.int("max_position_embeddings", positions, high=8192)
        if vision.grid > positions:
            raise section.error(f"{side} pixels become {vision.grid} rows; positions are learned for {positions}")
        width = section.int("projection_dim", 1024)
        if width != decoder.hidden_size:
            raise section.error(f"projection_dim is {width}; the text is {decoder.hidden_size} wide (text_config)")
        keys = [key for key in ("decoder_start_token_id", "forced_bos_token_id") if key in text]
        first = text.int("decoder_start_token_id", 2, low=0, high=decoder.vocab_size - 1)
        forced = [text.int(key, low=0, high=decoder.vocab_size - 1) for key in keys if key.startswith("forced")]
        return cls(vision, decoder, reader, positions, (first, *forced), original, processor)

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def visual_tokens(self) -> int:
        return 1 + self.vision.grid**2

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "source_length": self.reader.max_position_embeddings}

    def encoder(self) -> nn.Module:
        projector = PositionedProjector(self.vision.hidden_size, self.text.hidden_size, self.positions)
        return VisionEncoder(self.image_processor, DavitTower(self.vision), projector)

    def decoder(self) -> nn.Module:
        return BartDecoder(self.text, self.context, self.original)

    def build(self) -> nn.Module:
        root = super().build()
        root.text_encoder = BartEncoder(self.reader, self.text)
        return root

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        vision, embedding, decoder = super().methods(root)
        text = self.text
        length = Dim("source", 1, self.reader.max_position_embeddings)
        source = TensorSpec("inputs_embeds", (1, length, text.hidden_size))
        shape = (text.num_hidden_layers, text.num_attention_heads, length, text.head_width)
        cross = TensorSpec("cross_keys", shape), TensorSpec("cross_values", shape)
        # a prompt may be longer than the cache, which holds the answer alone
        words = Dim("sequence", 1, max(self.context, self.reader.max_position_embeddings))
        ids, embeds = (
            replace(spec, shape=(1, words, *spec.shape[2:])) for spec in (*embedding.inputs, *embedding.outputs)
        )
        return (
            vision,
            replace(embedding, inputs=(ids,), outputs=(embeds,)),
            Method("text_encoder", root.get_submodule("text_encoder"), (source,), cross),
            replace(decoder, inputs=(*decoder.inputs, *cross)),
        )

    def source(self, parameter: str) -> Source:
        if parameter.endswith("embed_positions.weight"):
            side = self.reader if parameter.startswith("text_encoder.") else self.text
            found = self.place(parameter)
            return Source(found.key, (Rows(OFFSET, OFFSET + side.max_position_embeddings),))
        if self.original and parameter == "text_decoder.lm_head.bias":
            return Source("language_model.final_logits_bias", (Reshape((self.text.vocab_size,)),))
        if self.original and parameter == "vision_encoder.projector.image_projection.weight":
            return Source("image_projection", (Transpose(),))
        return self.place(parameter)

    def place(self, parameter: str) -> Source:
        """Where a parameter is stored, before what must be done with it."""
        name = parameter.replace(".feed_forward.", ".")
        name = name.replace("spatial_block.attention.", "spatial_block.window_attn.")
        name = name.replace("channel_block.attention.", "channel_block.channel_attn.")
        cross = r"^text_encoder\.cross\.layers\.(\d+)\.(key|value)\."
        name = re.sub(cross, lambda at: f"text_decoder.layers.{at[1]}.encoder_attn.{at[2][0]}_proj.", name)
        language = "language_model.model." if self.original else "model.language_model."
        tables = "" if self.original else "model.multi_modal_projector."
        position = f"{'image_pos_embed' if self.original else 'image_position_embed'}."
        if self.original and name.startswith("vision_encoder.tower."):
            for ours, theirs in ORIGINAL:
                name = re.sub(ours, theirs, name)
        return by_prefix(
            name,
            {
                "vision_encoder.tower.": "vision_tower." if self.original else "model.vision_tower.",
                "vision_encoder.projector.row_": f"{tables}{position}row_",
                "vision_encoder.projector.column_": f"{tables}{position}column_",
                "vision_encoder.projector.": tables,
                "token_embedding.": f"{language}shared.",
                "text_decoder.lm_head.": f"{language}shared.",
                "text_encoder.": f"{language}encoder.",
                "text_decoder.": f"{language}decoder.",
            },
        )

    @property
    def image_processor(self) -> ImageProcessor:
        side = self.vision.image_size
        return self.processor or ImageProcessor(None, side, side, None, 3, IMAGENET_MEAN, IMAGENET_STD)

    @property
    def template(self) -> PromptTemplate:
        return PromptTemplate(assistant="</s>", image_separator="", start=self.start, images_first=True, tasks=TASKS)


def square(processor: ImageProcessor) -> int:
    """The side of the pictures that a processor makes. Raises: UserError where they are not squares of one size."""
    made = processor.crop_size or (processor.height, processor.width)
    if made[0] is None or made[0] != made[1]:
        raise UserError(f"preprocessor_config.json: size is {made}; this tower takes squares of one size")
    return made[0]


ARCHITECTURE = Florence2
