"""What a picture becomes before the graph: the arrays that `vision_encoder` takes, and how the prompt reads it.

Processors are frozen dataclasses, one a file of this package, whose module names it as `PROCESSOR`: a bundle's manifest
records that file's name and the fields, and `from_json` makes the processor again, on any machine.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.errors import UserError, nearest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Picture:
    """One picture, or video, for one model.

    `arrays`: the inputs of `vision_encoder`, in order. `text`: how the prompt reads it, with one of the template's
    placeholders for each embedding and whatever stands between them; empty where one placeholder stands for all.
    `rope`: positions [3, n] int64 of its embeddings relative to the first, for decoders whose positions have three
    components (temporal, height, width).
    """

    arrays: tuple[Array, ...]
    text: str = ""
    rope: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class View:
    """Some of a picture's embeddings, `start` to `stop`, where a prompt reads them; `token`: the id that marks them."""

    picture: Picture
    start: int = 0
    stop: int | None = None
    token: int | None = None


class Processor:
    """Base of the picture processors: a call gives the array, or the tuple of arrays, that `vision_encoder` takes."""

    def __call__(self, image: Image.Image) -> Array | tuple[Array, ...]:
        raise TypeError(f"{type(self).__name__} must say what a picture becomes")

    def picture(self, image: Image.Image) -> Picture:
        """The arrays, and how a prompt reads them."""
        made = self(image)
        return Picture(made if isinstance(made, tuple) else (made,))

    def beside(self, directory: Path) -> Processor:
        """This processor with what it needs of the files in the directory of a checkpoint or bundle."""
        return self

    def asked(self, picture: Picture, words: str) -> Picture:
        """`picture` for the user's words; another where its encoder reads them too. Raises UserError."""
        return picture

    def to_json(self) -> dict[str, Any]:
        """JSON values from which `from_json` makes an equal processor."""
        assert is_dataclass(self)
        return {"type": type(self).__module__.rpartition(".")[2], **asdict(self)}


class Normalized(Processor):
    """A processor of raw pixels that says how the graph normalises them: pixels times a factor, less means, by std."""

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float


def pictures(processor: Processor | None, images: Sequence[Image.Image], words: str) -> list[Picture]:
    """Pictures for a model, asked about with `words`. Raises UserError where it takes none."""
    if processor is None:
        if images:
            raise UserError("this model takes no pictures")
        return []
    return [processor.asked(processor.picture(image), words) for image in images]


def tuples(value: Any) -> Any:
    """JSON lists as the tuples that they were, all the way down."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def from_json(record: dict[str, Any]) -> Processor:
    """The inverse of `to_json`. Raises UserError for a type that is not of this package, or other fields than its."""
    fields = {key: tuples(value) for key, value in record.items()}
    name = str(fields.pop("type", "image"))
    known = [module.name for module in pkgutil.iter_modules(importlib.import_module("graphs.preprocess").__path__)]
    found = importlib.import_module(f"graphs.preprocess.{name}") if name in known else None
    if not hasattr(found, "PROCESSOR"):
        raise UserError(f"a picture processor of type '{name}' is not known: {nearest(name, known)}")
    processor: type[Processor] = found.PROCESSOR  # type: ignore[union-attr]
    try:
        return processor(**fields)
    except TypeError as error:
        raise UserError(f"the record of a picture processor is damaged: {error}") from error
