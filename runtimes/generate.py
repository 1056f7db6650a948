"""One generation loop over any runtime of an image-text decoder: encode pictures, embed text, prefill, decode.

Shape suffixes: S tokens, D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphs.dialogue import EMBEDDING, NO_ENCODER, VISION, Caller, Dialogue, Segment
from graphs.errors import UserError
from runtimes.base import Array

#: logits [V] of the next token to its id
Sampler = Callable[[Array], int]


def greedy(logits_V: Array) -> int:
    """The most likely token."""
    return int(logits_V.argmax())


def sampler(temperature: float, seed: int) -> Sampler:
    """Draw from the softmax at `temperature`, reproducibly; greedy at 0."""
    if temperature == 0:
        return greedy
    generator = np.random.default_rng(seed)

    def draw(logits_V: Array) -> int:
        scaled = logits_V.astype(np.float64) / temperature
        weights = np.exp(scaled - scaled.max())
        return int(generator.choice(len(weights), p=weights / weights.sum()))

    return draw


@dataclass
class Generation:
    """Tokens made so far and where the time went."""

    prompt_tokens: int
    vision_seconds: float = 0.0
    embed_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def first_token_seconds(self) -> float:
        """Time to the first token, pictures included."""
        return self.vision_seconds + self.embed_seconds + self.prefill_seconds


class Stopwatch:
    """A runtime with the seconds spent in each of its methods."""

    def __init__(self, runtime: Caller) -> None:
        self.runtime, self.signatures = runtime, runtime.signatures
        self.seconds: dict[str, float] = defaultdict(float)

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        start = time.perf_counter()
        outputs = self.runtime.call(method, inputs)
        self.seconds[method] += time.perf_counter() - start
        return outputs

    def reset(self) -> None:
        self.runtime.reset()


def check_length(length: int, read: int, context: int) -> None:
    """Raise UserError where a prompt has more tokens than an encoder reads, or where there is none, the context holds.

    Asked before a prompt is embedded, too: methods take no more than they were exported for.
    """
    if length > read:
        raise UserError(f"the prompt is {length} tokens long, pictures included; this bundle reads {read}")
    if read == NO_ENCODER and length >= context:
        raise UserError(
            f"the prompt is {length} tokens long, pictures included; this bundle's context is {context}: "
            "shorten it, or export with a larger --max-context"
        )


def generate(
    runtime: Caller,
    segments: Sequence[Segment],
    *,
    context: int,
    stop: Sequence[int] = (),
    max_new_tokens: int = 128,
    choose: Sampler = greedy,
    start: tuple[int, ...] = (),
) -> Iterator[Generation]:
    """Yield the growing `Generation` after each token, until a token of `stop` (left out), the limit or a full context.

    `start`: ids that an encoded answer begins with. Raises UserError for an empty prompt or one longer than `context`.
    """
    timed = Stopwatch(runtime)
    dialogue = Dialogue(timed, start)
    timed.reset()
    check_length(sum(len(s) for s in segments if isinstance(s, list)), dialogue.source_length, context)
    prompt = dialogue.embed(segments)
    check_length(prompt.length, dialogue.source_length, context)
    state = Generation(prompt.length, timed.seconds[VISION], timed.seconds[EMBEDDING])
    begin = time.perf_counter()
    logits_V = dialogue.prefill(prompt)
    while True:
        token = choose(logits_V)
        seconds = time.perf_counter() - begin
        if state.tokens:
            state.decode_seconds.append(seconds)
        else:
            state.prefill_seconds = seconds
        if token in stop:
            yield state
            return
        state.tokens.append(token)
        yield state
        if len(state.tokens) >= max_new_tokens or dialogue.position >= context:
            return
        begin = time.perf_counter()
        logits_V = dialogue.step(token)
