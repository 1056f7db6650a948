"""Greedy answers of every runtime against the eager graph's on held-out questions: `make agreement`.

Where a text differs, the two runtimes agreed on all tokens before; there the eager graph's lead of its best logit over
its second is set against the error that the target's arithmetic may make: the `lower` limit times the root mean square
of the logits. A lead below that explains the text.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from calibration.samples import Sample, zoo_samples
from export.check import recorded_limits
from export.pipeline import ExportOptions, export
from export.stages import Progress, to_stderr
from graphs.model import Request
from graphs.preprocess.prompt import TextSegment, segments
from runtimes.base import Array
from runtimes.generate import generate, greedy
from runtimes.manifest import Bundle
from runtimes.multimodal_runner import StockRunner
from runtimes.session import Session

TARGETS = ("onnxruntime", "executorch", "coreml")
MAX_NEW_TOKENS = 32


@dataclass
class Answer:
    """A text and the logits [V] that each of its tokens was chosen from."""

    text: str
    logits: list[Array] = field(default_factory=list)


def answer(session: Session, sample: Sample) -> Answer:
    """The greedy answer, its logits recorded."""
    recorded: list[Array] = []

    def choose(logits_V: Array) -> int:
        recorded.append(logits_V.copy())
        return greedy(logits_V)

    *_, last = generate(
        session.runtime,
        session.segments(sample.question, sample.images),
        context=session.context,
        stop=session.tokenizer.eos_ids,
        max_new_tokens=MAX_NEW_TOKENS,
        choose=choose,
    )
    return Answer(session.text(last), recorded)


@dataclass(frozen=True)
class Difference:
    """Where two answers part: the eager lead there, and the error that the target's arithmetic may make."""

    question: str
    expected: str
    actual: str
    margin: float
    error: float

    @property
    def explained(self) -> bool:
        return self.margin <= self.error


def difference(sample: Sample, expected: Answer, actual: Answer, limit: float) -> Difference | None:
    """None where the texts are the same; `limit` is the relative error allowed to the target.

    An answer without logits (the stock runner's) is taken to part from the eager one at its narrowest lead.
    """
    if expected.text == actual.text:
        return None
    steps = list(zip(expected.logits, actual.logits or expected.logits, strict=False))
    parted = [wanted for wanted, got in steps if greedy(wanted) != greedy(got)]
    candidates = parted[:1] or [wanted for wanted, _ in steps]
    margin, logits = min(((lead(wanted), wanted) for wanted in candidates), key=lambda pair: pair[0])
    error = limit * float(np.sqrt(np.square(logits.astype(np.float64)).mean()))
    return Difference(sample.question, expected.text, actual.text, margin, error)


def lead(logits_V: Array) -> float:
    """How far the best logit is above the second."""
    second, first = np.partition(logits_V, -2)[-2:]
    return float(first - second)


def runner_answers(directory: Path, session: Session, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
    """The answers of ExecuTorch's unmodified MultimodalRunner on the same .pte."""
    runner = StockRunner(directory)
    texts = []
    for sample in samples:
        before, _, after = segments(session.template, sample.question, images=1)
        assert isinstance(before, TextSegment)
        assert isinstance(after, TextSegment)
        assert session.processor is not None
        pixels = session.processor(sample.images[0])[0]
        texts.append("".join(runner.pieces(pixels, before.text, after.text, max_new_tokens)).strip())
    return texts


def measure(count: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Export the default model to every target that executes here, answer, compare."""
    samples = list(zoo_samples(count, seed))
    report: dict[str, Any] = {"questions": count, "seed": seed, "runtimes": {}}
    with TemporaryDirectory() as scratch:
        eager: list[Answer] = []
        for target in TARGETS:
            out = export(ExportOptions(Request("mobilevlm"), target, out=Path(scratch) / target), progress)
            bundle = Bundle.open(out)
            limit = recorded_limits(bundle)["text_decoder"].relative_l2
            if not eager:
                session = Session.open(bundle, "eager")
                eager = [answer(session, sample) for sample in samples]
                right = sum(a.text == s.answer for a, s in zip(eager, samples, strict=True))
                report["exact_match"] = right / count
            session = Session.open(bundle)
            progress(f"{target}: answering {count} questions")
            answers = [answer(session, sample) for sample in samples]
            report["runtimes"][session.runtime.version] = compare(samples, eager, answers, limit)
            if target == "executorch":
                texts = [Answer(text) for text in runner_answers(out, session, samples, MAX_NEW_TOKENS)]
                report["runtimes"]["executorch MultimodalRunner"] = compare(samples, eager, texts, limit)
    return report


def compare(
    samples: Sequence[Sample], expected: Sequence[Answer], actual: Sequence[Answer], limit: float
) -> dict[str, Any]:
    """How many texts are the same, and each that is not."""
    found = [difference(*three, limit) for three in zip(samples, expected, actual, strict=True)]
    different = [d for d in found if d is not None]
    return {
        "same": len(samples) - len(different),
        "explained": sum(d.explained for d in different),
        "different": [vars(d) | {"explained": d.explained} for d in different],
    }


def write(report: dict[str, Any], path: Path) -> None:
    """The report as a page of Markdown."""
    lines = [
        "# Same answers on every runtime",
        "",
        f"Greedy answers of `zoo/mobilevlm-nano` to {report['questions']} held-out questions (seed {report['seed']}), "
        "each runtime against the eager graph; a difference counts as explained where the eager lead of the best logit "
        "is within the target's arithmetic (its `lower` limit times the logits' root mean square).",
        "",
        f"Eager exact match on these questions: {100 * report['exact_match']:.1f}%.",
        "",
        "| runtime | same text | different, explained by the margin | different, unexplained |",
        "|---|---|---|---|",
    ]
    for name, row in report["runtimes"].items():
        unexplained = len(row["different"]) - row["explained"]
        lines.append(f"| {name} | {row['same']} of {report['questions']} | {row['explained']} | {unexplained} |")
    lines += ["", f"Made by `make agreement` on {date.today()}, Python {platform.python_version()}.", ""]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))


def main() -> int:
    """Measure, write docs/agreement.md, fail where a text differs without explanation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=70)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("docs/agreement.md"))
    args = parser.parse_args()
    report = measure(args.count, args.seed, to_stderr)
    write(report, args.out)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    bad = {name: len(row["different"]) - row["explained"] for name, row in report["runtimes"].items()}
    if any(bad.values()):
        to_stderr(f"vlmx: FAILED: unexplained differences: {bad}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
