"""Pictures of any resolution as tiles, and the order in which their embeddings are read, as LLaVA-NeXT does.

A picture is seen whole, at the side of the tower, and again in tiles: fitted into the best of some resolutions, padded
with black, cut. Behind the tower the tiles are put together, what shows padding is left out, and a learned newline ends
every row. All of that is known from the picture's size alone, so it is computed here, outside the graph, and becomes a
list of rows to take (https://llava-vl.github.io/blog/2024-01-30-llava-next; numbers as in transformers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.preprocess.image import CLIP_MEAN, CLIP_STD, ImageProcessor
from graphs.preprocess.picture import Normalized

#: row of the newline among the rows that the encoder gathers from; embeddings follow, tile by tile
NEWLINE = 0


def best_resolution(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The resolution (height, width) that keeps most of a picture's pixels, of several the one that wastes fewest."""

    def worth(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=worth)


def fitted(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """The size (height, width) of a picture within `target`, its shape kept."""
    down, across = target[0] / height, target[1] / width
    if across < down:
        return min(math.ceil(height * across), target[0]), target[1]
    return target[0], min(math.ceil(width * down), target[1])


def unpadded(height: int, width: int, rows: int, columns: int) -> tuple[slice, slice]:
    """The rows and columns of a grid of embeddings that show a picture of `height` x `width`, without its padding."""
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


def packing(height: int, width: int, resolution: tuple[int, int], side: int, grid: int) -> NDArray[np.int64]:
    """Rows [M] to take for a picture of `height` x `width` in tiles of `side` pixels and `grid` x `grid` embeddings.

    Row `NEWLINE` is the newline, then come those of the whole picture, then those of each tile.
    """
    down, across = resolution[0] // side, resolution[1] // side
    whole = np.arange(grid * grid) + 1
    tiles = np.arange(down * across * grid * grid).reshape(down, across, grid, grid) + 1 + grid * grid
    picture = tiles.transpose(0, 2, 1, 3).reshape(down * grid, across * grid)
    picture = picture[unpadded(height, width, *picture.shape)]
    lines = np.concatenate([picture, np.full((len(picture), 1), NEWLINE)], axis=1)
    return np.concatenate([whole, lines.reshape(-1)]).astype(np.int64)


@dataclass(frozen=True)
class TilingProcessor(Normalized):
    """How a picture becomes tiles and rows. `side`: of a tile, in pixels. `grid`: embeddings along it.

    `pinpoints`: the resolutions (height, width) to choose from. The rest as in `ImageProcessor`.
    """

    side: int
    grid: int
    pinpoints: tuple[tuple[int, int], ...]
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255

    @classmethod
    def of(
        cls, processor: ImageProcessor | None, side: int, grid: int, pinpoints: tuple[tuple[int, int], ...]
    ) -> TilingProcessor:
        """With the resampling and statistics of `processor`, CLIP's where there is none."""
        like = processor or ImageProcessor()
        return cls(side, grid, pinpoints, like.resample, like.image_mean, like.image_std, like.rescale_factor)

    @property
    def tiles(self) -> tuple[int, int]:
        """The fewest and the most tiles, the whole picture counted as one."""
        counts = [1 + (height // self.side) * (width // self.side) for height, width in self.pinpoints]
        return min(counts), max(counts)

    @property
    def most_tokens(self) -> int:
        """The most embeddings that a picture becomes: those of one that fills its resolution."""
        return max(len(packing(*pinpoint, pinpoint, self.side, self.grid)) for pinpoint in self.pinpoints)

    def __call__(self, image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Raw pixels, uint8 [P, 3, side, side] in RGB order, the whole picture first; and rows [M] to take."""
        image = image.convert("RGB")
        resolution = best_resolution(image.height, image.width, self.pinpoints)
        height, width = fitted(image.height, image.width, resolution)
        canvas = Image.new("RGB", (resolution[1], resolution[0]))
        resized = image.resize((width, height), resample=self.resample)
        canvas.paste(resized, ((resolution[1] - width) // 2, (resolution[0] - height) // 2))
        tiles = [image.resize((self.side, self.side), resample=self.resample)]
        tiles += [
            canvas.crop((left, top, left + self.side, top + self.side))
            for top in range(0, resolution[0], self.side)
            for left in range(0, resolution[1], self.side)
        ]
        pixels = np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])
        return pixels, packing(image.height, image.width, resolution, self.side, self.grid)


PROCESSOR = TilingProcessor
