"""Pictures drawn by a model that writes them in codes: guided sampling of codes, then the picture that they stand for.

As Janus does (arXiv 2410.13848): two decoders read the prompt, one with its words left out, and the logits of the next
code are led away from that one (classifier-free guidance, Ho and Salimans, arXiv 2207.12598).
Shape suffixes: S tokens, D width, V codes to choose from.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from graphs.dialogue import DECODER, EMBEDDING, Caller
from graphs.preprocess.picture import Array
from runtimes.generate import Sampler, greedy

CODE_EMBEDDING, HEAD, DECODE = "image_token_embedding", "image_head", "image_decoder"
STATES = "hidden_states"


class Reader:
    """One decoder's reading: embeddings go in, logits [V] of the next code come out."""

    def __init__(self, caller: Caller) -> None:
        self.caller, self.position = caller, 0
        self.states = [spec.name for spec in caller.signatures[DECODER].outputs].index(STATES)
        caller.reset()

    def __call__(self, embeds_1SD: Array) -> Array:
        length = embeds_1SD.shape[1]
        positions = np.arange(self.position, self.position + length)
        states_1SD = self.caller.call(DECODER, [embeds_1SD, positions])[self.states]
        self.position += length
        (logits,) = self.caller.call(HEAD, [np.ascontiguousarray(states_1SD[:, -1:])])
        vector: Array = logits[0, -1]
        return vector


def blanked(prompt: Sequence[int], keep: Collection[int], pad: int) -> list[int]:
    """The prompt with its words left out: ids that are not in `keep` become `pad`."""
    return [token if token in keep else pad for token in prompt]


def draw(
    guided: Caller,
    free: Caller,
    prompt: Sequence[int],
    blank: Sequence[int],
    *,
    codes: int,
    guidance: float = 5.0,
    choose: Sampler = greedy,
) -> list[int]:
    """`codes` codes for `prompt`, led away from `blank`: by `guidance` times what the two differ in.

    `guided` and `free` are two instances of one bundle: each keeps the cache of its own prompt.
    """
    readers = Reader(guided), Reader(free)
    embeds = [guided.call(EMBEDDING, [np.array([ids], np.int64)])[0] for ids in (prompt, blank)]
    drawn: list[int] = []
    while True:
        toward_V, away_V = (read(part) for read, part in zip(readers, embeds, strict=True))
        drawn.append(choose(away_V + (toward_V - away_V) * guidance))
        if len(drawn) == codes:
            return drawn
        embeds = guided.call(CODE_EMBEDDING, [np.array([drawn[-1:]], np.int64)]) * 2


def picture(caller: Caller, codes: Sequence[int]) -> Image.Image:
    """The picture that all its codes stand for."""
    (pixels,) = caller.call(DECODE, [np.array([codes], np.int64)])
    return Image.fromarray(pixels[0].transpose(1, 2, 0).astype(np.uint8))
