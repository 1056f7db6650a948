"""SlowFast-LLaVA (Xu et al., arXiv 2407.15841): videos through a LLaVA-NeXT that never saw any, by pooling alone.

Frames are encoded as plain pictures, not as tiles; a few keep half of their embeddings, all keep a few means. Which
frames is known when a video is read: preprocessing samples and says so. Weights are those of LLaVA-NeXT, in the layouts
of transformers or in the original one (see `graphs.architectures.llava_1_5`), its newline unused. The authors' code
scales rotary positions "dynamically", which changes nothing within the decoder's own context, and no bundle has more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from graphs.architectures.llava_1_5 import Llava
from graphs.architectures.llava_next import YI_VOCABULARY
from graphs.components.connectors.slow_fast import SlowFastPool
from graphs.components.image_text import VisionEncoder
from graphs.components.text.config import TextConfig
from graphs.components.vision.clip import CLIP_LARGE_336, ClipVisionConfig
from graphs.config import ConfigReader
from graphs.preprocess.image import ImageProcessor
from graphs.preprocess.prompt import PromptTemplate
from graphs.preprocess.slow_fast import SlowFastProcessor
from graphs.spec import Dim, TensorSpec, Variant

#: up to 3680 embeddings of a video, and a question
MAX_CONTEXT = 4096

ASKED = (
    "\nThe input consists of a sequence of key frames from a video. Answer concisely with overall content and context "
    "of the video, highlighting any significant events, characters, or objects that appear throughout the video. "
    "Question: "
)
VICUNA = PromptTemplate(
    user="USER: ", image_separator="", question=ASKED, assistant=" \nASSISTANT:\nAnswer: In the video,"
)
CHATML = PromptTemplate(
    system="<|im_start|>system\n Answer the question. <|im_end|>\n",
    user="<|im_start|>user\n ",
    image_separator="",
    question=ASKED,
    assistant=" <|im_end|>\n<|im_start|>assistant\nAnswer: In the video,",
)


class VideoEncoder(nn.Module):
    """Frames [T, 3, S, S] uint8 and which are seen in detail [L] to a video's embeddings [1, M, D]."""

    def __init__(self, frame: VisionEncoder, pool: SlowFastPool) -> None:
        super().__init__()
        self.normalize, self.tower, self.projector = frame.normalize, frame.tower, frame.projector
        self.pool = pool

    def forward(self, pixel_values: Tensor, slow_frames: Tensor) -> Tensor:
        return self.pool(self.projector(self.tower(self.normalize(pixel_values))), slow_frames)


@dataclass(frozen=True)
class SlowFastLlava(Llava):
    """Configuration of one SlowFast-LLaVA.

    `frames`: the most of a video. `slow`: how many are seen in detail. `fast_side`: means along the side of a frame.
    """

    name = "slowfast_llava"
    unused: ClassVar[tuple[str, ...]] = (*Llava.unused, "image_newline")

    frames: int = 50
    slow: int = 10
    fast_side: int = 4
    max_context: int = MAX_CONTEXT

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        vicuna_7b = TextConfig(4096, 11008, 32, 32, 32, 32000, 4096, rms_norm_eps=1e-5)
        yi_34b = TextConfig(7168, 20480, 60, 56, 8, 64000, 4096, rms_norm_eps=1e-5, rope_theta=5e6)
        tiny_vision = ClipVisionConfig(64, 128, 3, 4, 40, 8)
        tiny_text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=160)
        hub = "liuhaotian/llava-v1.6"
        return (
            Variant("tiny", cls(tiny_vision, tiny_text, frames=6, slow=3, fast_side=2)),
            Variant("sf-llava-7b", cls(CLIP_LARGE_336, vicuna_7b), f"{hub}-vicuna-7b", 7_060_000_000),
            Variant("sf-llava-34b", cls(CLIP_LARGE_336, yi_34b), f"{hub}-34b", 34_750_000_000),
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> Self:
        # How LLaVA-NeXT would cut pictures into tiles does not matter: frames are stretched to the tower's square.
        given = {**preprocessor, "do_pad": False} if preprocessor else None
        ratio = {"image_aspect_ratio": "square"} if "image_aspect_ratio" in config else {}
        found = super().from_config({**config, **ratio}, given)
        tokens, patches = found.vision.tokens - found.drop_first, found.vision.grid**2
        if tokens != patches:
            raise ConfigReader(config).error(
                f"a frame becomes {tokens} tokens, which are not {patches} in a square: "
                "choose another vision_feature_select_strategy"
            )
        return replace(found, fast_side=min(cls.fast_side, found.vision.grid))

    @property
    def pool(self) -> SlowFastPool:
        """The two pathways."""
        return SlowFastPool(self.vision.grid, self.fast_side)

    @property
    def visual_tokens(self) -> int:
        """The most embeddings that a video becomes."""
        return self.slow * (self.vision.grid**2 // 2) + self.frames * self.fast_side**2

    def encoder(self) -> nn.Module:
        frame = super().encoder()
        assert isinstance(frame, VisionEncoder)
        return VideoEncoder(frame, self.pool)

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        side, frames = self.vision.image_size, Dim("frames", 1, self.frames)
        return (
            TensorSpec("pixel_values", (frames, 3, side, side), torch.uint8, "pixels"),
            TensorSpec("slow_frames", (self.slow,), torch.int64, "ids", 1),
        )

    def image_embeds(self) -> TensorSpec:
        fewest = self.visual_tokens - (self.frames - 1) * self.fast_side**2
        return TensorSpec("image_embeds", (1, Dim("visual_tokens", fewest, self.visual_tokens), self.text.hidden_size))

    @property
    def image_processor(self) -> SlowFastProcessor:
        like, side = self.processor or ImageProcessor(), self.vision.image_size
        square = replace(like, shortest_edge=None, height=side, width=side, crop_size=None, aspect_ratio="crop")
        return SlowFastProcessor(**asdict(square), frames=self.frames, slow=self.slow)

    @property
    def template(self) -> PromptTemplate:
        return CHATML if self.text.vocab_size >= YI_VOCABULARY else VICUNA


ARCHITECTURE = SlowFastLlava
