"""Pictures as tiles in the grid whose shape is closest to theirs, and a thumbnail, as InternVL 1.5 does.

A picture is stretched to fill the grid of tiles, cut row by row, and seen once more as a whole in one tile, the last
(Chen et al., arXiv 2404.16821; of grids equally close, the choice is that of transformers' image processor).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.config import ConfigReader
from graphs.preprocess.image import ImageProcessor
from graphs.preprocess.picture import Normalized, Picture

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: no configuration may ask for more tiles
MOST_TILES = 256


def grids(fewest: int, most: int) -> list[tuple[int, int]]:
    """All (columns, rows) of `fewest` to `most` tiles, those of fewer tiles first, then those of fewer columns."""
    sides = range(1, most + 1)
    found = [(columns, rows) for columns in sides for rows in sides if fewest <= columns * rows <= most]
    return sorted(found, key=lambda grid: grid[0] * grid[1])


def closest_grid(width: int, height: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the grid of tiles of `side` pixels with the ratio closest to that of a picture.

    Of two equally close, the one with more tiles wins where the picture has more than half of their pixels.
    """
    best, difference = (1, 1), float("inf")
    for columns, rows in grids(fewest, most):
        off = abs(width / height - columns / rows)
        fills = width * height > 0.5 * side * side * columns * rows
        if off < difference or (off == difference and fills):
            best, difference = (columns, rows), off
    return best


@dataclass(frozen=True)
class ClosestGridProcessor(Normalized):
    """How a picture becomes tiles and what the prompt says of them.

    `side`: of a tile, in pixels. `tokens`: embeddings that a tile becomes. `min_tiles`, `max_tiles`: of a grid, the
    thumbnail apart, which only a picture of several tiles has, where `thumbnail` says so. `before`, `image`, `after`:
    how the prompt reads a picture, `image` once an embedding. The rest as in `ImageProcessor`.
    """

    side: int
    tokens: int
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    before: str = "<img>"
    image: str = "<IMG_CONTEXT>"
    after: str = "</img>"
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    rescale_factor: float = 1 / 255

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, side: int, tokens: int) -> ClosestGridProcessor:
        """The processor that a preprocessor_config.json with the keys of GotOcr2ImageProcessor describes.

        Without one, that of the published checkpoints. Raises: UserError naming the key at fault, and where tiles are
        not of the tower's `side`.
        """
        if not config:
            return cls(side, tokens)
        given = {key: value for key, value in config.items() if value is not None}
        reader = ConfigReader(given, "preprocessor_config.json")
        size = reader.section("size")
        found = size.int("height", side), size.int("width", side)
        if found != (side, side):
            raise reader.error(f"size is {found[0]} x {found[1]}; this tower takes tiles of {side} x {side}")
        fewest, most = (reader.int(f"{bound}_patches", default, high=MOST_TILES) for bound, default in BOUNDS)
        if fewest > most:
            raise reader.error(f"min_patches {fewest} is above max_patches {most}")
        defaults = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
        like = ImageProcessor.from_config({**defaults, **given, "do_resize": False, "do_center_crop": False})
        return cls(
            side,
            tokens,
            fewest,
            most,
            resample=like.resample,
            image_mean=like.image_mean,
            image_std=like.image_std,
            rescale_factor=like.rescale_factor,
        )

    @property
    def most(self) -> int:
        """The most tiles of a picture, its thumbnail counted."""
        return self.max_tiles + (self.thumbnail and self.max_tiles > 1)

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Raw pixels, uint8 [P, 3, side, side] in RGB order, the thumbnail last."""
        image, side = image.convert("RGB"), self.side
        columns, rows = closest_grid(image.width, image.height, side, self.min_tiles, self.max_tiles)
        filled = image.resize((columns * side, rows * side), resample=self.resample)
        tiles = [
            filled.crop((left, top, left + side, top + side))
            for top in range(0, rows * side, side)
            for left in range(0, columns * side, side)
        ]
        if self.thumbnail and len(tiles) > 1:
            tiles.append(image.resize((side, side), resample=self.resample))
        return np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])

    def picture(self, image: Image.Image) -> Picture:
        """The tiles, and one placeholder for each of their embeddings."""
        tiles = self(image)
        return Picture((tiles,), self.before + self.image * (self.tokens * len(tiles)) + self.after)


#: the bounds of a grid's tiles where a preprocessor_config.json is silent
BOUNDS = (("min", 1), ("max", 12))

PROCESSOR = ClosestGridProcessor
