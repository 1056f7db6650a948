"""Pictures of any size as a raster of patches, as Pixtral sees them (Agrawal et al., arXiv 2410.07073).

A picture is scaled down where a side is too long, then stretched to whole patches. The prompt reads them row by row,
with a token at the end of every row and another one at the end of the picture. Sizes are those of transformers'.
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
from graphs.preprocess.image import CLIP_MEAN, CLIP_STD, MAX_SIDE, ImageProcessor
from graphs.preprocess.navit import cut
from graphs.preprocess.picture import Normalized, Picture


def places(rows: int, columns: int) -> NDArray[np.int64]:
    """Row and column [rows * columns, 2] of every patch, row by row."""
    return np.stack(np.divmod(np.arange(rows * columns), columns), axis=1).astype(np.int64)


@dataclass(frozen=True)
class RasterProcessor(Normalized):
    """How a picture becomes patches and what the prompt says of them.

    `side`: of a patch, in pixels. `max_height`, `max_width`: of a picture. `image`: the token of an embedding,
    `line_end` and `end`: those that stand behind a row and behind the last. The rest as in `ImageProcessor`.
    """

    side: int
    max_height: int
    max_width: int
    image: str = "[IMG]"
    line_end: str = "[IMG_BREAK]"
    end: str = "[IMG_END]"
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, side: int, longest: int) -> Self:
        """The processor that a preprocessor_config.json with the keys of PixtralImageProcessor describes.

        Without one, pictures are at most `longest` pixels long. Raises: UserError naming the key at fault, and where
        patches are not of the tower's `side`.
        """
        if not config:
            return cls(side, longest, longest)
        given = {key: value for key, value in config.items() if value is not None}
        reader = ConfigReader(given, "preprocessor_config.json")
        for step in ("do_resize", "do_convert_rgb"):
            if not reader.bool(step, True):
                raise reader.error(f"{step} is false; pictures of this model are resized to whole patches, and RGB")
        if reader.bool("do_center_crop", False):
            raise reader.error("do_center_crop is true; pictures of this model are seen whole")
        patch = given.get("patch_size", side)
        sides = set(patch.values()) if isinstance(patch, dict) else {patch}
        if sides != {side}:
            raise reader.error(f"patch_size is {patch}; this tower takes patches of {side} x {side}")
        size = reader.section("size")
        longest = size.int("longest_edge", longest, high=MAX_SIDE)
        made = cls(side, size.int("height", longest, high=MAX_SIDE), size.int("width", longest, high=MAX_SIDE))
        like = ImageProcessor.from_config({**given, "size": 1, "do_center_crop": False})
        return replace(
            made,
            resample=like.resample,
            image_mean=like.image_mean,
            image_std=like.image_std,
            rescale_factor=like.rescale_factor,
        )

    @property
    def most(self) -> tuple[int, int]:
        """The most rows and columns of patches."""
        return -(-self.max_height // self.side), -(-self.max_width // self.side)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that a picture of `height` x `width` becomes."""
        ratio = max(height / self.max_height, width / self.max_width, 1.0)
        height, width = (max(1, math.floor(length / ratio)) for length in (height, width))
        return -(-height // self.side), -(-width // self.side)

    def __call__(self, image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Raw patches [N, 3, side, side] uint8 in RGB order, row by row; the row and column [N, 2] of each."""
        rows, columns = self.grid(image.height, image.width)
        size = columns * self.side, rows * self.side
        pixels = image.convert("RGB").resize(size, resample=self.resample)
        return np.ascontiguousarray(cut(pixels, self.side, rows, columns)), places(rows, columns)

    def picture(self, image: Image.Image) -> Picture:
        """The patches, and the lines of tokens that stand for them."""
        rows, columns = self.grid(image.height, image.width)
        return Picture(self(image), self.line_end.join([self.image * columns] * rows) + self.end)


PROCESSOR = RasterProcessor
