"""PaliGemma 2 (Steiner et al., arXiv 2412.03555): PaliGemma over Gemma 2 decoders of three sizes.

The graph around the decoder is PaliGemma's, so its class is too; the decoder has norms on both sides of its parts,
capped scores and logits, and a window in every other layer, beside which a prefix is still seen whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from graphs.architectures.paligemma import TINY_SIZES, TINY_VISION, PaliGemma
from graphs.components.text.config import GEMMA2, TextConfig
from graphs.spec import Variant


def gemma2(width: int, inner: int, layers: int, heads: int, groups: int, head: int, scalar: int) -> TextConfig:
    """A Gemma 2 with PaliGemma's vocabulary."""
    return replace(
        GEMMA2,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=257216,
        head_dim=head,
        attention_scale=scalar**-0.5,
        full_layers=tuple(range(1, layers, 2)),
        embedding_scale=width**0.5,
        prefix=True,
    )


GEMMA2_2B = gemma2(2304, 9216, 26, 8, 4, 256, 256)
GEMMA2_9B = gemma2(3584, 14336, 42, 16, 8, 256, 256)
GEMMA2_27B = gemma2(4608, 36864, 46, 32, 16, 128, 144)


@dataclass(frozen=True)
class PaliGemma2(PaliGemma):
    """Configuration of one PaliGemma 2."""

    name = "paligemma2"

    @classmethod
    def variants(cls) -> tuple[Variant, ...]:
        tiny = replace(
            GEMMA2, num_hidden_layers=2, num_key_value_heads=2, sliding_window=40, full_layers=(1,), **TINY_SIZES
        )
        hub = "google/paligemma2"
        sizes = (
            ("3b", GEMMA2_2B, 3_030_000_000),
            ("10b", GEMMA2_9B, 9_660_000_000),
            ("28b", GEMMA2_27B, 27_700_000_000),
        )
        return (
            Variant("tiny", cls(TINY_VISION, tiny)),
            *(
                Variant(f"paligemma2-{size}-{side}", cls.sized(side, text), f"{hub}-{size}-pt-{side}", parameters)
                for size, text, parameters in sizes
                for side in (224, 448, 896)
            ),
            Variant("paligemma2-3b-mix-224", cls.sized(224, GEMMA2_2B), f"{hub}-3b-mix-224", sizes[0][2]),
        )


ARCHITECTURE = PaliGemma2
