"""Statistics of a float program on image-text samples: each is encoded, read and answered as a deployed model would.

The decoder prefills on real image embeddings at the places where the model's template puts them, then decodes some
steps, so that its cache and its single-token calls are seen too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.observe import Observer
from calibration.origin import Origin
from calibration.reading import Sample, Samples
from calibration.statistics import Statistics, fingerprint
from graphs.errors import UserError
from graphs.model import Model
from graphs.preprocess.prompt import ImageSegment, TextSegment, segments, tokenize
from graphs.preprocess.tokenizer import Tokenizer, load_tokenizer
from graphs.program import Program

#: inputs kept of each layer and modality: static ranges need the tails
ROWS = 512
METHODS = ("vision_encoder", "token_embedding", "text_decoder")


class ByteTokenizer:
    """Stands in where a model comes without tokenizer, as random weights do: a text's last bytes, each an id.

    The prompts then mean nothing; few ids fit the shortest context.
    """

    bos_id: int | None = None
    adds_bos: bool = False
    eos_ids: tuple[int, ...] = ()
    LENGTH = 8

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [byte % self.vocab_size for byte in text.encode("utf-8", "replace")[-self.LENGTH :]]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return bytes(i % 256 for i in ids).decode("utf-8", "replace")


@dataclass(frozen=True)
class Prompt:
    """A sample as the decoder takes it: ids [1, T] or pixels [1, 3, H, W] in turn, and the ids of its answer."""

    pieces: tuple[Tensor, ...]
    answer: tuple[int, ...]

    @property
    def images(self) -> int:
        return sum(piece.ndim == 4 for piece in self.pieces)


class Prompter:
    """Samples to prompts of one model."""

    def __init__(self, model: Model, program: Program, decode_steps: int) -> None:
        """Raises UserError where the model is none that answers prompts."""
        template = model.architecture.template
        if template is None or not set(METHODS[1:]) <= set(program):
            raise UserError(f"{model.request.model} takes no prompts: only image-text decoders can be calibrated")
        self.template, self.processor = template, model.architecture.image_processor
        facts = model.architecture.facts()
        found = load_tokenizer(model.directory) if model.directory else None
        self.tokenizer: Tokenizer | ByteTokenizer = found or ByteTokenizer(facts["vocab_size"])
        self.context, self.decode_steps = int(facts["context"]), decode_steps
        shape = program.methods["vision_encoder"].signature.outputs[0].shape if "vision_encoder" in program else (1, 0)
        self.visual_tokens = shape[1] if isinstance(shape[1], int) else 0

    def __call__(self, sample: Sample) -> Prompt:
        """Raises UserError where the template cannot place the picture or the prompt exceeds the context."""
        if sample.images and (self.processor is None or not self.visual_tokens):
            raise UserError("this model takes no pictures")
        pieces = segments(self.template, sample.question, len(sample.images))
        found: list[Tensor] = []
        for piece in tokenize(pieces, self.tokenizer):
            if isinstance(piece, ImageSegment):
                assert self.processor is not None
                found.append(torch.from_numpy(self.processor(sample.images[piece.index])))
            else:
                found.append(torch.from_numpy(piece)[None])
        prompt = Prompt(tuple(found), self.answer(pieces[-1], sample.answer))
        length = sum(self.visual_tokens if piece.ndim == 4 else piece.shape[1] for piece in found)
        if length + self.decode_steps > self.context:
            raise UserError(f"a prompt of {length} tokens leaves no room in the context of {self.context}")
        return prompt

    def answer(self, last: TextSegment | ImageSegment, answer: str | None) -> tuple[int, ...]:
        """The first ids that follow a prompt's last piece where it goes on with the answer."""
        if not answer or not isinstance(last, TextSegment):
            return ()
        before, whole = (self.tokenizer.encode(text) for text in (last.text, f"{last.text} {answer}"))
        return tuple(whole[len(before) :][: self.decode_steps])


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
    vision, embedding, decoder = observers.get(METHODS[0]), observers[METHODS[1]], observers[METHODS[2]]
    count = images = 0
    tokens = {"image": 0, "text": 0}

    def embed(piece: Tensor) -> tuple[str, Tensor]:
        if piece.ndim == 2:
            return "text", embedding.call({}, piece)
        assert vision is not None
        return "image", vision.call({"image": torch.arange(1)}, piece)

    for prompt in samples.prepared(prompter):
        decoder.reset()
        parts = [embed(piece) for piece in prompt.pieces]
        embeds = torch.cat([part for _, part in parts], dim=1)
        names = [name for name, part in parts for _ in range(part.shape[1])]
        labels = {n: torch.tensor([i for i, of in enumerate(names) if of == n]) for n in sorted(set(names))}
        position = torch.arange(embeds.shape[1])
        logits = decoder.call(labels, embeds, position)
        for step in range(decode_steps):
            if prompt.answer and step >= len(prompt.answer):
                break
            token = prompt.answer[step] if prompt.answer else int(logits[0, -1].argmax())
            if token in prompter.tokenizer.eos_ids:
                break
            _, embeds = embed(torch.tensor([[token]]))
            position = position[-1:] + 1
            logits = decoder.call({"text": torch.arange(1)}, embeds, position)
            tokens["text"] += 1
        for name, positions in labels.items():
            tokens[name] += len(positions)
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
        tokens=tokens,
        fingerprint=fingerprint(program, layers),
    )
    return Statistics(layers, origin)
