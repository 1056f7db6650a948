"""What every contender is asked to do: sizes, token ids and a picture, the same for all, from fixed seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

THREADS = 2
PREFILL = 160  # tokens of the prompt
DECODE = 64  # tokens read one at a time after it
WORDS = 16  # tokens that follow the picture's where the time to the first token is measured
CONTEXT = 512  # tokens that every cache has room for

#: what is measured: in this order, since decoding goes on from the prompt that prefill has read
MEASURES = ("prefill", "decode", "vision", "ttft")


def token_ids(count: int, seed: int) -> list[int]:
    """Ids that every vocabulary has, past the special ones."""
    found: list[int] = np.random.default_rng(seed).integers(3, 256, count).tolist()
    return found


def prompt_ids() -> list[int]:
    """The prompt."""
    return token_ids(PREFILL, 1)


def next_ids() -> list[int]:
    """What is read after the prompt, whatever the model would have said: the same work for everyone."""
    return token_ids(DECODE, 2)


def question_ids() -> list[int]:
    """What follows the picture."""
    return token_ids(WORDS, 3)


def picture(side: int, seed: int = 4) -> NDArray[np.uint8]:
    """[side, side, 3]: patches of even colour with a fifth of noise."""
    draw = np.random.default_rng(seed)
    coarse = np.kron(draw.random((8, 8, 3)), np.ones((-(-side // 8), -(-side // 8), 1)))[:side, :side]
    mixed = 0.8 * coarse + 0.2 * draw.random((side, side, 3))
    return (255 * mixed).astype(np.uint8)
