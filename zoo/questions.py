"""Questions about a scene and their exact answers, and the tasks they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TASKS = ("color", "shape", "count", "position", "digits", "words", "caption")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
MAX_CAPTION_THINGS = 3

Asked = tuple[str, str, str]


@dataclass(frozen=True)
class Thing:
    """A shape in a cell of the 3 x 3 grid."""

    color: str
    shape: str
    row: int
    column: int

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """The cell in words: "top left", "middle center" and so on."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


def ask(rng: np.random.Generator, things: Sequence[Thing], kind: str, text: str) -> list[Asked]:
    """All that is asked about a scene: (task, question, answer). `kind` is "word", "digits" or "none"."""
    asked = _color(rng, things) + _shape(rng, things) + _count(rng, things) + _position(rng, things)
    if kind != "none":
        task, questions = _READING[kind]
        asked.append((task, str(rng.choice(questions)), text))
    return asked + _caption(rng, things)


def _pick(rng: np.random.Generator, things: Sequence[Thing], key: Callable[[Thing], str]) -> Thing | None:
    """A random one of the things that no other shares `key` with, so that the question has one answer."""
    counts = Counter(key(t) for t in things)
    alone = [t for t in things if counts[key(t)] == 1]
    return alone[int(rng.integers(len(alone)))] if alone else None


def _color(rng: np.random.Generator, things: Sequence[Thing]) -> list[Asked]:
    thing = _pick(rng, things, lambda t: t.shape)
    return [("color", f"What color is the {thing.shape}?", thing.color)] if thing else []


def _shape(rng: np.random.Generator, things: Sequence[Thing]) -> list[Asked]:
    thing = _pick(rng, things, lambda t: t.color)
    return [("shape", f"What shape is the {thing.color} object?", thing.shape)] if thing else []


def _count(rng: np.random.Generator, things: Sequence[Thing]) -> list[Asked]:
    """All things, or those of a colour or shape that is there; a repeated one is preferred, else 1 would prevail."""
    asked: list[Asked] = [("count", "How many objects are there?", str(len(things)))]
    groups = Counter(f"{t.color} objects" for t in things) + Counter(PLURALS[t.shape] for t in things)
    wanted = int(rng.integers(2, 4)) if rng.random() < 0.75 else 1
    names = [n for n, c in groups.items() if c == wanted]
    if names:
        asked.append(("count", f"How many {rng.choice(names)} are there?", str(wanted)))
    return asked


def _position(rng: np.random.Generator, things: Sequence[Thing]) -> list[Asked]:
    thing = _pick(rng, things, lambda t: t.name)
    if thing is None:
        return []
    asked: list[Asked] = [("position", f"Where is the {thing.name}?", thing.place)]
    counts = Counter(t.name for t in things)
    others = [t for t in things if counts[t.name] == 1 and t != thing]
    if others and rng.random() < 0.5:
        other = others[int(rng.integers(len(others)))]
        if thing.column != other.column:
            answer = "left" if thing.column < other.column else "right"
            asked.append(("position", f"Is the {thing.name} left or right of the {other.name}?", answer))
        else:
            answer = "above" if thing.row < other.row else "below"
            asked.append(("position", f"Is the {thing.name} above or below the {other.name}?", answer))
    return asked


def _caption(rng: np.random.Generator, things: Sequence[Thing]) -> list[Asked]:
    """The things in reading order, which makes the caption unique; only of scenes with few of them."""
    if len(things) > MAX_CAPTION_THINGS:
        return []
    names = [
        f"{'an' if t.color == 'orange' else 'a'} {t.name}" for t in sorted(things, key=lambda t: (t.row, t.column))
    ]
    answer = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return [("caption", "Describe the shapes in the image.", answer)]


_READING: dict[str, tuple[str, tuple[str, ...]]] = {
    "word": ("words", ("What word is written?", "Read the word.")),
    "digits": ("digits", ("What number is written?", "Read the number.")),
}
