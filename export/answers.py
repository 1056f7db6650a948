"""What a bundle answers beside the graph that it was lowered from: as `vlmx run` asks it, and the same by `eager`.

Decoders answer greedily, with pictures and without; what takes no prompts gives its outputs for two pictures and three
texts. Random weights come without tokenizer: bytes stand in for one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from calibration.prompts import ByteTokenizer
from calibration.samples import zoo_samples
from export.agreement import lead
from export.verify import relative_l2
from graphs.errors import UserError
from graphs.preprocess.picture import from_json, pictures
from graphs.preprocess.tokenizer import load_tokenizer
from runtimes.base import Array, Caller
from runtimes.generate import generate, greedy
from runtimes.manifest import Bundle
from runtimes.session import Session, open_runtime

NEW_TOKENS = 8
LENGTHS = (5, 9, 16)  # ids of the texts
PICTURES = "image_encoder"

#: arrays by name
Known = dict[str, Array]

#: outputs that are no tokens may be off by so much
LIMIT = 1e-4


@dataclass(frozen=True)
class Ask:
    """One prompt."""

    name: str
    question: str
    images: tuple[Image.Image, ...] = ()


def asks() -> list[Ask]:
    """Held-out pictures and questions of the zoo: a square one, one of another shape, two at once, none.

    All are small: where more pixels are more tokens, the shortest contexts hold them.
    """
    one, other = zoo_samples(2, seed=11)
    (square,), (again,) = one.images, other.images
    return [
        Ask("a picture", one.question, (square.resize((64, 64)),)),
        Ask("another size", other.question, (again.resize((72, 32)),)),
        Ask("two pictures", one.question, (square.resize((40, 24)), again.resize((28, 32)))),
        Ask("no picture", other.question),
    ]


def open_session(bundle: Bundle, runtime: str | None = None) -> Session:
    """As `Session.open`, with bytes for the tokenizer that the bundle lacks."""
    prompt = bundle.manifest["prompt"]
    stand_in = None
    if load_tokenizer(bundle.directory) is None:
        stand_in = ByteTokenizer(prompt["vocab_size"], prompt["template"]["image"])
    return Session.open(bundle, runtime, stand_in)


def steps(session: Session, ask: Ask) -> list[Array]:
    """The logits [V] of every token of a greedy answer, which nothing stops. Raises UserError for what is not taken."""
    logits: list[Array] = []

    def choose(logits_V: Array) -> int:
        logits.append(logits_V.copy())
        return greedy(logits_V)

    prompt = session.segments(ask.question, ask.images)
    answer = partial(generate, session.runtime, prompt, context=session.context, start=session.template.start)
    for _ in answer(max_new_tokens=NEW_TOKENS, choose=choose):
        pass
    return logits


def told(actual: Session, expected: Session, ask: Ask) -> dict[str, Any]:
    """A prompt's row: the tokens that both answer, or where they part and how far the expected one led there.

    `relative_l2` is that of the logits up to there. What is not taken is `refused`.
    """
    try:
        wanted = steps(expected, ask)
    except UserError as why:
        return {"prompt": ask.name, "refused": str(why)}
    given = steps(actual, ask)
    tokens, others = ([greedy(logits_V) for logits_V in found] for found in (wanted, given))
    same = next((i for i, (a, b) in enumerate(zip(others, tokens, strict=True)) if a != b), len(tokens))
    row = {"prompt": ask.name, "tokens": tokens, "relative_l2": relative_l2(given[: same + 1], wanted[: same + 1])}
    if same < len(tokens):
        row |= {"others": others, "first": same, "lead": lead(wanted[same])}
    return row


def outputs(caller: Caller, images: Sequence[tuple[Array, ...]], seed: int = 0) -> dict[str, list[Array]]:
    """What methods that take no prompts give, by method and output: of pictures, of seeded texts, of each with each."""
    found: dict[str, list[Array]] = defaultdict(list)

    def call(method: str, known: Known) -> Known:
        signature = caller.signatures[method]
        values = caller.call(method, [known[spec.name] for spec in signature.inputs])
        given = {spec.name: value for spec, value in zip(signature.outputs, values, strict=True)}
        for name, value in given.items():
            found[f"{method} {name}"].append(value)
        return known | given

    seen: list[Known] = []
    texts: list[Known] = []
    for name, signature in caller.signatures.items():
        wanted = [spec.name for spec in signature.inputs]
        if name == PICTURES:
            seen = [call(name, dict(zip(wanted, arrays, strict=True))) for arrays in images]
        elif wanted == ["image_embeds", "text_embeds"]:  # all pictures with all texts at once
            both = zip(wanted, (seen, texts), strict=True)
            call(name, {key: np.concatenate([known[key] for known in rows]) for key, rows in both})
        elif seen and set(wanted) & seen[0].keys():
            for picture in seen:
                for text in texts:
                    call(name, text | picture)
        else:
            drawn = signature.method(name).examples(seed, LENGTHS)
            texts = [call(name, dict(zip(wanted, map(Tensor.numpy, tensors), strict=True))) for tensors in drawn]
    return found


def scored(bundle: Bundle) -> list[dict[str, Any]]:
    """How far each output of a bundle that takes no prompts is from the graph's, on the pictures of `asks`."""
    record = bundle.manifest["prompt"]["image"]
    images = asks()[2].images if record else ()
    arrays = [picture.arrays for picture in pictures(from_json(record) if record else None, images, "")]
    actual, expected = (outputs(open_runtime(bundle, name), arrays) for name in (None, "eager"))
    return [
        {"output": name, "calls": len(values), "relative_l2": relative_l2(actual[name], values)}
        for name, values in expected.items()
    ]


def compare(bundle: Bundle) -> list[dict[str, Any]]:
    """A bundle's answers, a row a prompt, or, where it takes none, a row an output."""
    if bundle.manifest["prompt"]["template"] is None:
        return scored(bundle)
    actual, expected = open_session(bundle), open_session(bundle, "eager")
    return [told(actual, expected, ask) for ask in asks()]


def fault(rows: Sequence[dict[str, Any]]) -> str:
    """Why the rows of `compare` do not show the same model; empty where they do."""
    if all("refused" in row for row in rows):
        return "no prompt is taken: " + "; ".join(row["refused"] for row in rows)
    for row in rows:
        if "first" in row:
            where, far = row["first"], f"{row['relative_l2']:.1e}"
            return (
                f"{row['prompt']}: token {where} is {row['others'][where]}, not {row['tokens'][where]}, which leads by "
                f"{row['lead']:.1e}; relative L2 of the logits {far}"
            )
        if "tokens" in row and len(row["tokens"]) < NEW_TOKENS:
            return f"{row['prompt']}: {len(row['tokens'])} tokens fit the context, not {NEW_TOKENS}"
        if "output" in row and not row["relative_l2"] <= LIMIT:
            return f"{row['output']}: relative L2 {row['relative_l2']:.1e}, the limit is {LIMIT:g}"
    return ""
