"""Exact match of a deployed model on the zoo's questions, and how sure one may be of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from calibration.samples import Sample
from runtimes.session import Session

#: tasks whose answer is written in the picture; all others ask about shapes and places
READING = ("digits", "words")
MAX_NEW_TOKENS = 32
Z = 1.96  # two-sided 95% of a normal distribution


def ask(session: Session, samples: Iterable[Sample]) -> list[bool]:
    """Whether each greedy answer is exactly the sample's."""
    return [session.answer(s.question, s.images, MAX_NEW_TOKENS)[0] == s.answer for s in samples]


def shares(correct: Sequence[bool], tasks: Sequence[str]) -> dict[str, float]:
    """Shares of right answers: over `all`, over the `reading` tasks, over the `others`, and by task."""
    groups = {
        "all": correct,
        "reading": [right for right, task in zip(correct, tasks, strict=True) if task in READING],
        "others": [right for right, task in zip(correct, tasks, strict=True) if task not in READING],
        **{name: [r for r, task in zip(correct, tasks, strict=True) if task == name] for name in dict.fromkeys(tasks)},
    }
    return {name: sum(group) / len(group) for name, group in groups.items() if group}


def half_width(share: float, count: int) -> float:
    """Half the width of Wilson's 95% interval of a share of `count` questions; it is not 0 at 100%."""
    return Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2)) / (1 + Z**2 / count)


def difference(correct: Sequence[bool], reference: Sequence[bool]) -> tuple[float, float]:
    """The gain in share over a reference on the same questions, and half the width of its 95% interval.

    Only questions that one of both got right and the other did not add to either number (McNemar's setting).
    """
    count = len(correct)
    gains = sum(a and not b for a, b in zip(correct, reference, strict=True))
    losses = sum(b and not a for a, b in zip(correct, reference, strict=True))
    gain = (gains - losses) / count
    return gain, Z * math.sqrt(max((gains + losses) / count - gain**2, 0.0) / count)
