"""LLaVA-NeXT, also LLaVA 1.6 (https://llava-vl.github.io/blog/2024-01-30-llava-next): LLaVA 1.5 over tiles.

Tiling, unpadding and newlines depend on the picture's size alone: preprocessing computes them and feeds tiles and the
rows to take, both of dynamic length; the graph encodes tiles and gathers. Weights in the layouts that transformers has
written (`vision_tower.*`, `multi_modal_projector.*`, `language_model.*`, `image_newline`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from graphs.architectures.llava_1_5 import Llava
from graphs.components.image_text import VisionEncoder
from graphs.components.text.config import TextConfig
from graphs.components.vision.clip import CLIP_LARGE_336, ClipVisionConfig
from graphs.config import ConfigReader
from graphs.preprocess.image import MAX_SIDE
from graphs.preprocess.prompt import PromptTemplate
from graphs.preprocess.tiling import TilingProcessor
from graphs.spec import Dim, TensorSpec, Variant
from graphs.weights import Source

#: resolutions (height, width) where a config.json names none
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

#: up to 2928 tokens a picture leave no room in the usual context
MAX_CONTEXT = 4096

VICUNA = PromptTemplate(
    system=(
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. "
    ),
    user="USER: ",
    assistant=" ASSISTANT:",
)
MISTRAL = PromptTemplate(user="[INST] ", assistant=" [/INST]")
CHATML = PromptTemplate(
    system="<|im_start|>system\nAnswer the questions.<|im_end|>",
    user="<|im_start|>user\n",
    assistant="<|im_end|><|im_start|>assistant\n",
)

#: how a conversation reads, by the decoder's family
DIALECTS: Mapping[str, PromptTemplate] = {"vicuna": VICUNA, "mistral": MISTRAL, "yi": CHATML}

YI_VOCABULARY = 64000  # a LLaMA to its config.json, told by its vocabulary


class TiledEncoder(nn.Module):
    """Tiles [P, 3, S, S] uint8 and rows to take [M] to image embeddings [1, M, D].

    Row 0 is the newline, then follow the embeddings of each tile in turn.
    """

    def __init__(self, tile: VisionEncoder, width: int) -> None:
        super().__init__()
        self.normalize, self.tower, self.projector = tile.normalize, tile.tower, tile.projector
        self.image_newline = nn.Parameter(torch.zeros(width))

    def forward(self, pixel_values: Tensor, packing: Tensor) -> Tensor:
        tiles_PND = self.projector(self.tower(self.normalize(pixel_values)))
        rows_RD = torch.cat([self.image_newline.unsqueeze(0), tiles_PND.reshape(-1, self.image_newline.shape[0])])
        return rows_RD.index_select(0, packing).unsqueeze(0)


@dataclass(frozen=True)
class LlavaNext(Llava):
    """Configuration of one LLaVA-NeXT.

    `pinpoints`: the resolutions (height, width) that pictures are fitted to. `dialect`: a name in `DIALECTS`.
    """

    name = "llava_next"

    pinpoints: tuple[tuple[int, int], ...] = PINPOINTS
    dialect: str = "vicuna"
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        vicuna_7b = TextConfig(4096, 11008, 32, 32, 32, 32064, 4096, rms_norm_eps=1e-5)
        vicuna_13b = TextConfig(5120, 13824, 40, 40, 40, 32064, 4096, rms_norm_eps=1e-5)
        mistral = TextConfig(4096, 14336, 32, 32, 8, 32064, 32768, rms_norm_eps=1e-5, rope_theta=1e6)
        yi_34b = TextConfig(7168, 20480, 60, 56, 8, 64064, 4096, rms_norm_eps=1e-5, rope_theta=5e6)
        tiny_vision = ClipVisionConfig(64, 128, 3, 4, 24, 8)
        tiny_text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=160)
        pinpoints = ((24, 48), (48, 24), (48, 48))
        hub = "llava-hf/llava-v1.6"
        return (
            Variant("tiny", cls(tiny_vision, tiny_text, pinpoints=pinpoints)),
            Variant("llava-v1.6-vicuna-7b", cls(CLIP_LARGE_336, vicuna_7b), f"{hub}-vicuna-7b-hf", 7_060_000_000),
            Variant(
                "llava-v1.6-mistral-7b",
                cls(CLIP_LARGE_336, mistral, dialect="mistral"),
                f"{hub}-mistral-7b-hf",
                7_570_000_000,
            ),
            Variant("llava-v1.6-vicuna-13b", cls(CLIP_LARGE_336, vicuna_13b), f"{hub}-vicuna-13b-hf", 13_350_000_000),
            Variant("llava-v1.6-34b", cls(CLIP_LARGE_336, yi_34b, dialect="yi"), f"{hub}-34b-hf", 34_750_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        reader = ConfigReader(config)
        if "hidden_size" in reader and "text_config" not in reader:
            raise reader.error("the original layout of LLaVA 1.6; only those of llava-hf's checkpoints can be read")
        # Here `do_pad` fills up batches with empty tiles, which changes no picture.
        given = {**preprocessor, "do_pad": False} if preprocessor else None
        found = cls.from_hub(reader, given)
        side, patches = found.vision.image_size, found.vision.grid**2
        if found.vision.tokens - found.drop_first != patches:
            raise reader.error(
                f"a tile becomes {found.vision.tokens - found.drop_first} tokens, which are not {patches} in a square: "
                "choose another vision_feature_select_strategy"
            )
        mistral = reader.section("text_config").values.get("model_type") == "mistral"
        dialect = "mistral" if mistral else "yi" if found.text.vocab_size >= YI_VOCABULARY else "vicuna"
        return replace(found, pinpoints=read_pinpoints(reader, side), dialect=dialect)

    @property
    def tiling(self) -> TilingProcessor:
        """How pictures become tiles."""
        return TilingProcessor.of(self.processor, self.vision.image_size, self.vision.grid, self.pinpoints)

    @property
    def visual_tokens(self) -> int:
        """The most image embeddings that one picture becomes."""
        return self.tiling.most_tokens

    def encoder(self) -> nn.Module:
        tile = super().encoder()
        assert isinstance(tile, VisionEncoder)
        return TiledEncoder(tile, self.text.hidden_size)

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        side, (fewest, most) = self.vision.image_size, self.tiling.tiles
        tiles = Dim("tiles", fewest, most) if fewest < most else most
        rows = Dim("visual_tokens", 1, self.visual_tokens)
        return (
            TensorSpec("pixel_values", (tiles, 3, side, side), torch.uint8, "pixels"),
            TensorSpec("packing", (rows,), torch.int64, "ids", fewest * self.vision.grid**2 + 1),
        )

    def image_embeds(self) -> TensorSpec:
        return TensorSpec("image_embeds", (1, Dim("visual_tokens", 1, self.visual_tokens), self.text.hidden_size))

    def source(self, parameter: str) -> Source:
        if parameter == "vision_encoder.image_newline":
            return Source("image_newline")
        return super().source(parameter)

    @property
    def image_processor(self) -> TilingProcessor:
        return self.tiling

    @property
    def template(self) -> PromptTemplate:
        return DIALECTS[self.dialect]


def read_pinpoints(config: ConfigReader, side: int) -> tuple[tuple[int, int], ...]:
    """The resolutions of `image_grid_pinpoints`, which must be whole tiles of `side` pixels. Raises: UserError."""
    given = config.values.get("image_grid_pinpoints")
    given = [list(pair) for pair in PINPOINTS] if given is None else given

    def whole(pair: object) -> bool:
        if not isinstance(pair, list) or len(pair) != 2:
            return False
        return all(isinstance(n, int) and 0 < n <= MAX_SIDE and n % side == 0 for n in pair)

    if not isinstance(given, list) or not given or not all(map(whole, given)):
        raise config.error(f"image_grid_pinpoints must be pairs of multiples of the tower's image_size, {side}")
    return tuple((height, width) for height, width in given)


ARCHITECTURE = LlavaNext
