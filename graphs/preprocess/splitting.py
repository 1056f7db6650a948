"""Pictures as tiles with their places written between them, as Idefics 3 does (Laurençon et al., arXiv 2408.12637).

A picture is stretched until its longer side has a fixed length, stretched again to whole tiles, cut row by row, and
seen once more as a whole in one tile, the last. The prompt says which tile follows: `<row_1_col_2>`, ...,
`<global-img>`. One that fits a single tile is that tile alone. Sizes are those of transformers' image processor, with
which SmolVLM's is identical.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.config import ConfigReader
from graphs.preprocess.image import MAX_SIDE, ImageProcessor
from graphs.preprocess.picture import Normalized, Picture

#: no picture is made longer than this, whatever a configuration says
LONGEST = 4096

#: mean and standard deviation of SigLIP's pixels
HALF = (0.5, 0.5, 0.5)


def stretched(height: int, width: int, longest: int) -> tuple[int, int]:
    """The size (height, width) with a longer side of `longest`, the shorter one even and its shape about kept."""
    ratio = width / height
    if width >= height:
        shorter = int(longest / ratio)
        return max(shorter + shorter % 2, 1), longest
    shorter = int(longest * ratio)
    return longest, max(shorter + shorter % 2, 1)


def limited(height: int, width: int, longest: int = LONGEST) -> tuple[int, int]:
    """The size (height, width) scaled down until neither side is above `longest`."""
    if max(height, width) <= longest:
        return height, width
    ratio = width / height
    if width >= height:
        return max(int(longest / ratio), 1), longest
    return longest, max(int(longest * ratio), 1)


def covering(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of tiles of `side` pixels that cover a picture, counted along its longer side first."""
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / side)
        return math.ceil(int(columns * side / ratio) / side), columns
    rows = math.ceil(height / side)
    return rows, math.ceil(int(rows * side * ratio) / side)


@dataclass(frozen=True)
class SplittingProcessor(Normalized):
    """How a picture becomes tiles and the words around them.

    `side`: of a tile, in pixels. `tokens`: embeddings that a tile becomes. `longest_edge`: of the picture before it is
    cut, in pixels, None to leave it. `split`: whether it is cut at all. `resample`, `image_mean`, `image_std` and
    `rescale_factor` as in `ImageProcessor`.
    """

    side: int
    tokens: int
    longest_edge: int | None
    split: bool = True
    resample: int = Image.Resampling.LANCZOS
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    rescale_factor: float = 1 / 255
    image: str = "<image>"
    around: str = "<fake_token_around_image>"
    whole: str = "<global-img>"

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, side: int, tokens: int) -> Self:
        """The processor that a preprocessor_config.json with the keys of Idefics3ImageProcessor describes.

        Without one, tiles have the tower's `side` and the longer side of a picture has four. Raises: UserError.
        """
        if not config:
            return cls(side, tokens, 4 * side)
        reader = ConfigReader(config, "preprocessor_config.json")
        edge = {key: reader.section(key) for key in ("size", "max_image_size")}
        for key, section in edge.items():
            if section.values and "longest_edge" not in section:
                raise reader.error(f"{key} has {sorted(section.values)}; it must have longest_edge")
        made = cls(
            side=edge["max_image_size"].int("longest_edge", 364, high=MAX_SIDE),
            tokens=tokens,
            longest_edge=edge["size"].int("longest_edge", 4 * 364, high=MAX_SIDE)
            if reader.bool("do_resize", True)
            else None,
            split=reader.bool("do_image_splitting", True),
            resample=reader.int("resample", Image.Resampling.LANCZOS, low=0, high=5),
        )
        if made.split and made.longest_edge is None:
            raise reader.error("do_resize is false, so tiles are without number: set do_image_splitting to false too")
        like = statistics(config)
        return replace(made, image_mean=like.image_mean, image_std=like.image_std, rescale_factor=like.rescale_factor)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles that a picture of `height` x `width` is cut into; (0, 0) where it is not cut."""
        if not self.split:
            return 0, 0
        rows, columns = covering(*self.resized(height, width), self.side)
        return (0, 0) if rows == columns == 1 else (rows, columns)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size (height, width) that a picture has before it is cut."""
        if self.longest_edge is None:
            return height, width
        return limited(*stretched(height, width, self.longest_edge))

    @property
    def tiles(self) -> tuple[int, int]:
        """The fewest and the most tiles, the whole picture counted as one: those of a line and of a square."""
        counts = [1 + rows * columns for rows, columns in (self.grid(1, MAX_SIDE), self.grid(1, 1))]
        return min(counts), max(counts)

    def text(self, rows: int, columns: int) -> str:
        """How a prompt reads a picture in `rows` x `columns` tiles."""
        embeddings = self.image * self.tokens
        lines = (
            "".join(f"{self.around}<row_{row + 1}_col_{column + 1}>{embeddings}" for column in range(columns)) + "\n"
            for row in range(rows)
        )
        last = f"{self.around}{self.whole}{embeddings}{self.around}"
        return "".join(lines) + ("\n" if rows else "") + last

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Raw pixels, uint8 [P, 3, side, side] in RGB order, the whole picture last."""
        image = image.convert("RGB")
        rows, columns = self.grid(image.height, image.width)
        side = self.side

        def resized(picture: Image.Image, height: int, width: int) -> Image.Image:
            return picture.resize((width, height), resample=self.resample)

        image = resized(image, *self.resized(image.height, image.width))
        image = resized(image, max(rows, 1) * side, max(columns, 1) * side)
        tiles = [
            image.crop((column * side, row * side, (column + 1) * side, (row + 1) * side))
            for row in range(rows)
            for column in range(columns)
        ]
        tiles.append(resized(image, side, side) if tiles else image)
        return np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])

    def picture(self, image: Image.Image) -> Picture:
        """The tiles, and the words between which they stand."""
        return Picture((self(image),), self.text(*self.grid(image.height, image.width)))


def statistics(config: Mapping[str, Any]) -> ImageProcessor:
    """Mean, deviation and scale of a preprocessor_config.json whose absent keys are SigLIP's. Raises: UserError."""
    given = {key: value for key, value in config.items() if value is not None}
    defaults = {"image_mean": list(HALF), "image_std": list(HALF)}
    return ImageProcessor.from_config({**defaults, **given, "do_resize": False, "do_center_crop": False})


PROCESSOR = SplittingProcessor
