"""One generation loop over any runtime of an image-text decoder: encode pictures, embed text, prefill, decode.

Shape suffixes: S tokens, D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphs.errors import UserError
from runtimes.base import Array, Caller

#: one stretch of a prompt: token ids, or what `vision_encoder` takes: raw pixels [1, 3, H, W] uint8, or several arrays
Segment = list[int] | np.ndarray[Any, np.dtype[np.uint8]] | tuple[Array, ...]

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


def embed(runtime: Caller, segments: Sequence[Segment]) -> tuple[Array, float, float]:
    """A prompt's embeddings [1, S, D], and the seconds spent on pictures and on text."""
    seconds = {"vision_encoder": 0.0, "token_embedding": 0.0}
    parts = []
    for segment in segments:
        is_text = isinstance(segment, list)
        method = "token_embedding" if is_text else "vision_encoder"
        start = time.perf_counter()
        given = segment if isinstance(segment, tuple) else (np.array([segment], np.int64) if is_text else segment,)
        parts += runtime.call(method, [np.asarray(array) for array in given])
        seconds[method] += time.perf_counter() - start
    return np.concatenate(parts, axis=1), seconds["vision_encoder"], seconds["token_embedding"]


def generate(
    runtime: Caller,
    segments: Sequence[Segment],
    *,
    context: int,
    stop: Sequence[int] = (),
    max_new_tokens: int = 128,
    choose: Sampler = greedy,
) -> Iterator[Generation]:
    """Yield the growing `Generation` after each token, until a token of `stop` (left out), the limit or a full context.

    Raises UserError for an empty prompt or one longer than `context`.
    """
    runtime.reset()
    embeds_1SD, vision_seconds, embed_seconds = embed(runtime, segments)
    length = embeds_1SD.shape[1]
    if length >= context:
        raise UserError(
            f"the prompt is {length} tokens long, pictures included; this bundle's context is {context}: shorten it, "
            "or export with a larger --max-context"
        )
    state = Generation(length, vision_seconds, embed_seconds)
    position = np.arange(length, dtype=np.int64)
    while True:
        start = time.perf_counter()
        (logits_1SV,) = runtime.call("text_decoder", [embeds_1SD, position])
        token = choose(logits_1SV[0, -1])
        seconds = time.perf_counter() - start
        if state.tokens:
            state.decode_seconds.append(seconds)
        else:
            state.prefill_seconds = seconds
        if token in stop:
            yield state
            return
        state.tokens.append(token)
        yield state
        position = position[-1:] + 1
        if len(state.tokens) >= max_new_tokens or position[0] >= context:
            return
        (embeds_1SD,) = runtime.call("token_embedding", [np.array([[token]], np.int64)])
