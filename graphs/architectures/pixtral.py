"""Pixtral 12B (Agrawal et al., arXiv 2410.07073): a tower over pictures of any size, two-layer MLP, Mistral Nemo.

How a picture falls into patches follows from its size: preprocessing cuts it and says where each patch was; the graph
takes any number of them. The end of a row and of a picture are tokens of the vocabulary, which the prompt holds.
Weights in the layouts that transformers has written, as in mistral-community's checkpoint (`vision_tower.*`,
`multi_modal_projector.*`, `language_model.*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.architectures.llava_1_5 import DECODERS, Llava
from graphs.components.activations import ACTIVATIONS
from graphs.components.connectors.mlp import MLPProjector
from graphs.components.gated_encoder import layer_parameters
from graphs.components.image_text import ImageTextDecoder
from graphs.components.text.config import TextConfig
from graphs.components.vision.pixtral import PixtralTower, PixtralVisionConfig
from graphs.config import ConfigReader
from graphs.preprocess.prompt import PromptTemplate
from graphs.preprocess.raster import RasterProcessor
from graphs.spec import Dim, TensorSpec, Variant
from graphs.weights import Reshape, Source, by_prefix

#: 4096 embeddings of a picture, the ends of 64 rows, and a conversation
MAX_CONTEXT = 5120

INSTRUCT = PromptTemplate(user="[INST]", assistant="[/INST]", image="[IMG]", image_separator="")

#: parts of a layer of the tower -> what they are called in checkpoints
PARTS: Mapping[str, str] = {
    ".norm1.": ".attention_norm.",
    ".norm2.": ".ffn_norm.",
    ".attention.out_proj.": ".attention.o_proj.",
    ".mlp.": ".feed_forward.",
}


class PixtralEncoder(nn.Module):
    """Raw patches [N, 3, S, S] uint8 and their rows and columns [N, 2] to image embeddings [1, N, D]."""

    def __init__(self, tower: PixtralTower, projector: MLPProjector) -> None:
        super().__init__()
        self.tower, self.projector = tower, projector

    def forward(self, pixel_values: Tensor, patch_position: Tensor) -> Tensor:
        return self.projector(self.tower(pixel_values, patch_position))


@dataclass(frozen=True)
class Pixtral(ImageTextDecoder):
    """Configuration of one Pixtral.

    `activation`, `projector_bias`: of the projector. `select_layer`: the state of the tower that is projected, -1 for
    the last.
    """

    name = "pixtral"
    aliases = Llava.aliases
    unused = (
        r"vision_tower\.transformer\.layers\..*",  # layers above the selected one
        r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"language_model\.lm_head\.weight",  # a tied head saved all the same
    )

    vision: PixtralVisionConfig
    text: TextConfig
    activation: str = "gelu"
    projector_bias: bool = True
    select_layer: int = -1
    processor: RasterProcessor | None = None  # None: pictures of the tower's size at most
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        nemo = TextConfig(5120, 14336, 40, 32, 8, 131072, 1024000, head_dim=128, rms_norm_eps=1e-5, rope_theta=1e9)
        tiny_text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=128)
        return (
            Variant("tiny", cls(PixtralVisionConfig(64, 128, 2, 4, 48, 8), tiny_text)),
            Variant(
                "pixtral-12b-hf", cls(PixtralVisionConfig(), nemo), "mistral-community/pixtral-12b", 12_700_000_000
            ),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        section = reader.section("vision_config")
        section.choice("model_type", ("pixtral",))
        vision = PixtralVisionConfig.from_reader(section)
        key = "vision_feature_select_strategy"
        if reader.choice(key, ("default", "full"), default="default") != "full":
            raise reader.error(f"{key} is default, which leaves out a first token: this tower has none; choose full")
        section = reader.section("text_config")
        family = DECODERS[section.choice("model_type", DECODERS, default="llama")]
        tied = section.bool("tie_word_embeddings", False) or reader.bool("tie_word_embeddings", False)
        text = ConfigReader({**section.values, "tie_word_embeddings": tied}, section.where)
        layers = vision.num_hidden_layers
        return cls(
            vision=vision,
            text=TextConfig.from_reader(text, family),
            activation=reader.choice("projector_hidden_act", ACTIVATIONS, default="gelu"),
            projector_bias=reader.bool("multimodal_projector_bias", True),
            select_layer=reader.int("vision_feature_layer", -2, low=-layers - 1, high=layers),
            processor=RasterProcessor.from_config(preprocessor, vision.patch_size, vision.image_size),
        )

    @property
    def image_size(self) -> int:
        """The longest side of a picture, in pixels."""
        return max(self.image_processor.max_height, self.image_processor.max_width)

    @property
    def image_processor(self) -> RasterProcessor:
        return self.processor or RasterProcessor.from_config(None, self.vision.patch_size, self.vision.image_size)

    @property
    def visual_tokens(self) -> int:
        """The most image embeddings that one picture becomes."""
        rows, columns = self.image_processor.most
        return rows * columns

    @property
    def built_layers(self) -> int:
        """Layers of the tower up to the selected one."""
        return self.select_layer % (self.vision.num_hidden_layers + 1)

    def encoder(self) -> nn.Module:
        features, width = self.vision.hidden_size, self.text.hidden_size
        return PixtralEncoder(
            PixtralTower(self.vision, self.image_processor, self.built_layers),
            MLPProjector(features, width, self.activation, self.projector_bias),
        )

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        side, patches = self.vision.patch_size, Dim("visual_tokens", 1, self.visual_tokens)
        return (
            TensorSpec("pixel_values", (patches, 3, side, side), torch.uint8, "pixels"),
            TensorSpec("patch_position", (patches, 2), torch.int64, "ids", min(self.image_processor.most)),
        )

    def image_embeds(self) -> TensorSpec:
        return TensorSpec("image_embeds", (1, Dim("visual_tokens", 1, self.visual_tokens), self.text.hidden_size))

    def source(self, parameter: str) -> Source:
        if parameter == "vision_encoder.tower.patch_conv.weight":
            flat = (self.vision.hidden_size, 3 * self.vision.patch_size**2)
            return Source("vision_tower.patch_conv.weight", (Reshape(flat),))
        head = "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        if parameter.startswith("vision_encoder.tower.layers."):
            for ours, theirs in PARTS.items():
                parameter = parameter.replace(ours, theirs)
        return by_prefix(
            parameter,
            {
                "vision_encoder.tower.layers.": "vision_tower.transformer.layers.",
                "vision_encoder.tower.": "vision_tower.",
                "vision_encoder.projector.": "multi_modal_projector.",
                "token_embedding.": "language_model.model.embed_tokens.",
                "text_decoder.lm_head.": f"language_model.{head}",
                "text_decoder.": "language_model.model.",
            },
        )

    def unused_parameters(self) -> int:
        """The tower's layers above the selected one."""
        return (self.vision.num_hidden_layers - self.built_layers) * layer_parameters(self.vision)

    @property
    def template(self) -> PromptTemplate:
        return INSTRUCT


ARCHITECTURE = Pixtral
