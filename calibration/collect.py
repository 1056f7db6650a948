"""Statistics of a float program on image-text samples: each is encoded, read and answered as a deployed model would.

The decoder prefills on real image embeddings at the places where the model's template puts them, then decodes some
steps, so that its cache and its single-token calls are seen too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibration.observe import Observer
from calibration.origin import Origin
from calibration.reading import Sample, Samples
from calibration.statistics import Statistics, fingerprint
from graphs.dialogue import DECODER, EMBEDDING, ENCODER, VISION, Dialogue, Read
from graphs.errors import UserError
from graphs.model import Model
from graphs.preprocess.picture import Array, View, pictures
from graphs.preprocess.prompt import ImageSegment, Piece, TextSegment, read, segments
from graphs.preprocess.tokenizer import Tokenizer, load_tokenizer
from graphs.program import Program

#: inputs kept of each layer and modality: static ranges need the tails
ROWS = 512
METHODS = (VISION, EMBEDDING, ENCODER, DECODER)


class ByteTokenizer:
    """Stands in where a model comes without tokenizer, as random weights do: a text's last bytes, each an id.

    The prompts then mean nothing; few ids fit the shortest context. The last id is that of the placeholder `image`.
    """

    bos_id: int | None = None
    adds_bos: bool = False
    eos_ids: tuple[int, ...] = ()
    LENGTH = 8

    def __init__(self, vocab_size: int, image: str) -> None:
        self.vocab_size, self.mark, self.image = vocab_size, vocab_size - 1, image

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, piece in enumerate(text.split(self.image)):
            ids += [self.mark] if index else []
            ids += [byte % self.mark for byte in piece.encode("utf-8", "replace")[-self.LENGTH :]]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return bytes(i % 256 for i in ids).decode("utf-8", "replace")


@dataclass(frozen=True)
class Prompt:
    """A sample as the decoder takes it: ids and pictures in turn, and the ids of its answer."""

    pieces: tuple[Piece, ...]
    answer: tuple[int, ...]

    @property
    def images(self) -> int:
        return len({id(piece.picture) for piece in self.pieces if isinstance(piece, View)})


class Prompter:
    """Samples to prompts of one model."""

    def __init__(self, model: Model, program: Program, decode_steps: int) -> None:
        """Raises UserError where the model is none that answers prompts."""
        template = model.architecture.template
        if template is None or not {EMBEDDING, DECODER} <= set(program):
            raise UserError(f"{model.request.model} takes no prompts: only image-text decoders can be calibrated")
        processor, facts = model.architecture.image_processor, model.architecture.facts()
        found = load_tokenizer(model.directory) if model.directory else None
        if processor and found and model.directory:
            processor = processor.beside(model.directory)
        self.template, self.processor = template, processor
        self.tokenizer: Tokenizer = found or ByteTokenizer(facts["vocab_size"], template.image)
        self.decode_steps = decode_steps

    def __call__(self, sample: Sample) -> Prompt:
        """Raises UserError where the model takes no pictures or the template cannot place them."""
        seen = pictures(self.processor, sample.images, sample.question)
        pieces = read(self.template, sample.question, seen, self.tokenizer)
        end = segments(self.template, sample.question, len(seen))[-1]
        return Prompt(tuple(pieces), self.answer(end, sample.answer))

    def answer(self, last: TextSegment | ImageSegment, answer: str | None) -> tuple[int, ...]:
        """The first ids that follow a prompt's last piece where it goes on with the answer."""
        if not answer or not isinstance(last, TextSegment):
            return ()
        before, whole = (self.tokenizer.encode(text) for text in (last.text, f"{last.text} {answer}"))
        return tuple(whole[len(before) :][: self.decode_steps])


class Watched:
    """The methods of a program, observed; `labels` are the positions of each modality in the next prompt's call."""

    def __init__(self, observers: Mapping[str, Observer], program: Program) -> None:
        self.observers = observers
        self.signatures = {name: program.methods[name].signature for name in observers}
        self.labels: dict[str, Tensor] = {}
        self.tokens = {"image": 0, "text": 0}

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        labels = {"image" if method == VISION else "text": torch.arange(1)}
        if method in (ENCODER, DECODER):
            labels, self.labels = self.labels or labels, {}
            for name, positions in labels.items():
                self.tokens[name] += len(positions)
        outputs = self.observers[method].call(labels, *(torch.from_numpy(np.ascontiguousarray(x)) for x in inputs))
        return [output.numpy() for output in outputs]

    def reset(self) -> None:
        for observer in self.observers.values():
            observer.reset()


def collect(
    model: Model,
    program: Program,
    samples: Samples | Iterable[Sample],
    *,
    seed: int = 0,
    decode_steps: int = 4,
    hessians: bool | str = True,
    rows: int = ROWS,
    outputs: int = 32,
    passes: str = "",
    progress: Callable[[str], None] = lambda line: None,
) -> Statistics:
    """Run `program` (float, its passes applied) on every sample and gather what its layers read and write.

    A sample with an answer is decoded along it, another greedily, `decode_steps` at most. `hessians`: of all linear
    layers, of none, or of those whose "method:weight" a regular expression finds; they are most of the memory, K^2
    floats for each value that layers read and each modality. `rows` inputs a modality and `outputs` outputs are kept of
    each layer, drawn by `seed`. `passes` is recorded. Same arguments, same numbers, to the last bit on one machine.

    Raises UserError for too few good samples, and for weights that compute NaN or Inf.
    """
    if not isinstance(samples, Samples):
        samples = Samples.of(samples)
    prompter = Prompter(model, program, decode_steps)
    if isinstance(prompter.tokenizer, ByteTokenizer) and model.directory:
        progress(f"{model.directory} has no tokenizer: its prompts here mean nothing to it, only its pictures do")
    pattern = re.compile(hessians) if isinstance(hessians, str) else re.compile("") if hessians else None
    observers = {
        method: Observer(program, method, hessians=pattern, rows=rows, outputs=outputs, seed=seed)
        for method in METHODS
        if method in program
    }
    watched = Watched(observers, program)
    dialogue = Dialogue(watched, prompter.template.start)
    context = int(model.architecture.facts()["context"])
    count = images = 0

    def fitting(sample: Sample) -> tuple[Prompt, Read]:
        """Raises UserError where a prompt cannot be made or exceeds the context, its pictures seen all the same."""
        prompt = prompter(sample)
        seen = dialogue.embed(prompt.pieces)
        if seen.length + decode_steps > context:
            raise UserError(f"a prompt of {seen.length} tokens leaves no room in the context of {context}")
        return prompt, seen

    for prompt, seen in samples.prepared(fitting):
        watched.reset()
        named = {"image": seen.images_S, "text": ~seen.images_S}
        watched.labels = {name: torch.from_numpy(where.nonzero()[0]) for name, where in named.items() if where.any()}
        logits = dialogue.prefill(seen)
        for step in range(decode_steps):
            if prompt.answer and step >= len(prompt.answer):
                break
            token = prompt.answer[step] if prompt.answer else int(logits.argmax())
            if token in prompter.tokenizer.eos_ids:
                break
            logits = dialogue.step(token)
        count, images = count + 1, images + prompt.images
        if count % max(1, samples.count // 8) == 0:
            progress(f"sample {count} of {samples.count}" + (f", {samples.skipped} skipped" if samples.skipped else ""))
    layers = {key: layer for one in observers.values() for key, layer in one.statistics().items()}
    origin = Origin(
        model=model.request.model,
        variant=model.variant,
        weights=model.origin,
        passes=passes,
        data=samples.data,
        count=count,
        images=images,
        seed=seed,
        decode_steps=decode_steps,
        skipped=samples.skipped,
        skipped_names=tuple(samples.skipped_names),
        tokens=watched.tokens,
        fingerprint=fingerprint(program, layers),
    )
    return Statistics(layers, origin)
