"""MobileVLM (arXiv 2312.16886) and MobileVLM V2 (arXiv 2402.03766): CLIP ViT, LDP projector, LLaMA decoder.

Weights in the public layout of Meituan-AutoML/MobileVLM: `model.layers.*`, `model.mm_projector.*`,
`model.vision_tower.vision_tower.vision_model.*`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.components.activations import ACTIVATIONS
from graphs.components.connectors.ldp import LDP, LDPv2
from graphs.components.text.llama import LlamaConfig, LlamaDecoder
from graphs.components.vision.clip import ClipVisionConfig, ClipVisionTower
from graphs.components.vision.pixels import NormalizePixels
from graphs.config import ConfigReader
from graphs.errors import UserError
from graphs.preprocess.image import ImageProcessor
from graphs.preprocess.prompt import VICUNA_V1, PromptTemplate
from graphs.spec import Architecture, Dim, Method, TensorSpec, Variant
from graphs.weights import Source

CLIP_LARGE_336 = ClipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)

#: towers that a config.json may name instead of describing
TOWERS: dict[str, ClipVisionConfig] = {
    "openai/clip-vit-large-patch14-336": CLIP_LARGE_336,
    "openai/clip-vit-large-patch14": replace(CLIP_LARGE_336, image_size=224),
    "openai/clip-vit-base-patch16": ClipVisionConfig(768, 3072, 12, 12, 224, 16),
    "openai/clip-vit-base-patch32": ClipVisionConfig(768, 3072, 12, 12, 224, 32),
}


@dataclass(frozen=True)
class Projector:
    """A kind of projector: how to build it and where the public layout keeps its parameters."""

    build: Callable[[int, int, int], nn.Module]
    tokens: Callable[[int], int]  # tokens out, from the side of the grid
    keys: Mapping[str, str]  # prefix in the module -> prefix in the checkpoint


PROJECTORS: dict[str, Projector] = {
    "ldpnet": Projector(
        build=LDP,
        tokens=lambda grid: ((grid + 1) // 2) ** 2,
        keys={"mlp.": "model.mlp.", "mb_block.": "model.mb_block."},
    ),
    "ldpnetv2": Projector(
        build=LDPv2, tokens=lambda grid: LDPv2.POOLED**2, keys={"mlp.": "mlp.mlp.", "peg.": "peg.peg.0."}
    ),
}

#: the longest context a bundle keeps a cache for, unless the checkpoint's is shorter
MAX_CONTEXT = 2048


class VisionEncoder(nn.Module):
    """Raw pixels [1, 3, H, W] uint8 to image embeddings [1, M, D]: normalisation, tower, projector."""

    def __init__(self, normalize: nn.Module, tower: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.normalize = normalize
        self.tower = tower
        self.projector = projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.projector(self.tower(self.normalize(pixel_values)))


@dataclass(frozen=True)
class MobileVLM(Architecture):
    """Configuration of one MobileVLM, v1 (`ldpnet`) or v2 (`ldpnetv2`)."""

    name = "mobilevlm"
    kind = "vlm_decoder"
    unused = (
        r"model\.vision_tower\.vision_tower\.vision_model\.encoder\.layers\..*",  # layers above the selected one
        r"model\.vision_tower\.vision_tower\.vision_model\.(post_layernorm\..*|embeddings\.position_ids)",
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"lm_head\.weight",  # a tied head saved all the same; an untied one is a source and never unused
    )

    vision: ClipVisionConfig
    text: LlamaConfig
    projector: str
    select_layer: int = -2
    processor: ImageProcessor | None = None  # None: padded to a square and resized to the tower's, CLIP's statistics
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        llama_1b = LlamaConfig(2048, 5632, 24, 16, 16, 32000)
        llama_3b = LlamaConfig(2560, 6912, 32, 32, 32, 32000)
        llama_7b = LlamaConfig(4096, 11008, 32, 32, 32, 32000, rms_norm_eps=1e-5)
        tiny_vision = ClipVisionConfig(64, 128, 3, 4, 48, 8)
        tiny_text = LlamaConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=64)
        # the second version pools to 144 tokens whatever the picture, which a context of 64 could not hold
        wide_vision = replace(tiny_vision, image_size=96, patch_size=4)
        long_text = replace(tiny_text, max_position_embeddings=192)
        return (
            Variant("tiny", cls(tiny_vision, tiny_text, "ldpnet")),
            Variant("tiny-v2", cls(wide_vision, long_text, "ldpnetv2")),
            Variant("mobilevlm-1.7b", cls(CLIP_LARGE_336, llama_1b, "ldpnet"), "mtgv/MobileVLM-1.7B", 1_700_000_000),
            Variant("mobilevlm-3b", cls(CLIP_LARGE_336, llama_3b, "ldpnet"), "mtgv/MobileVLM-3B", 3_000_000_000),
            Variant(
                "mobilevlm-v2-1.7b", cls(CLIP_LARGE_336, llama_1b, "ldpnetv2"), "mtgv/MobileVLM_V2-1.7B", 1_700_000_000
            ),
            Variant(
                "mobilevlm-v2-7b", cls(CLIP_LARGE_336, llama_7b, "ldpnetv2"), "mtgv/MobileVLM_V2-7B", 7_060_000_000
            ),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision = read_vision(reader)
        processor = None
        if preprocessor:
            processor = ImageProcessor.from_config(preprocessor, config.get("image_aspect_ratio"))
            if processor.crop_size not in (None, (vision.image_size, vision.image_size)):
                raise UserError(
                    f"preprocessor_config.json: crop_size is {processor.crop_size}; this tower takes pictures of "
                    f"{vision.image_size} x {vision.image_size}"
                )
        return cls(
            vision=vision,
            text=read_text(reader),
            projector=reader.choice("mm_projector_type", PROJECTORS),
            select_layer=reader.int("mm_vision_select_layer", -2, low=-vision.num_hidden_layers, high=-1),
            processor=processor,
        )

    @property
    def context(self) -> int:
        """Tokens that the deployed decoder's cache holds."""
        return min(self.text.max_position_embeddings, self.max_context)

    @property
    def visual_tokens(self) -> int:
        """Image embeddings that one picture becomes."""
        return PROJECTORS[self.projector].tokens(self.vision.grid)

    def with_context(self, max_context: int) -> Self:
        return replace(self, max_context=max_context)

    def facts(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "visual_tokens": self.visual_tokens,
            "image_size": self.vision.image_size,
            "layers": self.text.num_hidden_layers,
            "vocab_size": self.text.vocab_size,
        }

    def build(self) -> nn.Module:
        root, pixels = nn.Module(), self.image_processor
        root.vision_encoder = VisionEncoder(
            NormalizePixels(pixels.image_mean, pixels.image_std, pixels.rescale_factor),
            ClipVisionTower(self.vision, self.select_layer),
            PROJECTORS[self.projector].build(self.vision.hidden_size, self.text.hidden_size, self.vision.grid),
        )
        root.token_embedding = nn.Embedding(self.text.vocab_size, self.text.hidden_size)
        root.text_decoder = LlamaDecoder(self.text, self.context)
        return root

    def methods(self, root: nn.Module) -> tuple[Method, ...]:
        text, side = self.text, self.vision.image_size
        length = Dim("sequence", 1, self.context)
        pixels = TensorSpec("pixel_values", (1, 3, side, side), torch.uint8, "pixels")
        image_embeds = TensorSpec("image_embeds", (1, self.visual_tokens, text.hidden_size))
        ids = TensorSpec("input_ids", (1, length), torch.int64, "ids", text.vocab_size)
        inputs_embeds = TensorSpec("inputs_embeds", (1, length, text.hidden_size))
        position = TensorSpec("cache_position", (length,), torch.int64, "positions")
        logits = TensorSpec("logits", (1, length, text.vocab_size))
        cache_shape = (1, text.num_key_value_heads, self.context, text.head_width)
        caches = tuple(
            TensorSpec(f"layers.{layer}.cache.{part}", cache_shape)
            for layer in range(text.num_hidden_layers)
            for part in ("k", "v")
        )
        return (
            Method("vision_encoder", root.get_submodule("vision_encoder"), (pixels,), (image_embeds,)),
            Method("token_embedding", root.get_submodule("token_embedding"), (ids,), (inputs_embeds,)),
            Method("text_decoder", root.get_submodule("text_decoder"), (inputs_embeds, position), (logits,), caches),
        )

    def source(self, parameter: str) -> Source:
        tower = "model.vision_tower.vision_tower.vision_model."
        head = "model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        prefixes = {
            "vision_encoder.tower.layers.": f"{tower}encoder.layers.",
            "vision_encoder.tower.": tower,
            **{
                f"vision_encoder.projector.{ours}": f"model.mm_projector.{theirs}"
                for ours, theirs in PROJECTORS[self.projector].keys.items()
            },
            "token_embedding.": "model.embed_tokens.",
            "text_decoder.lm_head.": head,
            "text_decoder.": "model.",
        }
        ours = next(prefix for prefix in prefixes if parameter.startswith(prefix))
        return Source(prefixes[ours] + parameter.removeprefix(ours))

    def unused_parameters(self) -> int:
        """The tower's layers above the selected one, and its last norm."""
        width, inner = self.vision.hidden_size, self.vision.intermediate_size
        layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
        return -(self.select_layer + 1) * layer + 2 * width

    @property
    def image_processor(self) -> ImageProcessor:
        side = self.vision.image_size
        return self.processor or ImageProcessor(side, crop_size=(side, side), aspect_ratio="pad")

    @property
    def template(self) -> PromptTemplate:
        return VICUNA_V1


def read_vision(config: ConfigReader) -> ClipVisionConfig:
    """The tower: described by `vision_config`, or one of `TOWERS` named by `mm_vision_tower`."""
    if "vision_config" not in config:
        return TOWERS[config.choice("mm_vision_tower", TOWERS)]
    vision = config.section("vision_config")
    tower = ClipVisionConfig(
        hidden_size=vision.int("hidden_size"),
        intermediate_size=vision.int("intermediate_size"),
        num_hidden_layers=vision.int("num_hidden_layers", high=1024),
        num_attention_heads=vision.int("num_attention_heads", high=1024),
        image_size=vision.int("image_size", high=8192),
        patch_size=vision.int("patch_size", high=1024),
        hidden_act=vision.choice("hidden_act", ACTIVATIONS, default="quick_gelu"),
        layer_norm_eps=vision.float("layer_norm_eps", 1e-5, low=0.0, high=1.0),
    )
    if tower.hidden_size % tower.num_attention_heads:
        raise vision.error(
            f"hidden_size {tower.hidden_size} is not a multiple of num_attention_heads {tower.num_attention_heads}"
        )
    if tower.patch_size > tower.image_size:
        raise vision.error(f"patch_size {tower.patch_size} is larger than image_size {tower.image_size}")
    return tower


def read_text(config: ConfigReader) -> LlamaConfig:
    """The decoder, from the top level of config.json."""
    heads = config.int("num_attention_heads", high=1024)
    text = LlamaConfig(
        hidden_size=config.int("hidden_size"),
        intermediate_size=config.int("intermediate_size"),
        num_hidden_layers=config.int("num_hidden_layers", high=1024),
        num_attention_heads=heads,
        num_key_value_heads=config.int("num_key_value_heads", heads, high=heads),
        vocab_size=config.int("vocab_size", high=1 << 24),
        max_position_embeddings=config.int("max_position_embeddings", 2048, high=1 << 24),
        head_dim=config.int("head_dim", 0, high=4096),
        rms_norm_eps=config.float("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        rope_theta=config.float("rope_theta", 10000.0, low=1.0, high=1e12),
        hidden_act=config.choice("hidden_act", ACTIVATIONS, default="silu"),
        tie_word_embeddings=config.bool("tie_word_embeddings", False),
    )
    if not text.head_dim and text.hidden_size % heads:
        raise config.error(f"hidden_size {text.hidden_size} is not a multiple of num_attention_heads {heads}")
    if heads % text.num_key_value_heads:
        raise config.error(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {text.num_key_value_heads}"
        )
    if text.head_width % 2:
        raise config.error(f"the head width {text.head_width} is odd, rotary positions need an even one")
    return text


ARCHITECTURE = MobileVLM
