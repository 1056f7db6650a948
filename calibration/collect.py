"""Statistics of a float program on image-text samples: each is encoded, read and answered as a deployed model would.

The decoder prefills on real image embeddings at the places where the model's template puts them, then decodes some
steps, so that its cache and its single-token calls are seen too. Methods run one after the other on all samples, each a
stretch of its graph at a time: memory holds a stretch's weights and second moments, not the model's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from calibration.conversation import Conversation, Embedded, Pretended, numbers
from calibration.greedy import answer_greedily, last
from calibration.observe import Observer
from calibration.origin import Origin
from calibration.prompts import ByteTokenizer, Prompter
from calibration.reading import Sample, Samples
from calibration.statistics import Statistics, fingerprint
from calibration.storage import writing
from graphs.dialogue import DECODER, EMBEDDING, ENCODER, VISION
from graphs.errors import UserError
from graphs.model import Model
from graphs.program import Program

#: inputs kept of each layer and modality: static ranges need the tails
ROWS = 512

#: those that run on all samples, one after the other
METHODS = (VISION, ENCODER, DECODER)


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
    out: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Statistics:
    """Run `program` (float, its passes applied) on every sample and gather what its layers read and write.

    A sample with an answer is decoded along it, another greedily, `decode_steps` at most. `hessians`: of all linear
    layers, of none, or of those whose "method:weight" a regular expression finds; they are most of the numbers, K^2
    floats for each value that layers read and each modality. `rows` inputs a modality and `outputs` outputs are kept of
    each layer, drawn by `seed`. `passes` is recorded. All is written to `out` as it comes and read from there
    afterwards, since memory would not hold it; without `out`, to a file that goes with the statistics. Same arguments,
    same numbers, to the last bit on one machine.

    Raises UserError for too few good samples, and for weights that compute NaN or Inf.
    """
    if not isinstance(samples, Samples):
        samples = Samples.of(samples)
    prompter = Prompter(model, program, decode_steps)
    if isinstance(prompter.tokenizer, ByteTokenizer) and model.directory:
        progress(f"{model.directory} has no tokenizer: its prompts here mean nothing to it, only its pictures do")
    conversations = prepared(model, program, samples, prompter)
    pattern = re.compile(hessians) if isinstance(hessians, str) else re.compile("") if hessians else None
    observe = partial(Observer, program, hessians=pattern, rows=rows, outputs=outputs, seed=seed)
    observers = {method: observe(method) for method in METHODS if method in program}
    with place(out) as path:
        check_space(path, observers.values())
        with writing(path, sum(len(traced.weight_names) for traced in program.methods.values())) as writer:
            for method, observer in observers.items():
                if method == DECODER:
                    greedy = [conversation for conversation in conversations if not conversation.answer]
                    answer_greedily(program, greedy, decode_steps, prompter.ends, progress)
                for conversation in conversations:
                    conversation.rehearse()
                calls = [conversation.calls.get(method, []) for conversation in conversations]
                if any(calls):
                    keep = partial(writer.add, method)
                    made = observer.run(calls, keep, progress, last if method == DECODER else tuple)
                    for conversation, results in zip(conversations, made, strict=True):
                        conversation.outputs[method] = [numbers(result) for result in results]
            embedding = observe(EMBEDDING)
            if embedding.group:  # was called all along; the calls of the last rehearsal are all of them
                embedding.run(
                    [conversation.calls[EMBEDDING] for conversation in conversations], partial(writer.add, EMBEDDING)
                )
            tokens = [conversation.tokens() for conversation in conversations]
            writer.origin = Origin(
                model=model.request.model,
                variant=model.variant,
                weights=model.origin,
                passes=passes,
                data=samples.data,
                count=len(conversations),
                images=sum(conversation.images for conversation in conversations),
                seed=seed,
                decode_steps=decode_steps,
                skipped=samples.skipped,
                skipped_names=tuple(samples.skipped_names),
                tokens={name: sum(counts[name] for counts in tokens) for name in ("image", "text")},
                fingerprint=fingerprint(program, writer.keys()),
            )
        return Statistics.load(path)


@contextmanager
def place(out: Path | None) -> Iterator[Path]:
    """The file for statistics: `out`, or one that goes at the end; what is mapped of it stays until it is let go."""
    if out is not None:
        yield out
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        yield Path(directory) / "statistics.safetensors"


def check_space(path: Path, observers: Iterable[Observer]) -> None:
    """Raise UserError where the disk has less room than the statistics will take at the least."""
    directory = next(parent for parent in path.absolute().parents if parent.is_dir())
    needed = sum(sum(observer.counted_bytes().values()) for observer in observers)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory} has {free >> 20} MiB free, statistics of this model take {needed >> 20} MiB or more while "
            "they are used: make room there, or choose another place"
        )


def prepared(model: Model, program: Program, samples: Samples, prompter: Prompter) -> list[Conversation]:
    """As many conversations as samples were asked for. Raises UserError where too few fit the model."""
    context, start = int(model.architecture.facts()["context"]), prompter.template.start
    signatures = {name: traced.signature for name, traced in program.methods.items()}
    embed, see = Embedded(program), Pretended(program)

    def fitting(sample: Sample) -> Conversation:
        prompt = prompter(sample)
        conversation = Conversation(prompt.pieces, list(prompt.answer), start, signatures, embed, see)
        length = conversation.length()
        if length + prompter.decode_steps > context:
            raise UserError(f"a prompt of {length} tokens leaves no room in the context of {context}")
        return conversation

    return list(samples.prepared(fitting))
