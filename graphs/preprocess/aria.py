"""Pictures within a fixed square as patches, as Aria sees them (arXiv 2410.05993).

A picture's longer side becomes that of the square, and it stands in the upper left corner; patches that show nothing of
it are left out. Split, it is fitted into the best of some resolutions first, centred on black, and cut into squares.
Sizes are those of transformers' image processor, which keeps the whole square and masks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from PIL import Image

from graphs.config import ConfigReader
from graphs.preprocess.image import MAX_SIDE
from graphs.preprocess.navit import Patches, packed
from graphs.preprocess.picture import Normalized, Picture
from graphs.preprocess.splitting import HALF, statistics
from graphs.preprocess.tiling import best_resolution, fitted

#: rows and columns of squares of 490 pixels
GRIDS = (
    *((1, columns) for columns in range(2, 9)),
    *((2, 4), (2, 3), (2, 2), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2)),
    *((rows, 1) for rows in range(5, 9)),
)
RESOLUTIONS = tuple((490 * rows, 490 * columns) for rows, columns in GRIDS)


@dataclass(frozen=True)
class AriaProcessor(Normalized):
    """How a picture becomes patches.

    `side`: of a patch, in pixels. `table`: cells along the side of the tower's table of positions. `tokens`: embeddings
    that a square becomes. `size`: side of the square, `shortest`: the least shorter side of a picture in it, in pixels.
    `resolutions`: (height, width) that pictures are split by, empty to see them whole. `resample`, `image_mean`,
    `image_std` and `rescale_factor` as in `ImageProcessor`.
    """

    side: int
    table: int
    tokens: int
    size: int = 980
    shortest: int = 336
    resolutions: tuple[tuple[int, int], ...] = ()
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    rescale_factor: float = 1 / 255
    image: str = "<|img|>"
    before: str = "<fim_prefix>"
    behind: str = "<fim_suffix>"

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, side: int, table: int, queries: Mapping[int, int]) -> Self:
        """The processor that a preprocessor_config.json with the keys of AriaImageProcessor describes.

        `queries`: embeddings of a square by its patches. Without a configuration, the square is the tower's. Raises:
        UserError.
        """
        reader = ConfigReader(config or {"max_image_size": side * table}, "preprocessor_config.json")
        size = reader.int("max_image_size", 980, low=side, high=MAX_SIDE)
        patches = (size // side) ** 2
        if patches not in queries:
            known = ", ".join(str(math.isqrt(count) * side) for count in sorted(queries))
            raise reader.error(f"max_image_size is {size}, which the projector has no queries for; it has for {known}")
        like = statistics(reader.values)
        return cls(
            side,
            table,
            queries[patches],
            size,
            shortest=min(reader.int("min_image_size", 336, high=MAX_SIDE), size),
            resolutions=read_resolutions(reader) if reader.bool("split_image", False) else (),
            resample=reader.int("resample", Image.Resampling.BICUBIC, low=0, high=5),
            image_mean=like.image_mean,
            image_std=like.image_std,
            rescale_factor=like.rescale_factor,
        )

    @property
    def pictures(self) -> tuple[int, int]:
        """The fewest and the most squares that a picture becomes."""
        counts = [math.ceil(height / self.size) * math.ceil(width / self.size) for height, width in self.resolutions]
        return min(counts, default=1), max(counts, default=1)

    @property
    def patches(self) -> tuple[int, int]:
        """The fewest and the most patches of a square that show a picture."""
        most = self.size // self.side
        return min(math.ceil(self.shortest / self.side), most) * most, most**2

    def split(self, image: Image.Image) -> list[Image.Image]:
        """The parts of a picture that become squares, row by row; at the edges they may be smaller."""
        if not self.resolutions:
            return [image]
        resolution = best_resolution(image.height, image.width, self.resolutions)
        height, width = fitted(image.height, image.width, resolution)
        canvas = Image.new("RGB", (resolution[1], resolution[0]))
        resized = image.resize((width, height), resample=self.resample)
        canvas.paste(resized, ((resolution[1] - width) // 2, (resolution[0] - height) // 2))
        return [
            canvas.crop((left, top, min(left + self.size, canvas.width), min(top + self.size, canvas.height)))
            for top in range(0, canvas.height, self.size)
            for left in range(0, canvas.width, self.size)
        ]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size (height, width) of a picture in its square."""
        scale = self.size / max(height, width)
        if width >= height:
            return max(int(height * scale), self.shortest), self.size
        return self.size, max(int(width * scale), self.shortest)

    def __call__(self, image: Image.Image) -> Patches:
        """Patches, positions and whether they are real."""
        most = self.size // self.side
        images, grids = [], []
        for part in self.split(image.convert("RGB")):
            height, width = self.resized(part.height, part.width)
            images.append(part.resize((width, height), resample=self.resample))
            grids.append((min(math.ceil(height / self.side), most), min(math.ceil(width / self.side), most)))
        return packed(images, grids, self.side, self.table)

    def picture(self, image: Image.Image) -> Picture:
        """The patches, and the words between which they stand."""
        made = self(image)
        return Picture(made, self.before + self.image * (self.tokens * len(made[0])) + self.behind)


def read_resolutions(config: ConfigReader) -> tuple[tuple[int, int], ...]:
    """`split_resolutions`, Aria's own where there are none. Raises: UserError."""
    given = config.values.get("split_resolutions")
    if given is None:
        return RESOLUTIONS

    def sized(pair: object) -> bool:
        return isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) and 0 < n <= MAX_SIDE for n in pair)

    if not isinstance(given, list) or not given or not all(map(sized, given)):
        raise config.error(f"split_resolutions must be pairs of numbers from 1 to {MAX_SIDE}")
    return tuple((height, width) for height, width in given)


PROCESSOR = AriaProcessor
