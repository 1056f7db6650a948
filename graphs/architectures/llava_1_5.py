"""LLaVA 1.5 (Liu et al., arXiv 2310.03744): CLIP or SigLIP tower, two-layer MLP projector, LLaMA decoder.

Weights in the layout that transformers writes (`vision_tower.*`, `multi_modal_projector.*`, `language_model.*`, in its
versions since 2023) or in the original one of https://github.com/haotian-liu/LLaVA (`model.layers.*`,
`model.mm_projector.*`, `model.vision_tower.vision_tower.*`; a checkpoint must hold its tower).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.connectors.mlp import MLPProjector
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder, VisionEncoder
from graphs.components.text.config import FAMILIES, TextConfig
from graphs.components.vision import clip
from graphs.components.vision.clip import CLIP_LARGE_336, ClipVisionConfig, ClipVisionTower, read_tower, selected
from graphs.config import ConfigReader
from graphs.preprocess.image import ImageProcessor, read_processor
from graphs.preprocess.picture import Normalized
from graphs.preprocess.prompt import USER_ASSISTANT, VICUNA_V1, PromptTemplate
from graphs.spec import Variant
from graphs.weights import Source, by_prefix

#: the decoders that read embeddings as they are; Gemma's, say, would scale those of pictures too
DECODERS = {name: FAMILIES[name] for name in ("llama", "mistral", "qwen2")}


@dataclass(frozen=True)
class LlavaProjector:
    """The projector as configured: an activation of `ACTIVATIONS`, and whether it has biases."""

    activation: str = "gelu"
    bias: bool = True


@dataclass(frozen=True)
class Llava(ImageTextDecoder):
    """Configuration of one LLaVA 1.5.

    `select_layer`: the state or states of the tower that are projected. `drop_first`: without the first of its tokens,
    which is CLIP's class token, and in SigLIP, which has none, a patch all the same. `original`: from the authors'
    repository, which pads pictures to squares and speaks with a system prompt.
    """

    name = "llava_1_5"
    aliases = (
        (r"model\.vision_tower\.vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"(model\.)?vision_tower\.(vision_model\.)?", "vision_tower."),
        (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
        (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"model\.language_model\.", "language_model.model."),
        (r"model\.(?=(embed_tokens|layers|norm)\.)", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
        (r"model\.image_newline", "image_newline"),  # of LLaVA-NeXT
    )
    unused: ClassVar[tuple[str, ...]] = (
        r"vision_tower\.encoder\.layers\..*",  # layers above the selected one
        r"vision_tower\.(post_layernorm\..*|head\..*|embeddings\.position_ids)",
        r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"language_model\.lm_head\.weight",  # a tied head saved all the same
    )

    vision: ClipVisionConfig
    text: TextConfig
    projector: LlavaProjector = LlavaProjector()
    select_layer: int | tuple[int, ...] = -2
    drop_first: bool = True
    original: bool = False
    processor: ImageProcessor | None = None  # None: CLIP's, at the tower's size
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        vicuna_7b = TextConfig(4096, 11008, 32, 32, 32, 32064, 4096, rms_norm_eps=1e-5)
        vicuna_13b = TextConfig(5120, 13824, 40, 40, 40, 32064, 4096, rms_norm_eps=1e-5)
        tiny_vision = ClipVisionConfig(64, 128, 3, 4, 48, 8)
        tiny_text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=96)
        return (
            Variant("tiny", cls(tiny_vision, tiny_text)),
            Variant("llava-1.5-7b", cls(CLIP_LARGE_336, vicuna_7b), "llava-hf/llava-1.5-7b-hf", 7_060_000_000),
            Variant("llava-1.5-13b", cls(CLIP_LARGE_336, vicuna_13b), "llava-hf/llava-1.5-13b-hf", 13_350_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        flat = "hidden_size" in reader and "text_config" not in reader
        read = cls.from_original if flat else cls.from_hub
        return read(reader, preprocessor)

    @classmethod
    def from_hub(cls, reader: ConfigReader, preprocessor: Mapping[str, Any] | None) -> Self:
        """From the keys of transformers' LlavaConfig, with its defaults where a checkpoint has none."""
        section = reader.section("vision_config")
        kind = section.choice("model_type", clip.FAMILIES, default="clip_vision_model")
        # LlavaConfig replaces the defaults of a tower only where it is not described at all
        vision = ClipVisionConfig.from_reader(section, clip.FAMILIES[kind]) if section.values else CLIP_LARGE_336
        section = reader.section("text_config")
        family = DECODERS[section.choice("model_type", DECODERS, default="llama")]
        tied = section.bool("tie_word_embeddings", False) or reader.bool("tie_word_embeddings", False)
        text = TextConfig.from_reader(
            ConfigReader({**section.values, "tie_word_embeddings": tied}, section.where), family
        )
        strategy = reader.choice("vision_feature_select_strategy", ("default", "full"), default="default")
        return cls(
            vision=vision,
            text=text,
            projector=LlavaProjector(
                reader.choice("projector_hidden_act", ACTIVATIONS, default="gelu"),
                reader.bool("multimodal_projector_bias", True),
            ),
            select_layer=read_layers(reader, "vision_feature_layer", vision),
            drop_first=strategy == "default",
            processor=read_processor(preprocessor, vision.image_size),
        )

    @classmethod
    def from_original(cls, reader: ConfigReader, preprocessor: Mapping[str, Any] | None) -> Self:
        """From the keys of the authors' repository: the decoder's at the top, the tower by name or described."""
        reader.choice("mm_projector_type", ("mlp2x_gelu",))
        vision = read_tower(reader)
        feature = reader.choice("mm_vision_select_feature", ("patch", "cls_patch"), default="patch")
        aspect = reader.choice("image_aspect_ratio", ("pad", "square"), default="square")
        side = vision.image_size
        return cls(
            vision=vision,
            text=TextConfig.from_reader(reader),
            select_layer=read_layers(reader, "mm_vision_select_layer", vision),
            drop_first=feature == "patch",
            original=True,
            processor=read_processor(preprocessor or {"size": side, "crop_size": side}, side, aspect),
        )

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def visual_tokens(self) -> int:
        return self.vision.tokens - self.drop_first

    def encoder(self) -> nn.Module:
        features = self.vision.hidden_size * len(selected(self.vision, self.select_layer))
        return VisionEncoder(
            self.image_processor,
            ClipVisionTower(self.vision, self.select_layer, self.drop_first),
            MLPProjector(features, self.text.hidden_size, self.projector.activation, self.projector.bias),
        )

    def source(self, parameter: str) -> Source:
        head = "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        return by_prefix(
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

    def unused_parameters(self) -> int:
        """The tower's layers above the selected ones, and its last norm."""
        above = self.vision.num_hidden_layers - max(selected(self.vision, self.select_layer))
        return above * self.vision.layer_parameters + 2 * self.vision.hidden_size

    @property
    def image_processor(self) -> Normalized:
        side = self.vision.image_size
        return self.processor or ImageProcessor(side, crop_size=(side, side))

    @property
    def template(self) -> PromptTemplate:
        return VICUNA_V1 if self.original else USER_ASSISTANT


def read_layers(config: ConfigReader, key: str, vision: ClipVisionConfig) -> int | tuple[int, ...]:
    """The state of the tower to take, or several; -2 where `key` is absent. Raises: UserError."""
    low, high = -vision.num_hidden_layers - 1, vision.num_hidden_layers
    several = config.values.get(key)
    if not isinstance(several, list):
        return config.int(key, -2, low=low, high=high)
    if not several:
        raise config.error(f"{key} is an empty list")
    return tuple(ConfigReader({key: layer}, config.where).int(key, low=low, high=high) for layer in several)


ARCHITECTURE = Llava
