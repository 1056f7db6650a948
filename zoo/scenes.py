"""Pictures with questions and answers, made by code from a seed: shapes, words and real handwritten digits.

A scene is a picture of three rows and three columns. Shapes lie in the cells; one row may hold a word or a number.
Every scene carries questions of several tasks. A scene is a function of (split, seed, index) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from zoo import drawing
from zoo.digits import Split
from zoo.questions import TASKS, Thing, ask

CELL = drawing.SIZE // 3
MAX_DIGITS = 3
LEXICON = """
GO NO UP ON HI ME WE OX CAT DOG SUN BUS CAR BOX KEY MAP CUP HAT JAM ZOO FOX OWL PIG ANT BEE EGG ICE SKY SEA VAN WEB YES
TOP JET ZIP FISH BIRD TREE MOON MILK BOOK DOOR EXIT STOP OPEN SHIP LION BEAR DUCK FROG LEAF ROCK SNOW WIND GOLD HOME
TAXI JUMP KING QUIZ
"""
WORDS = tuple(LEXICON.split())


@dataclass(frozen=True)
class Sample:
    """One question about one picture. `image` is RGB, 96 x 96; the answer is exact, without surrounding space."""

    image: Image.Image
    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Mark:
    """Where something is drawn: its box in pixels, its name (a shape, a letter or a digit) and its colour."""

    box: drawing.Box
    name: str
    color: str

    @property
    def thing(self) -> Thing:
        """A shape and its cell."""
        left, top, right, bottom = self.box
        return Thing(self.color, self.name, int((top + bottom) / 2 // CELL), int((left + right) / 2 // CELL))


@dataclass(frozen=True)
class Scene:
    """A picture, what is drawn where, and questions: (task, question, answer), at most two of a task."""

    image: Image.Image
    marks: tuple[Mark, ...]
    questions: tuple[tuple[str, str, str], ...]


def scene(split: Split, seed: int, index: int) -> Scene:
    """The scene of that number. Same arguments, same scene."""
    rng = np.random.default_rng([("train", "heldout").index(split), seed, index])
    image = drawing.background(rng)
    kind = ("word", "digits", "none")[int(rng.choice(3, p=(0.46, 0.44, 0.1)))]
    row = -1 if kind == "none" else int(rng.integers(3))
    things, marks = _draw_things(image, rng, row)
    text = ""
    if kind != "none":
        text, more = (_draw_word if kind == "word" else _draw_digits)(image, rng, split, row)
        marks += more
    return Scene(image, tuple(marks), tuple(ask(rng, things, kind, text)))


def samples(split: Split, count: int, seed: int) -> Iterator[Sample]:
    """`count` samples, one a scene, the tasks in turn."""
    index = 0
    for number in range(count):
        task = TASKS[number % len(TASKS)]
        while True:
            made = scene(split, seed, index)
            index += 1
            found = [q for q in made.questions if q[0] == task]
            if found:
                break
        _, question, answer = found[index % len(found)]
        yield Sample(made.image, task, question, answer)


def _draw_things(image: Image.Image, rng: np.random.Generator, text_row: int) -> tuple[list[Thing], list[Mark]]:
    cells = [(r, c) for r in range(3) for c in range(3) if r != text_row]
    count = int(rng.integers(1, 6))
    # Few colours or few shapes to draw from make repetitions, without which counting would always answer 1.
    colors = rng.choice(list(drawing.COLORS), 2 if rng.random() < 0.35 else len(drawing.COLORS), replace=False)
    shapes = rng.choice(drawing.SHAPES, 2 if rng.random() < 0.35 else len(drawing.SHAPES), replace=False)
    things, marks = [], []
    for number in sorted(rng.choice(len(cells), count, replace=False)):
        row, column = cells[number]
        color, name = str(rng.choice(colors)), str(rng.choice(shapes))
        radius = float(rng.uniform(8.5, 13.5))
        play = CELL / 2 - 0.8 - radius
        x = (column + 0.5) * CELL + float(rng.uniform(-play, play))
        y = (row + 0.5) * CELL + float(rng.uniform(-play, play))
        box = drawing.shape(image, name, (x, y), radius, drawing.ink(rng, color), float(rng.uniform(-0.2, 0.2)))
        things.append(Thing(color, name, row, column))
        marks.append(Mark(box, name, color))
    return things, marks


def _text_color(image: Image.Image, rng: np.random.Generator, row: int) -> str:
    pixels = np.asarray(image)[row * CELL : (row + 1) * CELL].reshape(-1, 3).mean(0)
    ground = (int(pixels[0]), int(pixels[1]), int(pixels[2]))
    names = [n for n, c in drawing.COLORS.items() if drawing.contrast(c, ground) > 110]
    return str(rng.choice(names))


def _draw_word(image: Image.Image, rng: np.random.Generator, split: Split, row: int) -> tuple[str, list[Mark]]:
    text = str(rng.choice(WORDS))
    size = int(rng.integers(21, 30))
    while drawing.word_size(text, size)[0] > drawing.SIZE - 4:
        size -= 1
    width, height = drawing.word_size(text, size)
    corner = (float(rng.uniform(2, drawing.SIZE - 2 - width)), row * CELL + float(rng.uniform(2, CELL - 2 - height)))
    color = _text_color(image, rng, row)
    boxes = drawing.word(image, text, corner, size, drawing.ink(rng, color))
    return text, [Mark(box, letter, color) for box, letter in zip(boxes, text, strict=True)]


def _draw_digits(image: Image.Image, rng: np.random.Generator, split: Split, row: int) -> tuple[str, list[Mark]]:
    count = int(rng.integers(1, MAX_DIGITS + 1))
    width, height = int(rng.integers(22, 29)), int(rng.integers(25, 31))
    left = int(rng.integers(2, drawing.SIZE - 1 - count * width))
    top = row * CELL + int(rng.integers(0, CELL - height + 1))
    color = _text_color(image, rng, row)
    fill = drawing.ink(rng, color)
    text, marks = "", []
    for n in range(count):
        value, box = drawing.digit(image, rng, split, (left + n * width, top), (width, height), fill)
        text += str(value)
        marks.append(Mark(box, str(value), color))
    return text, marks
