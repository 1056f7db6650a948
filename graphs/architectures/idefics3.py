"""Idefics 3 (Laurençon et al., arXiv 2408.12637): SigLIP over tiles, pixel shuffle, LLaMA 3.1.

How many tiles a picture becomes depends on its shape: preprocessing cuts them and writes their places into the prompt;
the graph encodes any number of them. All are full, so the positions of their patches are known when the graph is built.
Weights in the layout of the hub, which transformers writes too (`model.vision_model.*`, `model.connector.*`,
`model.text_model.*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from graphs.components.connectors.pixel_shuffle import PixelShuffleProjector
from graphs.components.image_text import ImageTextDecoder, VisionEncoder
from graphs.components.text.config import FAMILIES, TextConfig
from graphs.components.text.rotary import RopeScaling
from graphs.components.vision.clip import ClipVisionConfig
from graphs.components.vision.navit import IDEFICS3_BASE, NavitTower, TileEmbeddings, read_navit, siglip_so400m
from graphs.config import ConfigReader
from graphs.preprocess.prompt import PromptTemplate
from graphs.preprocess.splitting import SplittingProcessor
from graphs.spec import Dim, TensorSpec, Variant
from graphs.weights import Source, by_prefix

#: up to 2873 embeddings a picture leave no room in the usual context
MAX_CONTEXT = 4096

#: `model_type` of a vision_config -> the tower's defaults; the published files name the whole model there
TOWERS = dict.fromkeys(("idefics3_vision", "smolvlm_vision", "idefics3", "smolvlm"), IDEFICS3_BASE)

#: `model_type` of a text_config -> the decoder's defaults: the families with this layout of weights
DECODERS = {name: FAMILIES[name] for name in ("llama", "mistral", "qwen2")}

LLAMA_31_8B = TextConfig(
    4096,
    14336,
    32,
    32,
    8,
    128259,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0),
)

#: one turn as the processors write it: a blank follows the speaker unless a picture does
IDEFICS = PromptTemplate(
    user="User:", user_text="User: ", assistant="<end_of_utterance>\nAssistant:", image_separator=""
)


@dataclass(frozen=True)
class Idefics3(ImageTextDecoder):
    """Configuration of one Idefics 3. `scale_factor`: patches along the side of the square that is one embedding."""

    name = "idefics3"
    unused = (
        r"lm_head\.weight",  # a tied head saved all the same
        r"model\.text_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )

    vision: ClipVisionConfig
    text: TextConfig
    scale_factor: int = 2
    processor: SplittingProcessor | None = None  # None: tiles of the tower's size, four along the longer side
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        tower = siglip_so400m(364)
        return (
            tiny(cls),
            Variant("idefics3-8b", cls(tower, LLAMA_31_8B), "HuggingFaceM4/Idefics3-8B-Llama3", 8_460_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision = read_navit(reader.section("vision_config"), TOWERS, "idefics3_vision")
        factor = reader.int("scale_factor", 2, high=64)
        made = cls(vision, read_decoder(reader, DECODERS, "llama"), factor)
        side = SplittingProcessor.from_config(preprocessor, vision.image_size, 1).side
        cells = side // vision.patch_size
        if not cells or cells % factor:
            raise reader.error(
                f"tiles of {side} pixels are {cells} patches wide, which scale_factor {factor} does not divide"
            )
        processor = SplittingProcessor.from_config(preprocessor, vision.image_size, (cells // factor) ** 2)
        return cls(vision, made.text, factor, processor)

    @property
    def image_processor(self) -> SplittingProcessor:
        tokens = (self.vision.grid // self.scale_factor) ** 2
        return self.processor or SplittingProcessor.from_config(None, self.vision.image_size, tokens)

    @property
    def image_size(self) -> int:
        return self.image_processor.side

    @property
    def visual_tokens(self) -> int:
        """The most image embeddings that one picture becomes."""
        return self.image_processor.tiles[1] * self.image_processor.tokens

    def encoder(self) -> nn.Module:
        cells = self.image_size // self.vision.patch_size
        return VisionEncoder(
            self.image_processor,
            NavitTower(self.vision, TileEmbeddings(self.vision, self.image_size)),
            PixelShuffleProjector(cells, self.scale_factor, self.vision.hidden_size, self.text.hidden_size),
        )

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        side, (fewest, most) = self.image_size, self.image_processor.tiles
        tiles = Dim("tiles", fewest, most) if fewest < most else most
        return (TensorSpec("pixel_values", (tiles, 3, side, side), torch.uint8, "pixels"),)

    def image_embeds(self) -> TensorSpec:
        processor = self.image_processor
        fewest, most = (tiles * processor.tokens for tiles in processor.tiles)
        rows = Dim("visual_tokens", fewest, most) if fewest < most else most
        return TensorSpec("image_embeds", (1, rows, self.text.hidden_size))

    def source(self, parameter: str) -> Source:
        head = "model.text_model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        return by_prefix(
            parameter,
            {
                "vision_encoder.tower.layers.": "model.vision_model.encoder.layers.",
                "vision_encoder.tower.": "model.vision_model.",
                "vision_encoder.projector.": "model.connector.modality_projection.",
                "token_embedding.": "model.text_model.embed_tokens.",
                "text_decoder.lm_head.": head,
                "text_decoder.": "model.text_model.",
            },
        )

    @property
    def template(self) -> PromptTemplate:
        return IDEFICS


def tiny(architecture: type[Idefics3]) -> Variant:
    """A size for tests: tiles of 9 embeddings, 3 to 5 a picture."""
    vision = ClipVisionConfig(
        64, 128, 2, 4, 48, 8, "gelu_pytorch_tanh", 1e-6, class_token=False, patch_bias=True, pre_norm=False
    )
    text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=256)
    return Variant("tiny", architecture(vision, text, processor=SplittingProcessor(48, 9, 96)))


def read_decoder(reader: ConfigReader, families: Mapping[str, TextConfig], default: str) -> TextConfig:
    """The decoder of an Idefics; embeddings are tied where the whole model says so. Raises: UserError."""
    section = reader.section("text_config")
    family = families[section.choice("model_type", families, default=default)]
    tied = {"tie_word_embeddings": reader.bool("tie_word_embeddings", False)}
    given = section.values or {"rms_norm_eps": 1e-5}  # Idefics' own default, where nothing is said at all
    return TextConfig.from_reader(ConfigReader({**given, **tied}, section.where), family)


ARCHITECTURE = Idefics3
