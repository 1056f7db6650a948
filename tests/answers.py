"""What a traced model answers, in the shape that transformers' classes give it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from graphs.dialogue import Dialogue, Segment
from runtimes.base import Caller
from runtimes.generate import generate


def all_logits(runtime: Caller, pieces: Sequence[Segment]) -> Tensor:
    """The logits [1, S, V] of every token of a prompt read in one call."""
    embeds = Dialogue(runtime).embed(pieces).embeds_1SD
    runtime.reset()
    logits, *_ = runtime.call("text_decoder", [embeds, np.arange(embeds.shape[1])])
    return torch.from_numpy(logits)


def greedy_tokens(runtime: Caller, pieces: Sequence[Segment], context: int, count: int) -> list[int]:
    """`count` tokens of a greedy answer."""
    *_, last = generate(runtime, pieces, context=context, max_new_tokens=count)
    return last.tokens
