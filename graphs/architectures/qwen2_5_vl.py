"""Qwen2.5-VL (Bai et al., arXiv 2502.13923): Qwen2-VL with windows in its tower, RMS norms and gated MLPs.

Windows are cut by preprocessing, each filled up to its full number of patches, so that attention within them is one
batch in the graph. Steps in time of a video's positions are counted in seconds. Layouts as of Qwen2-VL.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graphs.architectures.qwen2_vl import Qwen2VL, decoder, read_grid
from graphs.components.activations import ACTIVATIONS
from graphs.components.vision.patches import PatchMerger, PatchTower, PatchVisionConfig
from graphs.config import ConfigReader
from graphs.preprocess.windows import WindowProcessor
from graphs.spec import Dim, TensorSpec, Variant

PROCESSOR = WindowProcessor(max_pixels=28 * 28 * 16384, time_scale=2.0)


class WindowEncoder(nn.Module):
    """Windows of patches [B, P, V] uint8, rows and columns [B, P, 2], frames [B, P] to image embeddings [1, M, D].

    `order` [M]: which of the windows' embeddings to take.
    """

    def __init__(self, tower: PatchTower, merger: PatchMerger) -> None:
        super().__init__()
        self.tower, self.merger = tower, merger

    def forward(self, pixel_values: Tensor, patch_position: Tensor, frames: Tensor, order: Tensor) -> Tensor:
        merged_RD = self.merger(self.tower(pixel_values, patch_position, frames))
        return merged_RD.index_select(0, order).unsqueeze(0)


@dataclass(frozen=True)
class Qwen25VL(Qwen2VL):
    """Configuration of one Qwen2.5-VL; see `Qwen2VL`."""

    name = "qwen2_5_vl"
    width_key = "out_hidden_size"

    processor: WindowProcessor = PROCESSOR

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        vision = PatchVisionConfig(
            1280,
            3420,
            32,
            16,
            hidden_act="silu",
            norm="rms",
            gated=True,
            window=112,
            full_layers=(7, 15, 23, 31),
        )
        wide = replace(vision, intermediate_size=3456)
        tiny_vision = replace(
            vision,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            patch_size=4,
            window=16,
            full_layers=(1,),
        )
        tiny_text = decoder(64, 128, 2, 4, 2, 256, 128, mrope_section=(2, 3, 3))
        tiny = cls(tiny_vision, tiny_text, WindowProcessor(4, min_pixels=64, max_pixels=4096, window=2))
        three = replace(decoder(2048, 11008, 36, 16, 2, 151936, 128000), tie_word_embeddings=True)
        seven = decoder(3584, 18944, 28, 28, 4, 152064, 128000)
        middle = decoder(5120, 27648, 64, 40, 8, 152064, 128000)
        large = decoder(8192, 29568, 80, 64, 8, 152064, 128000)
        hub = "Qwen/Qwen2.5-VL"
        return (
            Variant("tiny", tiny),
            Variant("qwen2.5-vl-3b", cls(vision, three), f"{hub}-3B-Instruct", 3_750_000_000),
            Variant("qwen2.5-vl-7b", cls(vision, seven), f"{hub}-7B-Instruct", 8_290_000_000),
            Variant("qwen2.5-vl-32b", cls(wide, middle), f"{hub}-32B-Instruct", 33_450_000_000),
            Variant("qwen2.5-vl-72b", cls(wide, large), f"{hub}-72B-Instruct", 73_410_000_000),
        )

    @classmethod
    def read_vision(cls, config: ConfigReader) -> PatchVisionConfig:
        """The tower of a Qwen2_5_VLVisionConfig's JSON. Raises: UserError."""
        layers = config.values.get("fullatt_block_indexes")
        layers = [7, 15, 23, 31] if layers is None else layers
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise config.error("fullatt_block_indexes must be a list of numbers of layers")
        vision = PatchVisionConfig(
            hidden_size=config.int("hidden_size", 3584),
            intermediate_size=config.int("intermediate_size", 3420),
            hidden_act=config.choice("hidden_act", ACTIVATIONS, default="silu"),
            norm="rms",
            gated=True,
            window=config.int("window_size", 112, high=8192),
            full_layers=tuple(layers),
            **read_grid(config),
        )
        vision.check(config)
        if not vision.window_side:
            least = vision.merge * vision.patch_size
            raise config.error(f"window_size {vision.window} is smaller than the {least} pixels of a merged patch")
        return vision

    @classmethod
    def made_by(cls, vision: PatchVisionConfig, config: ConfigReader) -> WindowProcessor:
        scale = config.float("tokens_per_second", 4.0, high=1000.0)
        return replace(PROCESSOR, time_scale=scale, window=vision.window_side)

    @property
    def image_processor(self) -> WindowProcessor:
        return replace(self.processor, max_tokens=self.visual_tokens)

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        embeddings = self.vision.window_side**2
        windows = (Dim("windows", 1, self.image_processor.most_windows), embeddings * self.vision.unit)
        rows = Dim("visual_tokens", 1, self.visual_tokens)
        return (
            TensorSpec("pixel_values", (*windows, self.vision.values), torch.uint8, "pixels"),
            TensorSpec("patch_position", (*windows, 2), torch.int64, "ids", self.positions),
            TensorSpec("frames", windows, torch.int64, "ids", 2),
            TensorSpec("order", (rows,), torch.int64, "ids", embeddings),
        )

    def encoder(self) -> nn.Module:
        return WindowEncoder(
            PatchTower(self.vision, self.image_processor, self.positions),
            PatchMerger(self.vision, self.text.hidden_size),
        )


ARCHITECTURE = Qwen25VL
