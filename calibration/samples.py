"""Image-text samples to measure and calibrate with: the zoo's own, or a folder of pictures with a JSONL beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from graphs.errors import UserError
from graphs.files import contained, reason
from graphs.preprocess.image import load_image

MAX_LINE = 1 << 20


@dataclass(frozen=True)
class Sample:
    """A picture, a question about it, and the right answer where it is known."""

    image: Image.Image
    question: str
    answer: str | None = None
    task: str = ""


def zoo_samples(count: int, seed: int = 0, split: Literal["train", "heldout"] = "heldout") -> Iterator[Sample]:
    """The generated questions that zoo/mobilevlm-nano is trained on (`train`) or measured by (`heldout`)."""
    from zoo.scenes import samples

    for sample in samples(split, count, seed):
        yield Sample(sample.image, sample.question, sample.answer, sample.task)


def folder_samples(folder: Path) -> Iterator[Sample]:
    """The samples of `folder`/*.jsonl: an object a line, `image` (a file name), `question`, maybe `answer` and `task`.

    Raises UserError naming the file and line at fault.
    """
    lists = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if len(lists) != 1:
        raise UserError(f"{folder} must hold one .jsonl file and its pictures; it holds {len(lists)} .jsonl files")
    with lists[0].open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = parse(line, f"{lists[0]}:{number}")
                image = load_image(contained(folder, row["image"]))
                yield Sample(image, row["question"], row.get("answer"), row.get("task", ""))


def parse(line: str, where: str) -> dict[str, Any]:
    """One line of the list. Raises UserError where it is not of its form."""
    try:
        row = json.loads(line) if len(line) <= MAX_LINE else None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {reason(error)}") from error
    keys = ("image", "question")
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
        raise UserError(f'{where}: each line is an object with "image" and "question"')
    return row
