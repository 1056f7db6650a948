"""InstructBLIP (Dai et al., arXiv 2305.06500): BLIP-2 whose Q-Former reads the instruction too.

So `vision_encoder` takes the instruction in the Q-Former's own vocabulary besides the pixels, a length of tokens from
call to call, and a picture's embeddings are those of one question. Weights in the layout of transformers'
InstructBlipForConditionalGeneration, which is that of the hub.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from graphs.architectures.blip2 import FLAN_T5_XL, FLAN_T5_XXL, TINY_QFORMER, TINY_TOWER, Blip2
from graphs.components.connectors.qformer import QFormerConfig
from graphs.components.image_text import VisionEncoder
from graphs.components.text.bert import BERT_BASE
from graphs.components.text.config import TextConfig
from graphs.components.text.t5 import T5Options
from graphs.components.vision.blip import EVA_GIANT
from graphs.preprocess.instructed import InstructedProcessor
from graphs.spec import Dim, TensorSpec, Variant

VICUNA_7B = TextConfig(4096, 11008, 32, 32, 32, 32001)
VICUNA_13B = TextConfig(5120, 13824, 40, 40, 40, 32001)
QFORMER = QFormerConfig(replace(BERT_BASE, vocab_size=30523), reads_text=True)


class InstructedEncoder(nn.Module):
    """Raw pixels [1, 3, H, W] uint8 and an instruction's ids [1, S] (int64) to image embeddings [1, Q, D]."""

    def __init__(self, plain: VisionEncoder) -> None:
        super().__init__()
        self.normalize, self.tower, self.projector = plain.normalize, plain.tower, plain.projector

    def forward(self, pixel_values: Tensor, qformer_input_ids: Tensor) -> Tensor:
        return self.projector(self.tower(self.normalize(pixel_values)), qformer_input_ids)


@dataclass(frozen=True)
class InstructBlip(Blip2):
    """Configuration of one InstructBLIP."""

    name = "instructblip"
    #: the Q-Former's networks for text are used here
    unused: ClassVar[tuple[str, ...]] = (*Blip2.unused[:1], *Blip2.unused[2:])

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        tiny_text = TextConfig(64, 128, 2, 4, 2, 256, max_position_embeddings=96)
        hub, t5 = "Salesforce/instructblip", T5Options(24)
        return (
            Variant("tiny", cls(TINY_TOWER, replace(TINY_QFORMER, reads_text=True), tiny_text, "llama")),
            Variant(
                "instructblip-flan-t5-xl",
                cls(EVA_GIANT, QFORMER, FLAN_T5_XL, "t5", t5),
                f"{hub}-flan-t5-xl",
                4_020_000_000,
            ),
            Variant(
                "instructblip-vicuna-7b",
                cls(EVA_GIANT, QFORMER, VICUNA_7B, "llama"),
                f"{hub}-vicuna-7b",
                7_910_000_000,
            ),
            Variant(
                "instructblip-flan-t5-xxl",
                cls(EVA_GIANT, QFORMER, FLAN_T5_XXL, "t5", t5),
                f"{hub}-flan-t5-xxl",
                12_300_000_000,
            ),
            Variant(
                "instructblip-vicuna-13b",
                cls(EVA_GIANT, QFORMER, VICUNA_13B, "llama"),
                f"{hub}-vicuna-13b",
                14_200_000_000,
            ),
        )

    @classmethod
    def reads_text(cls) -> bool:
        return True

    def encoder(self) -> nn.Module:
        plain = super().encoder()
        assert isinstance(plain, VisionEncoder)
        return InstructedEncoder(plain)

    def vision_inputs(self) -> tuple[TensorSpec, ...]:
        blocks = self.qformer.blocks
        length = Dim("instruction", 1, blocks.max_position_embeddings)
        ids = TensorSpec("qformer_input_ids", (1, length), torch.int64, "ids", blocks.vocab_size)
        return (*super().vision_inputs(), ids)

    @property
    def image_processor(self) -> InstructedProcessor:
        return InstructedProcessor(**vars(super().image_processor), length=self.qformer.blocks.max_position_embeddings)


ARCHITECTURE = InstructBlip
