"""A bundle ready to answer: its runtime, and the tokenizer, template and picture handling that its manifest records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from calibration.source import again
from graphs.compress.base import apply, digests, parse
from graphs.dialogue import Segment
from graphs.errors import UserError
from graphs.model import Request, load_model
from graphs.preprocess.picture import Processor, from_json, pictures, tuples
from graphs.preprocess.prompt import PromptTemplate, read
from graphs.preprocess.tokenizer import Tokenizer, load_tokenizer
from graphs.program import Program
from graphs.trace import trace
from quant.apply import Quantization
from quant.resolve import Resolved
from runtimes.base import Runtime, Unavailable, load_runtime
from runtimes.eager import EagerRuntime
from runtimes.generate import Generation, Sampler, generate, greedy
from runtimes.manifest import Bundle


def source_request(bundle: Bundle) -> Request:
    """What a bundle was exported from. Raises UserError where the manifest's record is damaged."""
    recorded = dict(bundle.manifest["source"])
    recorded.pop("weights", None)
    try:
        return Request(**recorded)
    except TypeError as error:
        raise UserError(f"{bundle.directory}: the manifest's source is damaged: {error}") from error


def rebuild(bundle: Bundle, part: Callable[[Program], Program] = lambda program: program) -> Program:
    """The program that a bundle was lowered from, or a part of it, from its recorded source.

    `part` gives it of the program before it is quantized. Raises UserError where the source is gone.
    """
    model = load_model(source_request(bundle))
    passes = parse(str(bundle.manifest.get("passes", "")))
    program = apply(passes, trace(model.architecture, model.weights))
    if changed := [
        path for path, found in digests(passes).items() if found != bundle.manifest["passes_read"].get(path)
    ]:
        raise UserError(f"{changed[0]} is not the file that this bundle's passes were given: its sha256 differs")
    resolved = Resolved.from_json(bundle.manifest["quantization"], program)
    statistics = None
    if resolved.needs_statistics:
        statistics = again(model, program, bundle.manifest["calibration"], resolved.needs_hessians)
    program = part(program)
    return Quantization(resolved.on(program), statistics).apply(program)


def open_runtime(bundle: Bundle, name: str | None = None) -> Runtime:
    """The bundle's own runtime, or `eager` from the source. Raises UserError where it cannot run here."""
    if name == "eager":
        return EagerRuntime(rebuild(bundle))
    if name not in (None, bundle.target):
        raise UserError(f"this bundle runs by '{bundle.target}' or 'eager', not by '{name}'")
    try:
        return load_runtime(bundle.target, bundle.artifact)
    except Unavailable as why:
        raise UserError(f"{bundle.target} cannot run on this machine: {why}; try --runtime eager") from why


@dataclass(frozen=True)
class Session:
    """Answers prompts about pictures."""

    runtime: Runtime
    tokenizer: Tokenizer
    template: PromptTemplate
    processor: Processor | None
    context: int

    @classmethod
    def open(cls, bundle: Bundle, runtime: str | None = None, stand_in: Tokenizer | None = None) -> Session:
        """`stand_in` serves where the bundle has no tokenizer.

        Raises UserError where the bundle takes tensors only, is no decoder, or cannot run here.
        """
        prompt = bundle.manifest["prompt"]
        own = load_tokenizer(bundle.directory)
        tokenizer = own or stand_in
        if tokenizer is None:
            raise UserError(f"{bundle.directory} has no tokenizer: it takes tensors only (see `vlmx verify`)")
        if prompt["template"] is None:
            raise UserError(f"{bundle.directory} takes no prompts: {bundle.manifest['architecture']} is no decoder")
        processor = from_json(prompt["image"]) if prompt["image"] else None
        return cls(
            open_runtime(bundle, runtime),
            tokenizer,
            PromptTemplate(**{key: tuples(value) for key, value in prompt["template"].items()}),
            processor.beside(bundle.directory) if processor and own else processor,
            prompt["context"],
        )

    def segments(self, prompt: str, images: Sequence[Image.Image]) -> list[Segment]:
        """Token ids and pixels in the order the decoder reads them."""
        return list(read(self.template, prompt, pictures(self.processor, images, prompt), self.tokenizer))

    def stream(
        self, prompt: str, images: Sequence[Image.Image], max_new_tokens: int = 128, choose: Sampler = greedy
    ) -> Iterator[Generation]:
        """The growing generation, token by token."""
        return generate(
            self.runtime,
            self.segments(prompt, images),
            context=self.context,
            stop=self.template.stop or self.tokenizer.eos_ids,
            max_new_tokens=max_new_tokens,
            choose=choose,
            start=self.template.start,
        )

    def answer(self, prompt: str, images: Sequence[Image.Image], max_new_tokens: int = 128) -> tuple[str, Generation]:
        """The greedy answer's text, and how it came about."""
        *_, last = self.stream(prompt, images, max_new_tokens)
        return self.text(last), last

    def text(self, generation: Generation) -> str:
        """What a generation says."""
        return self.tokenizer.decode(generation.tokens).strip()
