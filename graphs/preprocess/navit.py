"""Pictures of any shape as patches, none of them padding, as Idefics 2 sees them (Laurençon et al., arXiv 2405.02246).

A picture keeps its shape: it is scaled down where it is too long, stretched where it is too narrow, and cut into
patches; what does not fill one at its right and lower edge is left out. Split, its quarters come before it, in patches
of their own. Sizes are those of transformers' image processor; there a batch is padded to rectangles of pixels, here
only to as many patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.config import ConfigReader
from graphs.errors import UserError
from graphs.preprocess.buckets import bucketed
from graphs.preprocess.image import MAX_SIDE
from graphs.preprocess.picture import Normalized, Picture
from graphs.preprocess.splitting import HALF, statistics

#: patches [P, N, 3, K, K] uint8; their places in the table of positions and whether they are real, [P, N] int64
Patches = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]


def cut(image: Image.Image, side: int, rows: int, columns: int) -> NDArray[np.uint8]:
    """The upper left of a picture as patches [rows * columns, 3, side, side]; beyond its edges they are black."""
    pixels = np.asarray(image.crop((0, 0, columns * side, rows * side)))
    return pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)


def packed(images: Sequence[Image.Image], grids: Sequence[tuple[int, int]], side: int, table: int) -> Patches:
    """Pictures cut into `grids` of patches, as arrays that are as long as the one with most of them needs."""
    most = max(rows * columns for rows, columns in grids)
    patches = np.zeros((len(images), most, 3, side, side), np.uint8)
    positions, real = np.zeros((2, len(images), most), np.int64)
    for index, (image, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
        count = rows * columns
        patches[index, :count] = cut(image, side, rows, columns)
        positions[index, :count] = bucketed(rows, columns, table)
        real[index, :count] = 1
    return patches, positions, real


@dataclass(frozen=True)
class NavitProcessor(Normalized):
    """How a picture becomes patches and the words around them.

    `side`: of a patch, in pixels. `table`: cells along the side of the tower's table of positions. `tokens`: embeddings
    that a picture, or a quarter, becomes. `shortest` and `longest`: bounds of its sides in pixels. `split`: whether
    quarters are seen too. `resample`, `image_mean`, `image_std` and `rescale_factor` as in `ImageProcessor`.
    """

    side: int
    table: int
    tokens: int
    shortest: int = 378
    longest: int = 980
    split: bool = True
    resample: int = Image.Resampling.BILINEAR
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    rescale_factor: float = 1 / 255
    image: str = "<image>"
    around: str = "<fake_token_around_image>"

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, side: int, table: int, tokens: int) -> Self:
        """The processor that a preprocessor_config.json with the keys of Idefics2ImageProcessor describes.

        Without one, the sides of a picture are at most those of the tower's table, and at least 27/70 of it, as
        published. Raises: UserError.
        """
        if not config:
            return cls(side, table, tokens, max(side, side * table * 27 // 70), side * table)
        reader = ConfigReader(config, "preprocessor_config.json")
        size = reader.section("size")
        if size.values and not {"shortest_edge", "longest_edge"} <= size.values.keys():
            raise reader.error(f"size has {sorted(size.values)}; it must have shortest_edge and longest_edge")
        if not reader.bool("do_resize", True):
            raise reader.error("do_resize is false, so patches are without number; it must be true")
        longest = size.int("longest_edge", 980, high=MAX_SIDE)
        like = statistics(config)
        return cls(
            side,
            table,
            tokens,
            shortest=size.int("shortest_edge", 378, low=side, high=longest),
            longest=longest,
            split=reader.bool("do_image_splitting", False),
            resample=reader.int("resample", Image.Resampling.BILINEAR, low=0, high=5),
            image_mean=like.image_mean,
            image_std=like.image_std,
            rescale_factor=like.rescale_factor,
        )

    @property
    def pictures(self) -> int:
        """Pictures that one becomes."""
        return 5 if self.split else 1

    @property
    def patches(self) -> tuple[int, int]:
        """The fewest and the most patches of a picture."""
        return (self.shortest // self.side) ** 2, (self.longest // self.side) ** 2

    @property
    def text(self) -> str:
        """How a prompt reads a picture."""
        return self.around + (self.image * self.tokens + self.around) * self.pictures

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size (height, width) of a picture as it is cut."""
        ratio = width / height
        if width >= height and width > self.longest:
            height, width = int(self.longest / ratio), self.longest
        elif height > width and height > self.longest:
            height, width = self.longest, int(self.longest * ratio)
        return max(height, self.shortest), max(width, self.shortest)

    def __call__(self, image: Image.Image) -> Patches:
        """Patches, positions and whether they are real. Raises: UserError for a line of one pixel to be split."""
        image = image.convert("RGB")
        images = [image]
        if self.split:
            width, height, (middle, centre) = image.width, image.height, (image.width // 2, image.height // 2)
            if not middle or not centre:
                raise UserError(f"an image of {width} x {height} pixels has no quarters; this model splits pictures")
            down, across = ((0, centre), (centre, height)), ((0, middle), (middle, width))
            images = [*(image.crop((left, top, right, low)) for top, low in down for left, right in across), image]
        sizes = [self.resized(picture.height, picture.width) for picture in images]
        images = [
            picture.resize((width, height), resample=self.resample)
            for picture, (height, width) in zip(images, sizes, strict=True)
        ]
        return packed(
            images, [(height // self.side, width // self.side) for height, width in sizes], self.side, self.table
        )

    def picture(self, image: Image.Image) -> Picture:
        """The patches, and the words between which they stand."""
        return Picture(self(image), self.text)


PROCESSOR = NavitProcessor
