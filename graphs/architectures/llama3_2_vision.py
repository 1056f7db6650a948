"""Llama 3.2 Vision (arXiv 2407.21783): pictures enter a LLaMA by gated cross-attention layers, not among its tokens.

`vision_encoder` gives the keys and values of those layers; how many tokens show something and which of them each token
of text sees are inputs of `text_decoder`, for one or several pictures and for none. Weights in the layout of the hub
(`language_model.model.*`, `vision_model.*`, `multi_modal_projector.*`) or in that of transformers' class in memory
(`model.language_model.*`, `model.vision_model.*`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder
from graphs.components.text.config import TextConfig
from graphs.components.text.gated_cross import MLLAMA, CrossDecoder, PictureCaches
from graphs.components.text.rotary import RopeScaling
from graphs.components.vision.mllama import MllamaTower, MllamaVisionConfig, read_indices
from graphs.components.vision.pixels import NormalizePixels
from graphs.config import ConfigReader
from graphs.preprocess.canvas import CanvasProcessor
from graphs.preprocess.image import CLIP_MEAN, CLIP_STD
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Dim, Method, TensorSpec, Variant
from graphs.weights import Source, by_prefix

#: the most pictures that one prompt of a bundle speaks of
MAX_PICTURES = 4

EXTRA_EMBEDDINGS = 8  # rows for tokens that are read and never written, the picture's among them

LLAMA_3 = PromptTemplate(
    user="<|start_header_id|>user<|end_header_id|>\n\n",
    assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    image="<|image|>",
    image_separator="",
)


class PictureEncoder(nn.Module):
    """Raw tiles [P, 3, S, S] uint8, the aspect ratio's id [1], tiles that show something [P] to what a decoder reads.

    Gives keys and values [L, G, M, K] and, for each of the M tokens, 1.0 where its tile shows something, [M, 1].
    """

    def __init__(self, pixels: CanvasProcessor, tower: MllamaVisionConfig, text: TextConfig, cross_layers: int) -> None:
        super().__init__()
        self.tokens = tower.tokens
        self.normalize = NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        self.tower = MllamaTower(tower)
        self.projector = nn.Linear(tower.features, text.hidden_size)
        self.caches = PictureCaches(text, cross_layers)

    def forward(
        self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tiles_PCHW = self.normalize(pixel_values)
        shown_P1 = aspect_ratio_mask.to(tiles_PCHW.dtype).unsqueeze(1)
        tiles_PCHW = tiles_PCHW * shown_P1[:, :, None, None]  # tiles that pad are zeros behind normalisation
        features_1MF = self.tower(tiles_PCHW, aspect_ratio_ids, aspect_ratio_mask)
        keys, values = self.caches(self.projector(features_1MF))
        return keys, values, shown_P1.expand(-1, self.tokens).reshape(-1, 1)


@dataclass(frozen=True)
class Mllama(ImageTextDecoder):
    """Configuration of one Llama 3.2 Vision. `cross_layers`: the layers of `text` that attend to pictures."""

    name = "llama3_2_vision"
    kind = "vlm_cross_attention"
    aliases = (
        (r"model\.vision_model\.", "vision_model."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"model\.language_model\.(model\.)?", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
    )
    unused = (r"language_model\.model\.rotary_emb\.inv_freq",)

    vision: MllamaVisionConfig
    text: TextConfig
    cross_layers: tuple[int, ...]
    processor: CanvasProcessor | None = None  # None: CLIP's means and deviations
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        scaled = replace(MLLAMA, rope_scaling=RopeScaling("llama3", 8.0))
        sizes: dict[str, int] = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
        large = replace(scaled, num_hidden_layers=100, **sizes)  # type: ignore[arg-type]
        tower = MllamaVisionConfig(image_size=560)
        tiny_tower = MllamaVisionConfig(64, 96, 3, 2, 4, 24, 8, 4, (0, 2))
        tiny_text = TextConfig(64, 128, 3, 4, 2, 256, max_position_embeddings=96, rms_norm_eps=1e-5)
        hub = "meta-llama/Llama-3.2"
        return (
            Variant("tiny", cls(tiny_tower, tiny_text, (1,))),
            Variant(
                "llama-3.2-11b-vision",
                cls(tower, scaled, tuple(range(3, 40, 5))),
                f"{hub}-11B-Vision-Instruct",
                10_600_000_000,
            ),
            Variant(
                "llama-3.2-90b-vision",
                cls(tower, large, tuple(range(3, 100, 5))),
                f"{hub}-90B-Vision-Instruct",
                88_800_000_000,
            ),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision = MllamaVisionConfig.from_reader(reader.section("vision_config"))
        section = reader.section("text_config")
        text = TextConfig.from_reader(section, MLLAMA)
        default = tuple(range(3, 40, 5))
        layers = read_indices(section, "cross_attention_layers", default, text.num_hidden_layers)
        if not layers:
            raise section.error("cross_attention_layers is empty; no layer would see a picture")
        side, tiles = vision.image_size, vision.max_num_tiles
        processor = CanvasProcessor.from_config(preprocessor, side, tiles) if preprocessor else None
        return cls(vision, replace(text, tie_word_embeddings=False), layers, processor)

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def visual_tokens(self) -> int:
        """Tokens of one picture that cross-attention layers read; in the prompt it is one."""
        return self.vision.max_num_tiles * self.vision.tokens

    def facts(self) -> dict[str, Any]:
        """What a picture is to cross-attention, instead of how many tokens of the prompt it becomes."""
        others = {name: fact for name, fact in super().facts().items() if name != "visual_tokens"}
        return {**others, "picture_tokens": self.visual_tokens, "pictures": MAX_PICTURES}

    def encoder(self) -> nn.Module:
        return PictureEncoder(self.image_processor, self.vision, self.text, len(self.cross_layers))

    def decoder(self) -> nn.Module:
        return CrossDecoder(self.text, self.context, self.cross_layers)

    def embedding(self) -> nn.Module:
        return nn.Embedding(self.text.vocab_size + EXTRA_EMBEDDINGS, self.text.hidden_size)

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        tiles, side = self.vision.max_num_tiles, self.image_size
        return (
            TensorSpec("pixel_values", (tiles, 3, side, side), torch.uint8, "pixels"),
            TensorSpec("aspect_ratio_ids", (1,), torch.int64, "ids", self.vision.ratios),
            TensorSpec("aspect_ratio_mask", (tiles,), torch.int64, "ids", 2),
        )

    def seen(self, tokens: int | Dim) -> tuple[TensorSpec, ...]:
        """What the decoder reads of pictures that are `tokens` together."""
        text = self.text
        shape = (len(self.cross_layers), text.num_key_value_heads, tokens, text.head_width)
        return (
            TensorSpec("cross_keys", shape),
            TensorSpec("cross_values", shape),
            TensorSpec("cross_shown", (tokens, 1)),
        )

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        vision, embedding, decoder = super().methods(root)
        length = decoder.inputs[0].shape[1]
        pictures = Dim("pictures", 1, MAX_PICTURES * self.visual_tokens)
        span = TensorSpec("cross_span", (length, 2), torch.int64, "ids", self.visual_tokens)
        return (
            replace(vision, outputs=self.seen(self.visual_tokens)),
            embedding,
            replace(decoder, inputs=(*decoder.inputs, *self.seen(pictures), span)),
        )

    def source(self, parameter: str) -> Source:
        if found := re.fullmatch(r"vision_encoder\.caches\.layers\.(\d+)\.(.*)", parameter):
            name = found[2].replace("reader.key", "k_proj").replace("reader.value", "v_proj")
            return Source(f"language_model.model.layers.{self.cross_layers[int(found[1])]}.cross_attn.{name}")
        return by_prefix(
            parameter,
            {
                "vision_encoder.tower.": "vision_model.",
                "vision_encoder.projector.": "multi_modal_projector.",
                "token_embedding.": "language_model.model.embed_tokens.",
                "text_decoder.lm_head.": "language_model.lm_head.",
                "text_decoder.": "language_model.model.",
            },
        )

    @property
    def image_processor(self) -> CanvasProcessor:
        default = CanvasProcessor(self.image_size, self.vision.max_num_tiles, image_mean=CLIP_MEAN, image_std=CLIP_STD)
        return self.processor or default

    @property
    def template(self) -> PromptTemplate:
        return LLAMA_3


ARCHITECTURE = Mllama
