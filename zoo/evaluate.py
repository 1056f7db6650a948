"""Held-out exact match of a checkpoint beside its baselines: `python -m zoo.evaluate`.

Greedy answers in float32 to pictures with other seeds and other handwritten digits than in training. For the zoo's own
checkpoint the result is written to docs/zoo.md and to the checkpoint's README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from zoo.baselines import Baselines, share
from zoo.card import card, report
from zoo.nano import Nano
from zoo.packing import Encoder
from zoo.questions import TASKS
from zoo.scenes import Sample, samples

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "zoo" / "mobilevlm-nano"
COUNT = 1400
SEED = 0
BATCH = 100


@dataclass(frozen=True)
class Row:
    """Exact match of one task, or of all: shares 0..1."""

    task: str
    count: int
    exact: float
    text_only: float
    frequent: float
    chance: float


def answer(directory: Path, asked: Sequence[Sample]) -> list[str]:
    """Greedy answers of the checkpoint in `directory`, in the order of `asked`."""
    nano = Nano.load(directory)
    encoder = Encoder(Tokenizer.from_file(str(directory / "tokenizer.json")))
    # Batches of one task end together: captions take many more tokens than colours.
    order = sorted(range(len(asked)), key=lambda n: TASKS.index(asked[n].task))
    found: dict[int, str] = {}
    for first in range(0, len(order), BATCH):
        part = order[first : first + BATCH]
        texts = nano.answers([asked[n].image for n in part], [asked[n].question for n in part], encoder)
        found.update(zip(part, texts, strict=True))
    return [found[n] for n in range(len(asked))]


def table(asked: Sequence[Sample], answers: Sequence[str], baselines: Baselines) -> list[Row]:
    """A row for each task, and one for all of them; the chance of all is the mean over its samples."""
    rows = []
    for name, tasks in [*((task, (task,)) for task in TASKS), ("all", TASKS)]:
        pairs = [(s, a) for s, a in zip(asked, answers, strict=True) if s.task in tasks]
        rows.append(
            Row(
                task=name,
                count=len(pairs),
                exact=share(s.answer == a for s, a in pairs),
                text_only=share(s.answer == baselines.text_only(s) for s, _ in pairs),
                frequent=share(s.answer == baselines.frequent(s) for s, _ in pairs),
                chance=sum(baselines.chance(s.task) for s, _ in pairs) / len(pairs),
            )
        )
    return rows


def evaluate(directory: Path, count: int, seed: int = SEED) -> tuple[list[Row], dict[str, Any]]:
    """The table for a checkpoint, and the facts of the run."""
    began = time.monotonic()
    asked = list(samples("heldout", count, seed))
    rows = table(asked, answer(directory, asked), Baselines.count())
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began),
        "seed": seed,
        "count": count,
    }
    return rows, facts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=COUNT)
    options = parser.parse_args()
    rows, facts = evaluate(options.checkpoint, options.count)
    training = options.checkpoint / "training.json"
    text = report(rows, facts, json.loads(training.read_text()) if training.exists() else {})
    print(text)
    if options.checkpoint.resolve() == CHECKPOINT:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "zoo.md").write_text(text)
        (CHECKPOINT / "README.md").write_text(card(rows, json.loads((CHECKPOINT / "config.json").read_text())))


if __name__ == "__main__":
    main()
