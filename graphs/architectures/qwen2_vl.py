"""Qwen2-VL (Wang et al., arXiv 2409.12191): pictures and videos of any size, 2-D rotary tower, 2x2 merger, M-RoPE.

Preprocessing cuts pictures and gives rows, columns and frames of the patches; the graph takes any number of them up to
half of the context. Weights in the layout of the hub's checkpoints (`visual.*`, `model.layers.*`), which transformers
writes too, or by the names of its modules since version 4.52 (`model.visual.*`, `model.language_model.*`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder
from graphs.components.text import config as families
from graphs.components.text.config import TextConfig
from graphs.components.vision.patches import PatchMerger, PatchTower, PatchVisionConfig
from graphs.config import ConfigReader
from graphs.preprocess.patches import PatchProcessor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Dim, TensorSpec, Variant
from graphs.weights import Reshape, Rows, Source, by_prefix

#: how a conversation reads
CHATML = PromptTemplate(
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    user="<|im_start|>user\n",
    assistant="<|im_end|>\n<|im_start|>assistant\n",
    image="<|image_pad|>",
    image_separator="",
)

PROCESSOR = PatchProcessor(max_pixels=28 * 28 * 16384)  # where a checkpoint says nothing of its pictures


class PatchEncoder(nn.Module):
    """Units of patches [M, U, V] uint8, rows and columns [M, U, 2], frames [M, U] to image embeddings [1, M, D]."""

    def __init__(self, tower: PatchTower, merger: PatchMerger) -> None:
        super().__init__()
        self.tower, self.merger = tower, merger

    def forward(self, pixel_values: Tensor, patch_position: Tensor, frames: Tensor) -> Tensor:
        return self.merger(self.tower(pixel_values, patch_position, frames)).unsqueeze(0)


@dataclass(frozen=True)
class Qwen2VL(ImageTextDecoder):
    """Configuration of one Qwen2-VL. `processor`: the checkpoint's; a bundle's may take smaller pictures only."""

    name = "qwen2_vl"
    aliases: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"model\.visual\.", "visual."),
        (r"model\.language_model\.", "model."),
    )
    unused: ClassVar[tuple[str, ...]] = (
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"lm_head\.weight",  # a tied head saved all the same
    )

    vision: PatchVisionConfig
    text: TextConfig
    processor: PatchProcessor = PROCESSOR
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        vision = PatchVisionConfig(1280, 5120, 32, 16)
        tiny_vision = PatchVisionConfig(32, 64, 2, 2, patch_size=4)
        tiny_text = decoder(64, 128, 2, 4, 2, 256, 128, mrope_section=(2, 3, 3))
        tiny = cls(tiny_vision, tiny_text, PatchProcessor(4, min_pixels=64, max_pixels=4096))
        two, seven = decoder(1536, 8960, 28, 12, 2, 151936), decoder(3584, 18944, 28, 28, 4, 152064)
        large = decoder(8192, 29568, 80, 64, 8, 152064)
        hub = "Qwen/Qwen2-VL"
        return (
            Variant("tiny", tiny),
            Variant(
                "qwen2-vl-2b",
                cls(vision, replace(two, tie_word_embeddings=True)),
                f"{hub}-2B-Instruct",
                2_210_000_000,
            ),
            Variant("qwen2-vl-7b", cls(vision, seven), f"{hub}-7B-Instruct", 8_290_000_000),
            Variant("qwen2-vl-72b", cls(vision, large), f"{hub}-72B-Instruct", 73_400_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        section = reader.section("vision_config")
        vision, text = cls.read_vision(section), read_text(reader)
        width = section.int(cls.width_key, text.hidden_size)
        if width != text.hidden_size:
            raise section.error(f"{cls.width_key} is {width}, the decoder's hidden_size is {text.hidden_size}")
        processor = replace(
            cls.made_by(vision, section),
            patch_size=vision.patch_size,
            temporal_patch_size=vision.frames,
            merge_size=vision.merge,
        )
        return cls(vision, text, processor.read(preprocessor or {}))

    #: key of a vision_config that says how wide embeddings are
    width_key = "hidden_size"

    @classmethod
    def read_vision(cls, config: ConfigReader) -> PatchVisionConfig:
        """The tower of a Qwen2VLVisionConfig's JSON. Raises: UserError."""
        width = config.int("embed_dim", 1280)
        vision = PatchVisionConfig(
            hidden_size=width,
            intermediate_size=int(width * config.float("mlp_ratio", 4.0, high=64.0)),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default="quick_gelu"),
            **read_grid(config),
        )
        vision.check(config)
        return vision

    @classmethod
    def made_by(cls, vision: PatchVisionConfig, config: ConfigReader) -> PatchProcessor:
        """The kind of processor that this system has, with what a vision_config says about it."""
        return PROCESSOR

    @property
    def visual_tokens(self) -> int:
        """The most image embeddings that one picture or video becomes: half of the context at the most."""
        return max(1, min(self.processor.max_pixels // self.processor.factor**2, self.context // 2))

    def facts(self) -> dict[str, Any]:
        facts = super().facts()
        return {key: value for key, value in facts.items() if key != "image_size"}

    @property
    def image_size(self) -> int:
        """Side of the largest square that is not made smaller; pictures of other shapes are taken as they are."""
        return int(self.visual_tokens**0.5) * self.processor.factor

    @property
    def positions(self) -> int:
        """Rows or columns of patches that a picture may have: it may be one embedding wide."""
        return self.visual_tokens * self.vision.merge

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        units = (Dim("visual_tokens", 1, self.visual_tokens), self.vision.unit)
        return (
            TensorSpec("pixel_values", (*units, self.vision.values), torch.uint8, "pixels"),
            TensorSpec("patch_position", (*units, 2), torch.int64, "ids", self.positions),
            TensorSpec("frames", units, torch.int64, "ids", 2),
        )

    def image_embeds(self) -> TensorSpec:
        return TensorSpec("image_embeds", (1, Dim("visual_tokens", 1, self.visual_tokens), self.text.hidden_size))

    def encoder(self) -> nn.Module:
        return PatchEncoder(
            PatchTower(self.vision, self.image_processor, self.positions),
            PatchMerger(self.vision, self.text.hidden_size),
        )

    def source(self, parameter: str) -> Source:
        width = self.vision.hidden_size
        if parameter == "vision_encoder.tower.embedding.projection.weight":
            return Source("visual.patch_embed.proj.weight", (Reshape((width, self.vision.values)),))
        if found := re.fullmatch(r"vision_encoder\.tower\.layers\.(\d+)\.attn\.([qkv])_proj\.(\w+)", parameter):
            layer, part, kind = found.groups()
            rows = Rows("qkv".index(part) * width, ("qkv".index(part) + 1) * width)
            return Source(f"visual.blocks.{layer}.attn.qkv.{kind}", (rows,))
        head = "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        return by_prefix(
            parameter.replace(".attn.out_proj.", ".attn.proj."),
            {
                "vision_encoder.tower.layers.": "visual.blocks.",
                "vision_encoder.merger.norm.": "visual.merger.ln_q.",
                "vision_encoder.merger.fc1.": "visual.merger.mlp.0.",
                "vision_encoder.merger.fc2.": "visual.merger.mlp.2.",
                "token_embedding.": "model.embed_tokens.",
                "text_decoder.lm_head.": head,
                "text_decoder.": "model.",
            },
        )

    @property
    def image_processor(self) -> PatchProcessor:
        return replace(self.processor, max_tokens=self.visual_tokens)

    @property
    def template(self) -> PromptTemplate:
        return CHATML


def decoder(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int,
    positions: int = 32768,
    mrope_section: tuple[int, ...] = (16, 24, 24),
) -> TextConfig:
    """A decoder of the family, with what its published sizes share."""
    return TextConfig(
        width,
        inner,
        layers,
        heads,
        key_value_heads,
        vocabulary,
        positions,
        rope_theta=1e6,
        attention_bias=True,
        mrope_section=mrope_section,
    )


def read_text(reader: ConfigReader) -> TextConfig:
    """The decoder: of `text_config`, or of the keys at the top, as the hub's files have it. Raises: UserError."""
    section = reader.section("text_config") if "text_config" in reader else reader
    tied = section.bool("tie_word_embeddings", False) or reader.bool("tie_word_embeddings", False)
    values = {**section.values, "tie_word_embeddings": tied}
    return TextConfig.from_reader(ConfigReader(values, section.where), families.QWEN2_VL)


def read_grid(config: ConfigReader) -> dict[str, Any]:
    """What the vision_configs of the family say alike. Raises: UserError."""
    for key in ("in_channels", "in_chans"):
        config.int(key, 3, low=3, high=3)
    rope = config.section("rope_parameters")
    rope.choice("rope_type", ("axial",), default="axial")
    return {
        "num_hidden_layers": config.int("depth", 32, high=1024),
        "num_attention_heads": config.int("num_heads", 16, high=1024),
        "patch_size": config.int("patch_size", 14, high=1024),
        "frames": config.int("temporal_patch_size", 2, high=64),
        "merge": config.int("spatial_merge_size", 2, high=64),
        "rope_theta": rope.float("rope_theta", 10000.0, low=1.0, high=1e12),
    }


ARCHITECTURE = Qwen2VL
