"""A prompt and its answer as calls of a model's methods, rehearsed before any method is run.

Methods run one after the other, each on the calls of all prompts (`calibration/sweep.py`). What a method will be called
with is found by going through a conversation with the outputs that are known by then: calls of those methods are right,
and later ones are gone through again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from calibration.sweep import Call, Labels, Sweep
from graphs.dialogue import DECODER, EMBEDDING, ENCODER, VISION, Dialogue, Read, absent
from graphs.preprocess.picture import Array, View
from graphs.preprocess.prompt import Piece
from graphs.program import Program, Signature

#: what a method gives of inputs, or arrays of the shapes that it would give
Run = Callable[[Sequence[Array]], list[Array]]


@dataclass
class Conversation:
    """One prompt. A `Caller`: methods with `outputs`, by the order of their calls, answer; the others pretend to.

    `pieces`: ids and pictures in turn. `answer`: the ids that follow it. `embed` is `token_embedding`, `see` gives
    the shapes of `vision_encoder`. `calls`: those of the last rehearsal.
    """

    pieces: Sequence[Piece]
    answer: list[int]
    start: tuple[int, ...]
    signatures: Mapping[str, Signature]
    embed: Run
    see: Run
    outputs: dict[str, list[list[Array]]] = field(default_factory=dict)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        """Take down a call; its outputs where they are known."""
        labels: Labels = {"image" if method == VISION else "text": torch.arange(1)}
        if method in (ENCODER, DECODER):
            labels, self.labels = self.labels or labels, {}
        given = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs)
        calls = self.calls.setdefault(method, [])
        calls.append(Call(given, labels))
        known = self.outputs.get(method, [])
        if len(calls) <= len(known):
            return known[len(calls) - 1]
        if method == EMBEDDING:
            return self.embed(list(map(Tensor.numpy, given)))
        if method == VISION:
            return self.see(list(map(Tensor.numpy, given)))
        return [absent(spec) for spec in self.signatures[method].outputs]

    def reset(self) -> None:
        """State is the sweep's."""

    def read(self, dialogue: Dialogue) -> Read:
        """The prompt's embeddings, as far as they are known. Raises UserError where the model cannot read it."""
        self.calls = {}
        return dialogue.embed(self.pieces)

    def rehearse(self) -> None:
        """Go through it all, to take down the calls."""
        dialogue = Dialogue(self, self.start)
        seen = self.read(dialogue)
        named = {"image": seen.images_S, "text": ~seen.images_S}
        self.labels = {name: torch.from_numpy(where.nonzero()[0]) for name, where in named.items() if where.any()}
        dialogue.prefill(seen)
        for token in self.answer:
            dialogue.step(token)

    @property
    def images(self) -> int:
        """How many pictures the prompt has."""
        return len({id(piece.picture) for piece in self.pieces if isinstance(piece, View)})

    def length(self) -> int:
        """How many tokens the prompt has."""
        return self.read(Dialogue(self, self.start)).length

    def tokens(self) -> dict[str, int]:
        """Positions that encoder and decoder see, by modality."""
        found = {"image": 0, "text": 0}
        for call in (*self.calls.get(ENCODER, ()), *self.calls.get(DECODER, ())):
            for name, positions in call.labels.items():
                found[name] += len(positions)
        return found


def numbers(outputs: Sequence[Tensor]) -> list[Array]:
    """A method's outputs as arrays."""
    return [output.numpy() for output in outputs]


class Pretended:
    """The vision encoder before it has run: zeros of the shapes that it gives, found by fake tensors."""

    def __init__(self, program: Program) -> None:
        self.program, self.shapes = program, dict[tuple[torch.Size, ...], list[Array]]()
        self.sweep: Sweep | None = None

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        given = tuple(map(torch.from_numpy, inputs))
        key = tuple(tensor.shape for tensor in given)
        if key not in self.shapes:
            self.sweep = self.sweep or Sweep(self.program, VISION)
            specs = self.program.methods[VISION].signature.outputs
            made = self.sweep.shapes(given)
            self.shapes[key] = [torch.zeros(s, dtype=spec.dtype).numpy() for s, spec in zip(made, specs, strict=True)]
        return self.shapes[key]


class Embedded:
    """Token embeddings, computed at once: whatever a conversation goes on with is made of them."""

    def __init__(self, program: Program) -> None:
        module = program.module(EMBEDDING)
        assert isinstance(module, fx.GraphModule)
        self.interpreter = fx.Interpreter(module)  # which takes prompts that are too long, too

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        found = self.interpreter.run(*map(torch.from_numpy, inputs))
        return numbers(found if isinstance(found, (tuple, list)) else (found,))
