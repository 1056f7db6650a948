"""Samples of a Hugging Face data set, streamed by the optional package `datasets`; nothing is downloaded in whole."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from PIL import Image

from calibration.reading import Reader, Sample
from graphs.errors import UserError
from graphs.files import reason, shown
from graphs.preprocess.image import FORMATS, MAX_PIXELS

#: columns of public data sets of pictures and questions, the likeliest first
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "images", "img", "picture", "jpg", "png"),
    "question": ("question", "questions", "query", "prompt", "instruction", "problem", "text"),
    "answer": ("answer", "answers", "multiple_choice_answer", "label", "response", "output", "caption"),
}
#: rows among which the order is drawn; the stream is read in pieces of this size
SHUFFLED = 512


def hub_readers(name: str, seed: int = 0) -> Iterator[Reader]:
    """The rows of `NAME` or `NAME:SPLIT` (default `train`), shuffled by `seed` within a window of the stream.

    Raises UserError where the package is missing, the data set cannot be opened, or its columns are not recognised.
    """
    name, _, split = name.partition(":")
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        raise UserError(
            f"calibration data hf:{name} needs the package `datasets`: pip install datasets, or use zoo or a folder"
        ) from error
    try:
        stream = datasets.load_dataset(name, split=split or "train", streaming=True)
        rows = iter(stream.shuffle(seed=seed, buffer_size=SHUFFLED))
        first = next(rows, None)
    except Exception as error:  # the package raises its own, fsspec's, requests' and pyarrow's exceptions
        raise UserError(f"hf:{name}: cannot be opened: {reason(error)}") from error
    if first is None:
        raise UserError(f"hf:{name}: its split '{split or 'train'}' is empty")
    columns = guess_columns(first, f"hf:{name}")
    return readers(first, rows, columns, f"hf:{name}")


def guess_columns(row: Mapping[str, Any], where: str) -> dict[str, str | None]:
    """The columns that hold picture, question and answer. Raises UserError where one of the first two is not found."""
    names = {column.lower(): column for column in row}
    found = {kind: next((names[g] for g in guesses if g in names), None) for kind, guesses in COLUMNS.items()}
    for kind in ("image", "question"):
        if found[kind] is None:
            raise UserError(
                f"{where}: no {kind} among its columns {shown(', '.join(row))}; "
                f"it must be named one of {', '.join(COLUMNS[kind])}"
            )
    return found


def readers(
    first: Mapping[str, Any], rows: Iterator[Mapping[str, Any]], columns: Mapping[str, str | None], where: str
) -> Iterator[Reader]:
    """A reader a row, in the stream's order; where the stream itself fails, one that says so, and the end."""
    row, number = first, 1
    while True:
        yield partial(read, row, columns, f"{where} row {number}")
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            yield refusal(f"{where} row {number}: {reason(error)}")
            return


def refusal(why: str) -> Reader:
    """A reader that only says why it cannot read."""

    def refuse() -> Sample:
        raise UserError(why)

    return refuse


def read(row: Mapping[str, Any], columns: Mapping[str, str | None], where: str) -> Sample:
    """The sample of one row. Raises UserError naming the row."""
    image, question, answer = (first_of(row.get(columns[kind] or "")) for kind in ("image", "question", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: no question")
    return Sample(picture(image, where), question, answer if isinstance(answer, str) and answer else None)


def first_of(value: Any) -> Any:
    """The first of several pictures or answers."""
    return (value[0] if value else None) if isinstance(value, (list, tuple)) else value


def picture(value: Any, where: str) -> Image.Image:
    """A decoded picture, or one as `{"bytes": ...}`. Raises UserError."""
    raw = value.get("bytes") if isinstance(value, Mapping) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(raw), formats=FORMATS) if isinstance(raw, bytes) else value
            if not isinstance(image, Image.Image):
                raise UserError(f"{where}: no picture")
            if not 0 < image.width * image.height <= MAX_PIXELS:
                raise UserError(f"{where}: a picture of {image.width} x {image.height}, more than is allowed")
            return image.convert("RGB")
    except UserError:
        raise
    except Exception as error:  # decoders of hostile bytes raise anything
        raise UserError(f"{where}: a corrupt image: {reason(error)}") from error
