"""DeepSeek-VL (Lu et al., arXiv 2403.05525): a SigLIP tower, or SigLIP beside SAM, an MLP, a LLaMA-like decoder.

The larger model looks twice: at a small square through SigLIP, at a large one through SAM's encoder, whose last states
and those of its first layer without windows are downsampled to as many tokens. Both squares come from preprocessing.
Weights in the layouts of transformers' two classes (DeepseekVLForConditionalGeneration and
DeepseekVLHybridForConditionalGeneration), or the one of https://github.com/deepseek-ai/DeepSeek-VL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.architectures.siglip import HALF
from graphs.components.connectors.hybrid import HybridProjector
from graphs.components.connectors.mlp import MLPProjector
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder, VisionEncoder
from graphs.components.text.config import FAMILIES, TextConfig
from graphs.components.vision.bilinear import BilinearResize
from graphs.components.vision.clip import SIGLIP_BASE_16, ClipVisionConfig
from graphs.components.vision.pixels import NormalizePixels
from graphs.components.vision.sam import SamConfig, SamEncoder, SamNeck
from graphs.components.vision.siglip import (
    SIGLIP_LARGE_384,
    TIMM_TOWERS,
    UNUSED_HEAD,
    SiglipTower,
    head_parameters,
    timm_aliases,
    tower_source,
)
from graphs.config import ConfigReader
from graphs.preprocess.image import CLIP_MEAN, CLIP_STD
from graphs.preprocess.letterbox import LetterboxProcessor, read_letterbox
from graphs.preprocess.letterbox_pair import LetterboxPairProcessor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import TensorSpec, Variant
from graphs.weights import Source, by_prefix

BILINEAR = 2  # Pillow's number
SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.\n\n"
)
TEMPLATE = PromptTemplate(SYSTEM, "User: ", "\n\nAssistant:", image="<image_placeholder>", image_separator="")
#: families that these systems' decoders may be of
DECODERS = ("llama", "mistral", "qwen2")
#: the side of the downsampled map over that of SAM's resized one: two convolutions of stride 2
DOWN = 4
SAM = r"vision_model\.vision_tower_high\.vision_tower\."
HIGH = "high_res_vision_model.vision_encoder."


class HighTower(nn.Module):
    """Normalised pixels [1, 3, S, S] of the large square to features [1, N, 4 * C], N = `grid` * `grid`."""

    def __init__(self, config: SamConfig, grid: int) -> None:
        super().__init__()
        channels = config.output_channels
        self.encoder = SamEncoder(config)
        self.neck, self.first_neck = SamNeck(config), SamNeck(config)
        self.resize = BilinearResize(config.grid, DOWN * grid)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(2 * channels, 4 * channels, 3, stride=2, padding=1, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))

    def down(self, x_1CHH: Tensor) -> Tensor:
        """Neck features to the map that leaves."""
        return self.conv2(self.conv1(self.resize(x_1CHH)))

    def forward(self, pixels_1CSS: Tensor) -> Tensor:
        first_1HHD, last_1HHD = self.encoder(pixels_1CSS)
        features = self.down(self.neck(last_1HHD)) + self.down(self.first_neck(first_1HHD)) * self.alpha
        return features.flatten(2).transpose(1, 2)


class HybridEncoder(nn.Module):
    """Raw pixels [1, 3, s, s] and [1, 3, S, S] uint8 to image embeddings [1, M, D]."""

    def __init__(self, pixels: LetterboxPairProcessor, tower: nn.Module, high: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.normalize = NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor)
        self.normalize_high = NormalizePixels(pixels.large_mean, pixels.large_std, pixels.rescale_factor)
        self.high, self.tower, self.projector = high, tower, projector

    def forward(self, pixel_values: Tensor, high_res_pixel_values: Tensor) -> Tensor:
        high_1NE = self.high(self.normalize_high(high_res_pixel_values))
        return self.projector(self.tower(self.normalize(pixel_values)), high_1NE)


@dataclass(frozen=True)
class DeepseekVL(ImageTextDecoder):
    """Configuration of one DeepSeek-VL. `high`: the second tower; None where there is one only.

    `original`: weights in the authors' layout, where SigLIP is as timm keeps it.
    """

    name = "deepseek_vl"
    aliases = (
        (r"model\.vision_model\.(vision_model\.)?", "vision_model."),
        (r"model\.", ""),
        (r"language_model\.model\.", "language_model."),
        (r"language_model\.lm_head\.", "lm_head."),
        *timm_aliases(r"vision_model\.vision_tower(?:_low\.vision_tower)?\."),
        (SAM + r"blocks\.(\d+)\.norm(\d)\.", HIGH + r"layers.\1.layer_norm\2."),
        (SAM + r"blocks\.", HIGH + "layers."),
        (SAM + r"patch_embed\.proj\.", HIGH + "patch_embed.projection."),
        (SAM + "pos_embed", HIGH + "pos_embed"),
        *((rf"{SAM}neck\.{n}\.", f"{HIGH}neck.{part}.") for n, part in enumerate(("conv1", "layer_norm1"))),
        *((rf"{SAM}neck\.{n + 2}\.", f"{HIGH}neck.{part}.") for n, part in enumerate(("conv2", "layer_norm2"))),
        (SAM + r"neck_hd\.0\.", "high_res_vision_neck.conv1."),
        (SAM + r"neck_hd\.1\.", "high_res_vision_neck.layer_norm1."),
        (SAM + r"neck_hd\.2\.", "high_res_vision_neck.conv2."),
        (SAM + r"neck_hd\.3\.", "high_res_vision_neck.layer_norm2."),
        (SAM + r"downsamples\.0\.", "high_res_vision_proj.conv1."),
        (SAM + r"downsamples\.1\.", "high_res_vision_proj.conv2."),
        (SAM + "hd_alpha_downsamples", "high_res_vision_alpha"),
        (r"aligner\.layers\.0\.", "aligner.linear1."),
        (r"aligner\.layers\.2\.", "aligner.linear2."),
        (r"aligner\.layers\.1\.", "aligner.proj."),
        (r"aligner\.low_up_proj\.", "aligner.vision_proj."),
        (r"aligner\.high_up_proj\.", "aligner.high_res_vision_proj."),
    )
    unused = (
        *UNUSED_HEAD,
        r"vision_model\.(high|low)_layer_norm\..*",  # kept, but not called, by the authors' class
        r"language_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )

    vision: ClipVisionConfig
    text: TextConfig
    high: SamConfig | None = None
    processor: LetterboxProcessor | LetterboxPairProcessor | None = None  # None: transformers' defaults
    original: bool = False
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        small = TextConfig(2048, 5632, 24, 16, 16, 102400, 16384)
        large = TextConfig(4096, 11008, 30, 32, 32, 102400, 16384)
        tiny_vision = replace(SIGLIP_LARGE_384, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                              num_attention_heads=4, image_size=32, patch_size=8)  # fmt: skip
        tiny_text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=96)
        tiny_high = SamConfig(32, 64, 3, 4, 72, 8, 8, window_size=4, global_layers=(1,))
        hub = "deepseek-ai/deepseek-vl"
        return (
            Variant("tiny", cls(tiny_vision, tiny_text, tiny_high)),
            Variant("tiny-siglip", cls(tiny_vision, tiny_text)),
            Variant("deepseek-vl-1.3b", cls(SIGLIP_LARGE_384, small, original=True), f"{hub}-1.3b-chat", 1_980_000_000),
            Variant(
                "deepseek-vl-7b",
                cls(SIGLIP_LARGE_384, large, SamConfig(), original=True),
                f"{hub}-7b-chat",
                7_300_000_000,
            ),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        read = cls.from_original if "language_config" in reader else cls.from_hub
        return read(reader, preprocessor)

    @classmethod
    def from_hub(cls, reader: ConfigReader, preprocessor: Mapping[str, Any] | None) -> Self:
        """From the keys of transformers' DeepseekVLConfig or DeepseekVLHybridConfig."""
        section = reader.section("vision_config")
        section.choice("model_type", ("siglip_vision_model",), default="siglip_vision_model")
        vision = ClipVisionConfig.from_reader(section, SIGLIP_BASE_16)
        kind = reader.choice("model_type", ("deepseek_vl", "deepseek_vl_hybrid"), default="deepseek_vl")
        if kind == "deepseek_vl":
            processor = LetterboxProcessor(**read_letterbox(preprocessor, vision.image_size))
            return cls(vision, read_text(reader), processor=processor)
        section = reader.section("high_res_vision_config")
        section.choice("model_type", ("sam_vision_model",), default="sam_vision_model")
        high = SamConfig.from_reader(section)
        pair = LetterboxPairProcessor.from_config(preprocessor, vision.image_size, high.image_size)
        return cls(vision, read_text(reader), high, pair)

    @classmethod
    def from_original(cls, reader: ConfigReader, preprocessor: Mapping[str, Any] | None) -> Self:
        """From the keys of the authors' repository, which names towers instead of describing them."""
        tower, params = reader.section("vision_config"), reader.section("vision_config").section("params")
        aligner = reader.section("aligner_config").section("params")
        text = read_text(reader, "language_config")
        kind = tower.choice("cls", ("CLIPVisionTower", "HybridVisionTower"))
        hybrid = kind == "HybridVisionTower"
        aligner.choice("projector_type", ("low_high_hybrid_split_mlp_gelu",) if hybrid else ("mlp_gelu",))
        aligner.int("depth", 2, low=2, high=2)
        low = params.section("low_res_cfg") if hybrid else params
        vision = TIMM_TOWERS[low.choice("model_name", TIMM_TOWERS)]
        vision = replace(vision, image_size=low.int("image_size", vision.image_size, high=8192))
        if not hybrid:
            processor = LetterboxProcessor(**read_letterbox(preprocessor, vision.image_size))
            return cls(vision, text, processor=processor, original=True)
        large = params.section("high_res_cfg")
        large.choice("model_name", ("sam_b_downsample",))
        high = SamConfig(image_size=large.int("image_size", SamConfig().image_size, high=8192))
        seen = read_letterbox(preprocessor, high.image_size)  # the large square; the towers normalise by themselves
        pair = LetterboxPairProcessor(
            side=vision.image_size,
            large_side=high.image_size,
            least=seen["least"],
            resample=BILINEAR,
            image_mean=low.floats("pixel_mean", HALF, length=3),
            image_std=low.floats("pixel_std", HALF, length=3, low=0.0),
            large_mean=large.floats("pixel_mean", CLIP_MEAN, length=3),
            large_std=large.floats("pixel_std", CLIP_STD, length=3, low=0.0),
            rescale_factor=seen["rescale_factor"],
            large_bars=seen["bars"],
        )
        return cls(vision, text, high, pair, original=True)

    @property
    def image_size(self) -> int:
        return self.vision.image_size

    @property
    def visual_tokens(self) -> int:
        return self.vision.tokens

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        low = super().vision_inputs()
        if self.high is None:
            return low
        side = self.high.image_size
        return (*low, TensorSpec("high_res_pixel_values", (1, 3, side, side), torch.uint8, "pixels"))

    def encoder(self) -> nn.Module:
        vision, width, pixels = self.vision, self.text.hidden_size, self.image_processor
        tower = SiglipTower(vision)
        if self.high is None:
            return VisionEncoder(pixels, tower, MLPProjector(vision.hidden_size, width, "gelu"))
        assert isinstance(pixels, LetterboxPairProcessor)
        projector = HybridProjector(vision.hidden_size, 4 * self.high.output_channels, width)
        return HybridEncoder(pixels, tower, HighTower(self.high, vision.grid), projector)

    def source(self, parameter: str) -> Source:
        tower = "vision_encoder.tower."
        if parameter.startswith(tower):
            return tower_source(parameter.removeprefix(tower), self.vision, self.original)
        head = "language_model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        return by_prefix(
            parameter.replace(".rel_pos.", ".rel_pos_"),
            {
                "vision_encoder.high.encoder.patch_embed.": f"{HIGH}patch_embed.projection.",
                "vision_encoder.high.encoder.": HIGH,
                "vision_encoder.high.neck.": f"{HIGH}neck.",
                "vision_encoder.high.first_neck.": "high_res_vision_neck.",
                "vision_encoder.high.conv": "high_res_vision_proj.conv",
                "vision_encoder.high.": "high_res_vision_",
                "vision_encoder.projector.linear_": "aligner.linear",
                "vision_encoder.projector.": "aligner.",
                "token_embedding.": "language_model.embed_tokens.",
                "text_decoder.lm_head.": head,
                "text_decoder.": "language_model.",
            },
        )

    def unused_parameters(self) -> int:
        """The pooling head of SigLIP, and the two norms that the authors' class with two towers does not call."""
        norms = 4 * self.vision.hidden_size if self.high else 0
        return head_parameters(self.vision) + norms if self.original else 0

    @property
    def image_processor(self) -> LetterboxProcessor | LetterboxPairProcessor:
        if self.processor is not None:
            return self.processor
        if self.high is None:
            return LetterboxProcessor(self.vision.image_size)
        return LetterboxPairProcessor(self.vision.image_size, self.high.image_size)

    @property
    def template(self) -> PromptTemplate:
        return TEMPLATE


def read_text(config: ConfigReader, key: str = "text_config") -> TextConfig:
    """The decoder; its head is tied where the whole configuration says so, or, where that is silent, the decoder's."""
    section = config.section(key)
    kind = section.choice("model_type", DECODERS, default="llama")
    tied = config.bool("tie_word_embeddings", section.bool("tie_word_embeddings", False))
    values = {**section.values, "tie_word_embeddings": tied}
    return TextConfig.from_reader(ConfigReader(values, section.where), FAMILIES[kind])


ARCHITECTURE = DeepseekVL
