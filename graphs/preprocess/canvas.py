"""Pictures on a canvas of whole tiles, as Llama 3.2 Vision reads them (transformers' MllamaImageProcessor).

A picture is fitted, its shape kept, into the arrangement of tiles that enlarges it least, or else shrinks it least;
what is left of the canvas is black. Tiles that the arrangement does not need are there all the same, and marked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.config import ConfigReader
from graphs.preprocess.picture import Array, Normalized, Picture

HALF = (0.5, 0.5, 0.5)


def arrangements(tiles: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most `tiles` tiles; an aspect ratio's id is its place in this list, from 1."""
    return [(a, b) for a in range(1, tiles + 1) for b in range(1, tiles + 1) if a * b <= tiles]


def best_arrangement(height: int, width: int, tiles: int, side: int) -> tuple[int, int]:
    """The (rows, columns) of tiles of `side` pixels for a picture: of several as good, one with the fewest tiles."""
    scales = {(a, b): min(a * side / height, b * side / width) for a, b in arrangements(tiles)}
    enlarging = [scale for scale in scales.values() if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales.values())
    return min((pair for pair, scale in scales.items() if scale == chosen), key=lambda pair: pair[0] * pair[1])


def fitted(height: int, width: int, canvas: tuple[int, int], side: int) -> tuple[int, int]:
    """The size (height, width) of a picture on a canvas (height, width); it grows to `side` pixels at most."""
    tall, wide = (min(max(size, side), room) for size, room in zip((height, width), canvas, strict=True))
    down, across = tall / height, wide / width
    if across < down:
        return min(math.floor(height * across) or 1, tall), wide
    return tall, min(math.floor(width * down) or 1, wide)


@dataclass(frozen=True)
class CanvasProcessor(Normalized):
    """How a picture becomes tiles of `side` pixels, `max_tiles` of them. `token` is how the prompt marks a picture."""

    side: int
    max_tiles: int = 4
    token: str = "<|image|>"
    resample: int = Image.Resampling.BILINEAR
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    rescale_factor: float = 1 / 255

    @classmethod
    def from_config(cls, config: Mapping[str, Any], side: int, tiles: int) -> CanvasProcessor:
        """What a preprocessor_config.json says, for `tiles` tiles of `side` pixels. Raises: UserError."""
        reader = ConfigReader(config, "preprocessor_config.json")
        for key in ("do_resize", "do_pad", "do_convert_rgb"):
            if not reader.bool(key, True):
                raise reader.error(f"{key} is false; pictures are fitted to a canvas of tiles here")
        size = reader.section("size")
        for key, value, wanted in (
            ("size.height", size.int("height", side), side),
            ("size.width", size.int("width", side), side),
            ("max_image_tiles", reader.int("max_image_tiles", 4), tiles),
        ):
            if value != wanted:
                raise reader.error(f"{key} is {value}; this tower takes {tiles} tiles of {side} x {side}")
        normalize = reader.bool("do_normalize", True)
        return cls(
            side,
            tiles,
            resample=reader.int("resample", Image.Resampling.BILINEAR, low=0, high=5),
            image_mean=reader.floats("image_mean", HALF, length=3, low=-1e3, high=1e3) if normalize else (0.0,) * 3,
            image_std=reader.floats("image_std", HALF, length=3, low=0.0, high=1e3) if normalize else (1.0,) * 3,
            rescale_factor=reader.float("rescale_factor", 1 / 255) if reader.bool("do_rescale", True) else 1.0,
        )

    def __call__(self, image: Image.Image) -> tuple[Array, ...]:
        """Raw pixels uint8 [P, 3, side, side] in RGB order, id of the aspect ratio int64 [1], tiles shown int64 [P].

        The last marks the tiles that the arrangement has by 1, the rest by 0.
        """
        image, side = image.convert("RGB"), self.side
        rows, columns = best_arrangement(image.height, image.width, self.max_tiles, side)
        height, width = fitted(image.height, image.width, (rows * side, columns * side), side)
        canvas = np.zeros((rows * side, columns * side, 3), np.uint8)
        canvas[:height, :width] = np.asarray(image.resize((width, height), resample=self.resample))
        tiles: NDArray[np.uint8] = np.zeros((self.max_tiles, 3, side, side), np.uint8)
        split = canvas.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
        tiles[: rows * columns] = split.reshape(-1, 3, side, side)
        ratio = arrangements(self.max_tiles).index((rows, columns)) + 1
        shown = (np.arange(self.max_tiles) < rows * columns).astype(np.int64)
        return tiles, np.array([ratio], np.int64), shown

    def picture(self, image: Image.Image) -> Picture:
        return Picture(self(image), self.token)


PROCESSOR = CanvasProcessor
