"""Samples as prompts of one model: ids and pictures in turn, and the ids of the answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from calibration.reading import Sample
from graphs.dialogue import DECODER, EMBEDDING
from graphs.errors import UserError
from graphs.model import Model
from graphs.preprocess.picture import pictures
from graphs.preprocess.prompt import ImageSegment, Piece, TextSegment, read, segments
from graphs.preprocess.tokenizer import Tokenizer, load_tokenizer
from graphs.program import Program


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


def prompted(model: Model, program: Program) -> bool:
    """Whether a model answers prompts, so that it can be calibrated."""
    return model.architecture.template is not None and {EMBEDDING, DECODER} <= set(program)


class Prompter:
    """Samples to prompts of one model."""

    def __init__(self, model: Model, program: Program, decode_steps: int) -> None:
        """Raises UserError where the model is none that answers prompts."""
        template = model.architecture.template
        if template is None or not prompted(model, program):
            raise UserError(f"{model.request.model} takes no prompts: only image-text decoders can be calibrated")
        processor, facts = model.architecture.image_processor, model.architecture.facts()
        found = load_tokenizer(model.directory) if model.directory else None
        if processor and found and model.directory:
            processor = processor.beside(model.directory)
        self.template, self.processor = template, processor
        self.tokenizer: Tokenizer = found or ByteTokenizer(facts["vocab_size"], template.image)
        self.ends = tuple(self.tokenizer.eos_ids)
        self.decode_steps = decode_steps

    def __call__(self, sample: Sample) -> Prompt:
        """Raises UserError where the model takes no pictures or the template cannot place them."""
        seen = pictures(self.processor, sample.images, sample.question)
        pieces = read(self.template, sample.question, seen, self.tokenizer)
        end = segments(self.template, sample.question, len(seen))[-1]
        return Prompt(tuple(pieces), self.answer(end, sample.answer))

    def answer(self, last: TextSegment | ImageSegment, answer: str | None) -> tuple[int, ...]:
        """The first ids that follow a prompt's last piece where it goes on with the answer, before what ends it."""
        if not answer or not isinstance(last, TextSegment):
            return ()
        if isinstance(self.tokenizer, ByteTokenizer):
            ids = self.tokenizer.encode(answer)
        else:
            before, whole = (self.tokenizer.encode(text) for text in (last.text, f"{last.text} {answer}"))
            ids = whole[len(before) :]
        return tuple(takewhile(lambda token: token not in self.ends, ids[: self.decode_steps]))
