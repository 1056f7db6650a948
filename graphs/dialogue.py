"""A prompt read, and its answer decoded, through the methods of a model: what every runtime and calibration do alike.

Methods are called by the names of their inputs: besides embeddings and positions, `text_decoder` gets whatever
`vision_encoder` or `text_encoder` gave under the same name (keys and values for cross-attention), carried from call to
call; what no picture gave is zeros of the smallest size. Where pictures are read by cross-attention alone,
`cross_span` [S, 2] says which of the carried keys, from and to, each token sees.
Shape suffixes: S tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from graphs.errors import UserError
from graphs.preprocess.picture import Array, Picture, View
from graphs.program import Signature
from graphs.spec import TensorSpec

VISION, EMBEDDING, ENCODER, DECODER = "vision_encoder", "token_embedding", "text_encoder", "text_decoder"

#: as many tokens as no prompt has: where no encoder bounds it
NO_ENCODER = 1 << 62


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


def counted(segments: Sequence[Segment]) -> dict[int, int]:
    """How many places each picture has in a prompt, by the identity of its first array; 0 where all are one place."""
    found: dict[int, int] = {}
    for view in (as_view(segment) for segment in segments if not isinstance(segment, list)):
        key, rope = id(view.picture.arrays[0]), view.picture.rope
        found[key] = max(found.get(key, 0), view.stop or (0 if rope is None else rope.shape[1]))
    return found


def kept(places: int, count: int) -> NDArray[np.int64]:
    """Which of a picture's places [M] the `count` embeddings have that a pass left of as many as there are places.

    At even distances, as the pass `thin` leaves them, whatever chose them: rules that choose by content do not say
    which they kept, and a prompt that reads a picture as several pieces gives each piece its share.
    """
    row = np.arange(count)
    return np.minimum(row * -(-places // max(1, count)), places - count + row)


@dataclass(frozen=True)
class Read:
    """A prompt as embeddings [1, S, D]: `images` [S] marks those of pictures; `rope` are its positions [3, S].

    `span`: the carried keys that each token sees, from and to. `ids`: those of the text, for encoders with words of
    their own.
    """

    embeds_1SD: Array
    images_S: NDArray[np.bool_]
    rope_3S: NDArray[np.int64]
    carried: Mapping[str, Array]
    span_S2: NDArray[np.int64]
    ids: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.embeds_1SD.shape[1]


def spans(length: int, places: Sequence[tuple[int, int, int]]) -> NDArray[np.int64]:
    """The carried keys [S, 2], from and to, that each of `length` tokens sees.

    `places`: pictures in order, each by its token and its keys, from and to. A token sees the picture before it, and
    with that those that stand directly before the picture; one before all pictures sees none (Llama 3.2 Vision).
    """
    found: NDArray[np.int64] = np.zeros((length, 2), np.int64)
    first = 0
    for index, (token, start, stop) in enumerate(places):
        first = first if index and places[index - 1][0] >= token - 1 else start
        found[token:] = first, stop
    return found


def absent(spec: TensorSpec) -> Array:
    """What the decoder gets where there is no picture: zeros, as few as it takes."""
    size = spec.size({dim.name: dim.min for dim in spec.dims})
    return np.zeros(size, torch.empty(0, dtype=spec.dtype).numpy().dtype)


@dataclass
class Dialogue:
    """One prompt at a time: `embed`, `prefill`, then `step` after `step`. `start`: ids that begin an encoded answer."""

    caller: Caller
    start: tuple[int, ...] = ()
    position: int = 0  # tokens in the decoder's cache
    rope: int = 0  # the next position where positions have three components
    span: tuple[int, ...] = (0, 0)  # the carried keys that the last token sees
    carried: dict[str, Array] = field(default_factory=dict)

    def embed(self, segments: Sequence[Segment]) -> Read:
        """Encode pictures, each once, and embed text. Raises UserError for an empty prompt, or too many pictures."""
        if self.start and ENCODER not in self.caller.signatures:
            segments = [list(self.start), *segments]
        parts: list[Array] = []
        images: list[NDArray[np.bool_]] = []
        ropes: list[NDArray[np.int64]] = []
        given: dict[str, list[Array]] = {}
        seen: dict[int, Array | None] = {}
        extents: dict[int, tuple[int, int]] = {}  # the carried keys of a picture
        places: list[tuple[int, int, int]] = []  # of pictures read by cross-attention: token, and the extent
        position = 0
        counts = counted(segments)
        for segment in segments:
            after = 0
            if isinstance(segment, list):
                embeds, is_image = self.tokens(segment), False
                rope = np.arange(embeds.shape[1])
            else:
                view = as_view(segment)
                key = id(view.picture.arrays[0])
                if key not in seen:
                    outputs = self.outputs(VISION, view.picture.arrays)
                    seen[key] = outputs.pop("image_embeds", None)
                    end = max((stop for _, stop in extents.values()), default=0)
                    extents[key] = end, end + max((value.shape[-2] for value in outputs.values()), default=0)
                    for name, value in outputs.items():
                        given.setdefault(name, []).append(value)
                whole, is_image = seen[key], seen[key] is not None
                if whole is None:  # pictures are read by cross-attention: the prompt has but a token for each
                    places.append((sum(part.shape[1] for part in parts), *extents[key]))
                    if view.token is None:
                        continue  # or none: the prompt does not mention the picture
                    whole = self.tokens([view.token])
                rows = kept(max(counts[key], whole.shape[1]), whole.shape[1])
                here = (rows >= view.start) & (rows < (1 + rows[-1] if view.stop is None else view.stop))
                embeds = whole[:, here]
                known = view.picture.rope if is_image else None
                rope = np.arange(embeds.shape[1]) if known is None else known[:, rows[here]]
                if known is not None:  # text goes on behind what a pass has dropped, too
                    after = position + int(known[:, view.start : view.stop].max()) + 1
            parts.append(embeds)
            images.append(np.full(embeds.shape[1], is_image))
            ropes.append(np.broadcast_to(rope + position, (3, embeds.shape[1])))
            position = after or (int(ropes[-1].max()) + 1 if embeds.shape[1] else position)
        if not parts:
            raise UserError("the prompt is empty")
        carried = {name: np.concatenate(values, axis=-2) for name, values in given.items()}
        self.check_carried({name: len(values) for name, values in given.items()}, carried)
        whole_1SD = np.concatenate(parts, 1)
        span_S2 = spans(whole_1SD.shape[1], places)
        ids = tuple(token for segment in segments if isinstance(segment, list) for token in segment)
        return Read(whole_1SD, np.concatenate(images), np.concatenate(ropes, 1), carried, span_S2, ids)

    def check_carried(self, pictures: Mapping[str, int], carried: Mapping[str, Array]) -> None:
        """Raise UserError where pictures give more keys together than a method takes; their number by output's name."""
        readers = [self.caller.signatures[name] for name in (ENCODER, DECODER) if name in self.caller.signatures]
        for spec in (spec for signature in readers for spec in signature.inputs if spec.name in carried):
            size, found = spec.shape[-2], carried[spec.name].shape[-2]
            most = size if isinstance(size, int) else size.max
            if found > most:
                fit = most * pictures[spec.name] // found
                raise UserError(f"the prompt has {pictures[spec.name]} pictures; this model reads {fit} at the most")

    def prefill(self, prompt: Read) -> Array:
        """The logits [V] of the token after the prompt, read by a decoder whose cache is empty."""
        self.carried, self.position, self.rope = dict(prompt.carried), 0, 0
        self.span = (0, 0)
        if ENCODER not in self.caller.signatures:
            return self.decode(prompt.embeds_1SD, prompt.rope_3S, prompt.span_S2)
        known = {"inputs_embeds": prompt.embeds_1SD, "input_ids": np.array([prompt.ids], np.int64), **prompt.carried}
        self.carried |= self.outputs(ENCODER, self.inputs(ENCODER, known))
        return self.step(*self.start)

    def step(self, *tokens: int) -> Array:
        """The logits [V] after the given tokens."""
        rope = np.broadcast_to(np.arange(len(tokens)) + self.rope, (3, len(tokens)))
        return self.decode(self.tokens(list(tokens)), rope)

    def decode(self, embeds_1SD: Array, rope_3S: NDArray[np.int64], span_S2: NDArray[np.int64] | None = None) -> Array:
        """The logits [V] after embeddings that follow those in the cache; without a span, they see as the last did."""
        length = embeds_1SD.shape[1]
        span_S2 = np.tile(np.array(self.span, np.int64), (length, 1)) if span_S2 is None else span_S2
        known = {
            "inputs_embeds": embeds_1SD,
            "cache_position": np.arange(self.position, self.position + length),
            "rope_position": np.ascontiguousarray(rope_3S),
            "cross_span": span_S2,
            **self.carried,
        }
        logits_1SV = self.caller.call(DECODER, self.inputs(DECODER, known))[0]
        self.position, self.rope = self.position + length, int(rope_3S.max()) + 1
        self.span = tuple(span_S2[-1].tolist())
        vector: Array = logits_1SV[0, -1]
        return vector

    @property
    def source_length(self) -> int:
        """The most tokens that the encoder reads; `NO_ENCODER` where the decoder reads the prompt itself."""
        if ENCODER not in self.caller.signatures:
            return NO_ENCODER
        length = self.caller.signatures[ENCODER].inputs[0].shape[1]
        return length if isinstance(length, int) else length.max

    def inputs(self, method: str, known: Mapping[str, Array]) -> list[Array]:
        """What a method takes, by name; zeros for what is not known."""
        wanted = self.caller.signatures[method].inputs
        return [known[spec.name] if spec.name in known else absent(spec) for spec in wanted]

    def tokens(self, ids: list[int]) -> Array:
        """Embeddings [1, S, D] of token ids."""
        return self.caller.call(EMBEDDING, [np.array([ids], np.int64)])[0]

    def outputs(self, method: str, inputs: Sequence[Array]) -> dict[str, Array]:
        """A method's outputs by name."""
        specs = self.caller.signatures[method].outputs
        values = self.caller.call(method, [np.asarray(array) for array in inputs])
        return {spec.name: value for spec, value in zip(specs, values, strict=True)}
