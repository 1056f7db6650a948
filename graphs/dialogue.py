"""A prompt read, and its answer decoded, through the methods of a model: what every runtime and calibration do alike.

Methods are called by the names of their inputs: besides embeddings and positions, `text_decoder` gets whatever
`vision_encoder` or `text_encoder` gave under the same name (keys and values for cross-attention), carried from call to
call.
Shape suffixes: S tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from graphs.errors import UserError
from graphs.preprocess.picture import Array, Picture, View
from graphs.program import Signature

VISION, EMBEDDING, ENCODER, DECODER = "vision_encoder", "token_embedding", "text_encoder", "text_decoder"


class Caller(Protocol):
    """Methods that can be called; a stateful one continues from its last call until `reset`."""

    @property
    def signatures(self) -> Mapping[str, Signature]:
        """What each method takes and gives."""
        ...

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        """Arrays in the order, shapes and dtypes of the method's signature, in and out."""
        ...

    def reset(self) -> None:
        """Forget all state: the next call of a stateful method is the first."""
        ...


#: one stretch of a prompt: token ids, or (part of) a picture; arrays are what `vision_encoder` takes of a whole one
Segment = list[int] | View | Array | tuple[Array, ...]


def as_view(segment: View | Array | tuple[Array, ...]) -> View:
    """Bare arrays as the whole of a picture."""
    if isinstance(segment, View):
        return segment
    return View(Picture(segment if isinstance(segment, tuple) else (segment,)))


@dataclass(frozen=True)
class Read:
    """A prompt as embeddings [1, S, D]: `images` [S] marks those of pictures; `rope` are its positions [3, S]."""

    embeds_1SD: Array
    images_S: NDArray[np.bool_]
    rope_3S: NDArray[np.int64]
    carried: Mapping[str, Array]

    @property
    def length(self) -> int:
        return self.embeds_1SD.shape[1]


@dataclass
class Dialogue:
    """One prompt at a time: `embed`, `prefill`, then `step` after `step`. `start`: ids that begin an encoded answer."""

    caller: Caller
    start: tuple[int, ...] = ()
    position: int = 0  # tokens in the decoder's cache
    rope: int = 0  # the next position where positions have three components
    carried: dict[str, Array] = field(default_factory=dict)

    def embed(self, segments: Sequence[Segment]) -> Read:
        """Encode pictures, each once, and embed text. Raises UserError for an empty prompt."""
        parts: list[Array] = []
        images: list[NDArray[np.bool_]] = []
        ropes: list[NDArray[np.int64]] = []
        given: dict[str, list[Array]] = {}
        seen: dict[int, Array | None] = {}
        position = 0
        for segment in segments:
            if isinstance(segment, list):
                embeds, is_image = self.tokens(segment), False
                rope = np.arange(embeds.shape[1])
            else:
                view = as_view(segment)
                key = id(view.picture.arrays[0])
                if key not in seen:
                    outputs = self.outputs(VISION, view.picture.arrays)
                    seen[key] = outputs.pop("image_embeds", None)
                    for name, value in outputs.items():
                        given.setdefault(name, []).append(value)
                whole, is_image = seen[key], seen[key] is not None
                if whole is None:  # pictures are read by cross-attention: the prompt has but a token for each
                    assert view.token is not None
                    whole = self.tokens([view.token])
                embeds = whole[:, view.start : view.stop]
                known = view.picture.rope if is_image else None
                rope = np.arange(embeds.shape[1]) if known is None else known[:, view.start : view.stop]
            parts.append(embeds)
            images.append(np.full(embeds.shape[1], is_image))
            ropes.append(np.broadcast_to(rope + position, (3, embeds.shape[1])))
            position = int(ropes[-1].max()) + 1 if embeds.shape[1] else position
        if not parts:
            raise UserError("the prompt is empty")
        carried = {name: np.concatenate(values, axis=-2) for name, values in given.items()}
        return Read(np.concatenate(parts, 1), np.concatenate(images), np.concatenate(ropes, 1), carried)

    def prefill(self, prompt: Read) -> Array:
        """The logits [V] of the token after the prompt, read by a decoder whose cache is empty."""
        self.carried, self.position, self.rope = dict(prompt.carried), 0, 0
        if ENCODER not in self.caller.signatures:
            return self.decode(prompt.embeds_1SD, prompt.rope_3S)
        self.carried |= self.outputs(ENCODER, (prompt.embeds_1SD,))
        return self.step(*self.start)

    def step(self, *tokens: int) -> Array:
        """The logits [V] after the given tokens."""
        rope = np.broadcast_to(np.arange(len(tokens)) + self.rope, (3, len(tokens)))
        return self.decode(self.tokens(list(tokens)), rope)

    def decode(self, embeds_1SD: Array, rope_3S: NDArray[np.int64]) -> Array:
        """The logits [V] after embeddings that follow those in the cache."""
        length = embeds_1SD.shape[1]
        known = {
            "inputs_embeds": embeds_1SD,
            "cache_position": np.arange(self.position, self.position + length),
            "rope_position": np.ascontiguousarray(rope_3S),
            **self.carried,
        }
        inputs = [known[spec.name] for spec in self.caller.signatures[DECODER].inputs]
        logits_1SV = self.caller.call(DECODER, inputs)[0]
        self.position, self.rope = self.position + length, int(rope_3S.max()) + 1
        vector: Array = logits_1SV[0, -1]
        return vector

    def tokens(self, ids: list[int]) -> Array:
        """Embeddings [1, S, D] of token ids."""
        return self.caller.call(EMBEDDING, [np.array([ids], np.int64)])[0]

    def outputs(self, method: str, inputs: Sequence[Array]) -> dict[str, Array]:
        """A method's outputs by name."""
        specs = self.caller.signatures[method].outputs
        values = self.caller.call(method, [np.asarray(array) for array in inputs])
        return {spec.name: value for spec, value in zip(specs, values, strict=True)}
