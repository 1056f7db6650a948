"""Fuyu-8B (https://www.adept.ai/blog/fuyu-8b): no tower; patches enter a Persimmon decoder through one linear layer.

Pictures have any size: preprocessing cuts them, the graph takes any number of patches, and tokens of the vocabulary end
their rows. Weights in the layouts that transformers has written (`language_model.*`, `vision_embed_tokens.*`), in which
queries, keys and values are one tensor, head by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.components.image_text import ImageTextDecoder
from graphs.components.text.config import FAMILIES, TextConfig
from graphs.components.vision.pixels import NormalizePixels
from graphs.config import ConfigReader
from graphs.preprocess.padded_raster import PaddedRasterProcessor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Dim, TensorSpec, Variant
from graphs.weights import Permute, Reshape, Rows, Source, by_prefix

#: 2304 embeddings of a picture, the ends of 36 rows, and a conversation
MAX_CONTEXT = 3072

#: begins an answer
ANSWER = "<0x04>"

PLAIN = PromptTemplate(
    assistant=ANSWER, image="|SPEAKER|", image_separator="", begin=False, images_first=True, user_text="<s>"
)

#: parts of the decoder -> what they are called in checkpoints
PARTS: Mapping[str, str] = {
    ".self_attn.o_proj.": ".self_attn.dense.",
    ".self_attn.q_norm.": ".self_attn.q_layernorm.",
    ".self_attn.k_norm.": ".self_attn.k_layernorm.",
    ".mlp.up_proj.": ".mlp.dense_h_to_4h.",
    ".mlp.down_proj.": ".mlp.dense_4h_to_h.",
    "text_decoder.norm.": "text_decoder.final_layernorm.",
}


class PatchProjector(nn.Module):
    """Raw patches [N, 3, S, S] uint8 to image embeddings [1, N, D]: normalisation and one linear layer."""

    def __init__(self, pixels: PaddedRasterProcessor, width: int) -> None:
        super().__init__()
        self.normalize = NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        self.projector = nn.Linear(3 * pixels.side**2, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projector(self.normalize(pixel_values).flatten(1)).unsqueeze(0)


@dataclass(frozen=True)
class Fuyu(ImageTextDecoder):
    """Configuration of one Fuyu. `patch_size`: side of a patch, in pixels."""

    name = "fuyu_8b"
    kind = "encoder_free"
    aliases = (
        (r"model\.language_model\.", "language_model.model."),
        (r"model\.vision_embed_tokens\.", "vision_embed_tokens."),
        (r"lm_head\.", "language_model.lm_head."),
    )
    unused = (
        r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"language_model\.lm_head\.weight",  # a tied head saved all the same
    )

    text: TextConfig
    patch_size: int = 30
    processor: PaddedRasterProcessor | None = None  # None: pictures of at most 36 x 64 patches
    max_context: int = MAX_CONTEXT

    @classmethod
    def tiny(cls) -> Variant:
        """A small model for tests."""
        text = TextConfig.from_reader(
            ConfigReader(
                {
                    "hidden_size": 64,
                    "intermediate_size": 128,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 4,
                    "vocab_size": 256,
                    "max_position_embeddings": 192,
                }
            ),
            FAMILIES["persimmon"],
        )
        return Variant("tiny", cls(text, 6, PaddedRasterProcessor(6, 36, 48)))

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        return cls.tiny(), Variant("fuyu-8b", cls(FAMILIES["persimmon"]), "adept/fuyu-8b", 9_400_000_000)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        section = reader.section("text_config") if "text_config" in reader else reader  # flat on the hub
        section.choice("text_model_type" if section is reader else "model_type", ("persimmon",), default="persimmon")
        heads = section.int("num_attention_heads", FAMILIES["persimmon"].num_attention_heads, high=1024)
        tied = reader.bool("tie_word_embeddings", section.bool("tie_word_embeddings", False))
        values = {**section.values, "num_key_value_heads": heads, "tie_word_embeddings": tied}
        reader.int("num_channels", 3, low=3, high=3)
        side = reader.int("patch_size", 30, high=1024)
        return cls(
            text=TextConfig.from_reader(ConfigReader(values, section.where), FAMILIES["persimmon"]),
            patch_size=side,
            processor=PaddedRasterProcessor.from_config(preprocessor, side),
        )

    @property
    def image_processor(self) -> PaddedRasterProcessor:
        return self.processor or PaddedRasterProcessor.from_config(None, self.patch_size)

    @property
    def image_size(self) -> int:
        """The longest side of a picture, in pixels."""
        return max(self.image_processor.max_height, self.image_processor.max_width)

    @property
    def visual_tokens(self) -> int:
        """The most image embeddings that one picture becomes."""
        return self.image_processor.most

    def encoder(self) -> nn.Module:
        return PatchProjector(self.image_processor, self.text.hidden_size)

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        side, patches = self.patch_size, Dim("visual_tokens", 1, self.visual_tokens)
        return (TensorSpec("pixel_values", (patches, 3, side, side), torch.uint8, "pixels"),)

    def image_embeds(self) -> TensorSpec:
        return TensorSpec("image_embeds", (1, Dim("visual_tokens", 1, self.visual_tokens), self.text.hidden_size))

    def source(self, parameter: str) -> Source:
        text, side = self.text, self.patch_size
        if parameter == "vision_encoder.projector.weight":  # there the channels of a pixel stand side by side
            by_pixel, flat = (text.hidden_size, side, side, 3), (text.hidden_size, 3 * side * side)
            return Source("vision_embed_tokens.weight", (Reshape(by_pixel), Permute((0, 3, 1, 2)), Reshape(flat)))
        for ours, theirs in PARTS.items():
            parameter = parameter.replace(ours, theirs)
        head = "model.embed_tokens." if text.tie_word_embeddings else "lm_head."
        found = by_prefix(
            parameter,
            {
                "vision_encoder.projector.": "vision_embed_tokens.",
                "token_embedding.": "language_model.model.embed_tokens.",
                "text_decoder.lm_head.": f"language_model.{head}",
                "text_decoder.": "language_model.model.",
            },
        )
        assert isinstance(found.key, str)
        place, _, kind = found.key.rpartition("_proj.")
        if not place.endswith((".self_attn.q", ".self_attn.k", ".self_attn.v")):
            return found
        inner = () if kind == "bias" else (text.hidden_size,)
        part, heads, width = "qkv".index(place[-1]), text.num_attention_heads, text.head_width
        return Source(
            f"{place[:-1]}query_key_value.{kind}",
            (Reshape((heads, 3, width, *inner)), Rows(part, part + 1, dim=1), Reshape((heads * width, *inner))),
        )

    @property
    def template(self) -> PromptTemplate:
        return PLAIN


ARCHITECTURE = Fuyu
