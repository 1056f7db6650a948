"""Idefics 2 (Laurençon et al., arXiv 2405.02246): SigLIP over pictures of any shape, perceiver resampler, Mistral.

How many patches a picture has, where they are in the tower's table of positions, and, where its quarters are seen too,
which of them only fill up, depends on its size: preprocessing computes it and feeds patches in any number, their
positions and a mask. Weights in the layout of the hub, which transformers writes too (`model.vision_model.*`,
`model.connector.*`, `model.text_model.*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.architectures.idefics3 import DECODERS, IDEFICS, read_decoder
from graphs.components.activations import ACTIVATIONS
from graphs.components.connectors.perceiver import GatedProjection, PerceiverConfig, PerceiverResampler
from graphs.components.image_text import MAX_CONTEXT, ImageTextDecoder
from graphs.components.text.config import TextConfig
from graphs.components.vision.clip import ClipVisionConfig
from graphs.components.vision.navit import (
    IDEFICS2_BASE,
    NavitTower,
    PatchEmbeddings,
    key_mask,
    read_navit,
    siglip_so400m,
)
from graphs.config import ConfigReader
from graphs.preprocess.navit import NavitProcessor
from graphs.preprocess.prompt import PromptTemplate
from graphs.spec import Dim, TensorSpec, Variant
from graphs.weights import Reshape, Source, by_prefix

#: `model_type` of a vision_config -> the tower's defaults; the published files name the whole model there
TOWERS = dict.fromkeys(("idefics2_vision", "idefics2"), IDEFICS2_BASE)

MISTRAL = TextConfig(
    4096, 14336, 32, 32, 8, 32003, max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=4096
)

IDEFICS2_PERCEIVER = PerceiverConfig()

AROUND = "<fake_token_around_image>"

TEMPLATE = replace(IDEFICS, around=AROUND)


class ResampledEncoder(nn.Module):
    """Patches [P, N, 3, K, K] uint8, their positions and which are real [P, N] int64, to embeddings [1, P * L, D]."""

    def __init__(self, tower: NavitTower, projector: GatedProjection, resampler: PerceiverResampler) -> None:
        super().__init__()
        self.tower, self.modality_projection, self.perceiver_resampler = tower, projector, resampler

    def forward(self, pixel_values: Tensor, patch_position: Tensor, patch_mask: Tensor) -> Tensor:
        mask_P11N = key_mask(patch_mask, self.perceiver_resampler.latents.dtype)
        x_PND = self.modality_projection(self.tower(pixel_values, patch_position, mask=mask_P11N))
        return self.perceiver_resampler(x_PND, mask_P11N).flatten(0, 1).unsqueeze(0)


@dataclass(frozen=True)
class Idefics2(ImageTextDecoder):
    """Configuration of one Idefics 2."""

    name = "idefics2"
    unused = (
        r"lm_head\.weight",  # a tied head saved all the same
        r"model\.text_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    )

    vision: ClipVisionConfig
    text: TextConfig
    perceiver: PerceiverConfig = IDEFICS2_PERCEIVER
    processor: NavitProcessor | None = None  # None: as published, quarters and all, up to the tower's size
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        tower, hub = siglip_so400m(980), "HuggingFaceM4/idefics2-8b"
        tiny_vision = replace(IDEFICS2_BASE, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        tiny_vision = replace(tiny_vision, num_attention_heads=4, image_size=32, patch_size=8)
        tiny_text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=160)
        tiny_perceiver = PerceiverConfig(64, "silu", 1e-6, 5, 2, 4, 12, 2)
        base = replace(MISTRAL, vocab_size=32002)
        return (
            Variant("tiny", cls(tiny_vision, tiny_text, tiny_perceiver, NavitProcessor(8, 4, 5, 16, 40))),
            Variant("idefics2-8b", cls(tower, MISTRAL), hub, 8_400_000_000),
            Variant("idefics2-8b-base", cls(tower, base), f"{hub}-base", 8_400_000_000),
            Variant("idefics2-8b-chatty", cls(tower, MISTRAL), f"{hub}-chatty", 8_400_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        vision = read_navit(reader.section("vision_config"), TOWERS, "idefics2_vision")
        text = read_decoder(reader, DECODERS, "mistral")
        perceiver = read_perceiver(reader.section("perceiver_config"), text)
        processor = NavitProcessor.from_config(
            preprocessor, vision.patch_size, vision.grid, perceiver.resampler_n_latents
        )
        return cls(vision, text, perceiver, processor)

    @property
    def image_processor(self) -> NavitProcessor:
        tokens = self.perceiver.resampler_n_latents
        return self.processor or NavitProcessor.from_config(None, self.vision.patch_size, self.vision.grid, tokens)

    @property
    def image_size(self) -> int:
        """The longest side of a picture, in pixels."""
        return self.image_processor.longest

    @property
    def visual_tokens(self) -> int:
        return self.image_processor.pictures * self.perceiver.resampler_n_latents

    def encoder(self) -> nn.Module:
        text = self.text
        return ResampledEncoder(
            NavitTower(self.vision, PatchEmbeddings(self.vision, self.image_processor)),
            GatedProjection(self.vision.hidden_size, text.intermediate_size, text.hidden_size, text.hidden_act),
            PerceiverResampler(self.perceiver),
        )

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        processor, side = self.image_processor, self.vision.patch_size
        fewest, most = processor.patches
        shape = (processor.pictures, Dim("patches", fewest, most) if fewest < most else most)
        return (
            TensorSpec("pixel_values", (*shape, 3, side, side), torch.uint8, "pixels"),
            TensorSpec("patch_position", shape, torch.int64, "ids", self.vision.grid**2),
            TensorSpec("patch_mask", shape, torch.int64, "ids", 2),
        )

    def source(self, parameter: str) -> Source:
        if parameter == "vision_encoder.tower.embeddings.patch_embedding.weight":
            return patch_weight("model.vision_model.embeddings.patch_embedding.weight", self.vision)
        head = "model.text_model.embed_tokens." if self.text.tie_word_embeddings else "lm_head."
        return by_prefix(
            parameter,
            {
                "vision_encoder.tower.layers.": "model.vision_model.encoder.layers.",
                "vision_encoder.tower.": "model.vision_model.",
                "vision_encoder.": "model.connector.",
                "token_embedding.": "model.text_model.embed_tokens.",
                "text_decoder.lm_head.": head,
                "text_decoder.": "model.text_model.",
            },
        )

    @property
    def template(self) -> PromptTemplate:
        return TEMPLATE


def patch_weight(key: str, vision: ClipVisionConfig) -> Source:
    """The weight of a convolution over patches as that of a linear layer over their pixels."""
    return Source(key, (Reshape((vision.hidden_size, 3 * vision.patch_size**2)),))


def read_perceiver(config: ConfigReader, text: TextConfig) -> PerceiverConfig:
    """The resampler that a `perceiver_config` describes, as wide as the decoder whatever it says. Raises: UserError."""
    base = IDEFICS2_PERCEIVER
    own = config.int("hidden_size", base.hidden_size) == text.hidden_size
    heads = config.int("resampler_n_heads", base.resampler_n_heads, high=1024)
    perceiver = PerceiverConfig(
        hidden_size=text.hidden_size,
        hidden_act=config.choice("hidden_act", ACTIVATIONS, default=base.hidden_act),
        rms_norm_eps=config.float("rms_norm_eps", base.rms_norm_eps, high=1.0) if own else text.rms_norm_eps,
        resampler_n_latents=config.int("resampler_n_latents", base.resampler_n_latents, high=4096),
        resampler_depth=config.int("resampler_depth", base.resampler_depth, high=1024),
        resampler_n_heads=heads,
        resampler_head_dim=config.int("resampler_head_dim", base.resampler_head_dim, high=4096),
        num_key_value_heads=config.int("num_key_value_heads", min(base.num_key_value_heads, heads), high=heads),
    )
    if heads % perceiver.num_key_value_heads:
        raise config.error(
            f"resampler_n_heads {heads} is not a multiple of num_key_value_heads {perceiver.num_key_value_heads}"
        )
    return perceiver


ARCHITECTURE = Idefics2
