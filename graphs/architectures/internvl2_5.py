"""InternVL 2.5 (Chen et al., arXiv 2412.05271): InternViT over tiles, pixel shuffle, MLP, Qwen 2.5 or InternLM 2.5.

The grid of tiles follows from the picture's shape alone: preprocessing cuts, the graph encodes any number of tiles.
Weights in the layout of OpenGVLab's checkpoints (`vision_model.*`, `mlp1.*`, fused queries, keys and values, in
InternLM's decoder too) or in the one that transformers writes (`vision_tower.*`, `multi_modal_projector.*`), in which
InternLM is a LLaMA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from graphs.architectures.llava_1_5 import DECODERS
from graphs.components.activations import ACTIVATIONS
from graphs.components.connectors.pixel_shuffle import PixelShuffleMLP
from graphs.components.image_text import ImageTextDecoder, VisionEncoder
from graphs.components.text.config import TextConfig
from graphs.components.vision.internvit import (
    INTERN_VIT_6B,
    INTERN_VIT_300M,
    InternVisionConfig,
    InternVisionTower,
    read_original,
    read_tower,
)
from graphs.config import ConfigReader
from graphs.preprocess.closest_grid import MOST_TILES, ClosestGridProcessor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Dim, TensorSpec, Variant
from graphs.weights import Reshape, Rows, Source, by_prefix

#: 13 tiles of 256 embeddings, and a conversation
MAX_CONTEXT = 4096

CHATML = PromptTemplate(
    user="<|im_start|>user\n",
    assistant="<|im_end|>\n<|im_start|>assistant\n",
    image="<IMG_CONTEXT>",
)
ORIGINAL = PromptTemplate(
    system=(
        "<|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"  # noqa: RUF001
        "多模态大语言模型。<|im_end|>\n"
    ),
    user=CHATML.user,
    assistant=CHATML.assistant,
    image=CHATML.image,
)

#: `model_type` of an original checkpoint's llm_config -> the family that its decoder is
ORIGINAL_DECODERS: Mapping[str, str] = {"internlm2": "llama", "llama": "llama", "qwen2": "qwen2"}

VISION_LAYER = r"vision_model\.encoder\.layers\.(\d+)\."
TEXT_LAYER = r"language_model\.model\.layers\.(\d+)\."


@dataclass(frozen=True)
class InternVL(ImageTextDecoder):
    """Configuration of one InternVL.

    `factor`: patches along the side of the square that becomes one embedding. `activation`: of the projector.
    `select_layer`: the state of the tower that is projected. `original`: from OpenGVLab's layout, whose tower fuses
    queries, keys and values, and whose conversation has a system's words. `fused`: so does its decoder, InternLM.
    """

    name = "internvl2_5"
    aliases = (
        (r"vision_model\.embeddings\.class_embedding", "vision_tower.embeddings.cls_token"),
        (r"vision_model\.embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
        (r"vision_model\.embeddings\.position_embedding", "vision_tower.embeddings.position_embeddings"),
        (VISION_LAYER + r"attn\.proj\.", r"vision_tower.encoder.layer.\1.attention.projection_layer."),
        (VISION_LAYER + r"attn\.", r"vision_tower.encoder.layer.\1.attention."),
        (VISION_LAYER + r"norm1\.", r"vision_tower.encoder.layer.\1.layernorm_before."),
        (VISION_LAYER + r"norm2\.", r"vision_tower.encoder.layer.\1.layernorm_after."),
        (VISION_LAYER + r"ls(?=[12]$)", r"vision_tower.encoder.layer.\1.lambda_"),
        (VISION_LAYER, r"vision_tower.encoder.layer.\1."),
        (r"mlp1\.0\.", "multi_modal_projector.layer_norm."),
        (r"mlp1\.1\.", "multi_modal_projector.linear_1."),
        (r"mlp1\.3\.", "multi_modal_projector.linear_2."),
        (r"language_model\.model\.tok_embeddings\.", "language_model.model.embed_tokens."),
        (r"language_model\.output\.", "language_model.lm_head."),
        (TEXT_LAYER + r"attention\.wo\.", r"language_model.model.layers.\1.self_attn.o_proj."),
        (TEXT_LAYER + r"attention\.", r"language_model.model.layers.\1.self_attn."),
        (TEXT_LAYER + r"feed_forward\.w1\.", r"language_model.model.layers.\1.mlp.gate_proj."),
        (TEXT_LAYER + r"feed_forward\.w2\.", r"language_model.model.layers.\1.mlp.down_proj."),
        (TEXT_LAYER + r"feed_forward\.w3\.", r"language_model.model.layers.\1.mlp.up_proj."),
        (TEXT_LAYER + r"attention_norm\.", r"language_model.model.layers.\1.input_layernorm."),
        (TEXT_LAYER + r"ffn_norm\.", r"language_model.model.layers.\1.post_attention_layernorm."),
        (r"model\.(?=(vision_tower|multi_modal_projector)\.)", ""),
        (r"model\.language_model\.", "language_model.model."),
        (r"lm_head\.", "language_model.lm_head."),
    )
    unused = (
        r"vision_tower\.encoder\.layer\..*",  # layers above the selected one
        r"vision_tower\.(layernorm\..*|embeddings\.mask_token)",
        r"language_model\.model\.layers\.\d+\.self_attn\.(rotary_emb|rope)\.inv_freq",
        r"language_model\.lm_head\.weight",  # a tied head saved all the same
    )

    vision: InternVisionConfig
    text: TextConfig
    factor: int = 2
    activation: str = "gelu"
    select_layer: int = -1
    original: bool = False
    fused: bool = False
    processor: ClosestGridProcessor | None = None  # None: that of the published checkpoints
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        def qwen(width: int, inner: int, layers: int, heads: int, groups: int) -> TextConfig:
            vocabulary, context = 151674, 32768
            return TextConfig(
                width, inner, layers, heads, groups, vocabulary, context, rope_theta=1e6, attention_bias=True
            )

        def intern(width: int, inner: int, layers: int, heads: int, groups: int) -> TextConfig:
            vocabulary, context = 92553, 32768
            return TextConfig(
                width, inner, layers, heads, groups, vocabulary, context, rms_norm_eps=1e-5, rope_theta=1e6
            )

        def big(text: TextConfig, fused: bool = False) -> InternVL:
            return cls(INTERN_VIT_6B, text, original=True, fused=fused)

        def small(text: TextConfig, fused: bool = False) -> InternVL:
            return cls(INTERN_VIT_300M, text, original=True, fused=fused)

        tiny_vision = InternVisionConfig(64, 128, 2, 4, 32, 8, attention_bias=True)
        tiny_large = InternVisionConfig(64, 128, 2, 4, 32, 8, norm_type="rms_norm", use_qk_norm=True)
        tiny_text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=96, attention_bias=True)
        tiles = ClosestGridProcessor(32, 4, max_tiles=4)
        found = {
            "1B": (small(qwen(896, 4864, 24, 14, 2)), 940_000_000),
            "2B": (small(intern(2048, 8192, 24, 16, 8), fused=True), 2_210_000_000),
            "4B": (small(qwen(2048, 11008, 36, 16, 2)), 3_710_000_000),
            "8B": (small(intern(4096, 14336, 32, 32, 8), fused=True), 8_080_000_000),
            "26B": (big(intern(6144, 16384, 48, 48, 8), fused=True), 25_500_000_000),
            "38B": (big(qwen(5120, 27648, 64, 40, 8)), 38_400_000_000),
            "78B": (big(qwen(8192, 29568, 80, 64, 8)), 78_400_000_000),
        }
        published = (
            Variant(f"internvl2_5-{size.lower()}", architecture, f"OpenGVLab/InternVL2_5-{size}", parameters)
            for size, (architecture, parameters) in found.items()
        )
        return (
            Variant("tiny", cls(tiny_vision, tiny_text, processor=tiles)),
            Variant("tiny-qk-norm", cls(tiny_large, tiny_text, processor=tiles)),
            *published,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        original = "llm_config" in reader
        found = cls.from_original(reader) if original else cls.from_hub(reader, preprocessor)
        if found.vision.grid % found.factor:
            raise reader.error(f"{found.vision.grid} patches a side do not divide into squares of {found.factor}")
        return found

    @classmethod
    def from_hub(cls, reader: ConfigReader, preprocessor: Mapping[str, Any] | None) -> Self:
        """From the keys of transformers' InternVLConfig, with its defaults where a checkpoint has none."""
        vision = read_tower(reader.section("vision_config"))
        section = reader.section("text_config")
        family = DECODERS[section.choice("model_type", DECODERS, default="qwen2")]
        # The whole model's word counts; where it has none, the decoder's, and then the default of transformers' class
        tied = reader.bool("tie_word_embeddings", section.bool("tie_word_embeddings", True))
        text = ConfigReader({**section.values, "tie_word_embeddings": tied}, section.where)
        reader.choice("vision_feature_select_strategy", ("default",), default="default")
        factor = read_factor(reader)
        return cls(
            vision=vision,
            text=TextConfig.from_reader(text, family),
            factor=factor,
            activation=reader.choice("projector_hidden_act", ACTIVATIONS, default="gelu"),
            select_layer=read_layer(reader, "vision_feature_layer", vision),
            processor=ClosestGridProcessor.from_config(preprocessor, vision.image_size, (vision.grid // factor) ** 2),
        )

    @classmethod
    def from_original(cls, reader: ConfigReader) -> Self:
        """From the keys of OpenGVLab's configuration; its code prepares pictures as the published checkpoints do."""
        vision = read_original(reader.section("vision_config"), reader.int("force_image_size", 0, low=0, high=8192))
        section = reader.section("llm_config")
        kind = section.choice("model_type", ORIGINAL_DECODERS)
        fused = kind == "internlm2"
        text = {**section.values, "attention_bias": section.bool("bias", True)} if fused else section.values
        reader.choice("ps_version", ("v2",), default="v2")
        if reader.bool("pad2square", False):
            raise reader.error("pad2square is true; pictures are stretched over their tiles, not padded")
        factor, dynamic = read_factor(reader), reader.bool("dynamic_image_size", True)
        return cls(
            vision=vision,
            text=TextConfig.from_reader(ConfigReader(text, section.where), DECODERS[ORIGINAL_DECODERS[kind]]),
            factor=factor,
            select_layer=read_layer(reader, "select_layer", vision),
            original=True,
            fused=fused,
            processor=ClosestGridProcessor(
                vision.image_size,
                (vision.grid // factor) ** 2,
                reader.int("min_dynamic_patch", 1, high=MOST_TILES) if dynamic else 1,
                reader.int("max_dynamic_patch", 12, high=MOST_TILES) if dynamic else 1,
                reader.bool("use_thumbnail", True),
            ),
        )

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def image_processor(self) -> ClosestGridProcessor:
        return self.processor or ClosestGridProcessor(self.image_size, (self.vision.grid // self.factor) ** 2)

    @property
    def visual_tokens(self) -> int:
        """The most image embeddings that one picture becomes."""
        return self.image_processor.most * self.image_processor.tokens

    def encoder(self) -> nn.Module:
        vision = self.vision
        return VisionEncoder(
            self.image_processor,
            InternVisionTower(vision, self.select_layer),
            PixelShuffleMLP(vision.grid, self.factor, vision.hidden_size, self.text.hidden_size, self.activation),
        )

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        side, most = self.image_size, self.image_processor.most
        tiles = Dim("tiles", 1, most) if most > 1 else 1
        return (TensorSpec("pixel_values", (tiles, 3, side, side), torch.uint8, "pixels"),)

    def image_embeds(self) -> TensorSpec:
        tokens, most = self.image_processor.tokens, self.visual_tokens
        rows = Dim("visual_tokens", tokens, most) if tokens < most else most
        return TensorSpec("image_embeds", (1, rows, self.text.hidden_size))

    def source(self, parameter: str) -> Source:
        head = "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        embeddings = "vision_tower.embeddings."
        found = by_prefix(
            parameter.replace("_scale.weight", "_scale"),
            {
                "vision_encoder.tower.embeddings.projection.": f"{embeddings}patch_embeddings.projection.",
                "vision_encoder.tower.layers.": "vision_tower.encoder.layer.",
                "vision_encoder.tower.": "vision_tower.",
                "vision_encoder.projector.layer_norm.": "multi_modal_projector.layer_norm.",
                "vision_encoder.projector.mlp.": "multi_modal_projector.",
                "token_embedding.": "language_model.model.embed_tokens.",
                "text_decoder.lm_head.": f"language_model.{head}",
                "text_decoder.": "language_model.model.",
            },
        )
        assert isinstance(found.key, str)
        place, _, kind = found.key.rpartition("_proj.")
        if self.original and place.endswith((".attention.q", ".attention.k", ".attention.v")):
            width = self.vision.hidden_size
            start = "qkv".index(place[-1]) * width
            return Source(f"{place[:-1]}qkv.{kind}", (Rows(start, start + width),))
        if self.fused and place.endswith((".self_attn.q", ".self_attn.k", ".self_attn.v")):
            return Source(f"{place[:-1]}wqkv.{kind}", self.unfused(place[-1], kind == "bias"))
        layer, _, branch = found.key.rpartition(".")
        scales = {"attention_scale": "lambda_1", "mlp_scale": "lambda_2"}
        return Source(f"{layer}.{scales[branch]}") if branch in scales else found

    def unfused(self, part: str, bias: bool) -> tuple[Reshape | Rows, ...]:
        """The queries, keys or values ("q", "k", "v") of InternLM's fused tensor.

        For each key-value head, its queries stand side by side, then the key, then the value.
        """
        text, width = self.text, self.text.head_width
        groups = text.num_attention_heads // text.num_key_value_heads
        start, stop = {"q": (0, groups), "k": (groups, groups + 1), "v": (groups + 1, groups + 2)}[part]
        inner = () if bias else (text.hidden_size,)
        rows = text.num_key_value_heads * (stop - start) * width
        return (
            Reshape((text.num_key_value_heads, groups + 2, width, *inner)),
            Rows(start, stop, dim=1),
            Reshape((rows, *inner)),
        )

    def unused_parameters(self) -> int:
        """The tower's layers above the selected one."""
        layers = self.vision.num_hidden_layers
        return (layers - self.select_layer % (layers + 1)) * self.vision.layer_parameters

    @property
    def template(self) -> PromptTemplate:
        return ORIGINAL if self.original else CHATML


def read_factor(config: ConfigReader) -> int:
    """Patches along the side of a square, from `downsample_ratio`. Raises: UserError where it is no whole number."""
    ratio = config.float("downsample_ratio", 0.5, high=1.0)
    if not (1 / ratio).is_integer():
        raise config.error(f"downsample_ratio is {ratio:g}; it must be one over a whole number, as 0.5")
    return int(1 / ratio)


def read_layer(config: ConfigReader, key: str, vision: InternVisionConfig) -> int:
    """The one state of the tower that is projected."""
    return config.int(key, -1, low=-vision.num_hidden_layers - 1, high=vision.num_hidden_layers)


ARCHITECTURE = InternVL
