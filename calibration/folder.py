"""Samples of a folder: pictures, and one JSONL that says what is asked about them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from calibration.reading import Reader, Sample
from graphs.errors import UserError
from graphs.files import contained, reason
from graphs.preprocess.image import load_image

MAX_LINE = 1 << 20


def folder_readers(folder: Path, seed: int = 0) -> Iterator[Reader]:
    """The samples of `folder`/*.jsonl in an order drawn by `seed`: an object a line.

    `question`, and `image`, the name of a picture in the folder (left out or null: text alone); maybe `answer` and
    `task`. Only places of lines are kept; a line and its picture are read when the sample is. Raises UserError where
    there is not one list; a reader raises it naming the line at fault.
    """
    lists = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder: name calibration data as zoo, a folder with a JSONL, or hf:NAME")
    if len(lists) != 1:
        raise UserError(f"{folder} must hold one .jsonl file and its pictures; it holds {len(lists)} .jsonl files")
    path = contained(folder, lists[0].name)
    places = line_places(path)
    random.Random(seed).shuffle(places)
    return (partial(read, path, number, place) for number, place in places)


def line_places(path: Path) -> list[tuple[int, int]]:
    """(number counted from 1, byte where it begins) of every line that is not blank; no more of it than `MAX_LINE`
    bytes is held at a time. Raises UserError where the file cannot be read.
    """
    places, number, place, begins = [], 0, 0, True
    try:
        with path.open("rb") as file:
            while piece := file.readline(MAX_LINE):
                number += begins
                if begins and piece.strip():
                    places.append((number, place))
                place += len(piece)
                begins = piece.endswith(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    return places


def read(path: Path, number: int, place: int) -> Sample:
    """The sample of one line. Raises UserError naming file and line."""
    where = f"{path.name}:{number}"
    try:
        with path.open("rb") as file:
            file.seek(place)
            line = file.readline(MAX_LINE + 1)
    except OSError as error:
        raise UserError(f"{where}: {reason(error)}") from error
    row = parse(line, where)
    try:
        image = None if row.get("image") is None else load_image(contained(path.parent, row["image"]))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Sample(image, row["question"], row.get("answer"), row.get("task", ""))


def parse(line: bytes, where: str) -> dict[str, Any]:
    """One line of the list. Raises UserError where it is not of its form."""
    if len(line) > MAX_LINE:
        raise UserError(f"{where}: longer than the {MAX_LINE} bytes that a line may have")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {reason(error)}") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str):
        raise UserError(f'{where}: each line is an object with "question", and "image" where it is about a picture')
    for key in ("image", "answer", "task"):
        if not isinstance(row.get(key, ""), str) and not (row[key] is None and key != "task"):
            raise UserError(f'{where}: "{key}" is not a string')
    return row
