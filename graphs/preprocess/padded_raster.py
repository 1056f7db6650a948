"""Pictures of any size as lines of patches, as Fuyu sees them (https://www.adept.ai/blog/fuyu-8b).

A picture is scaled down only where it is too large, and padded at the right and lower edge to whole patches. The
prompt reads them row by row, a token behind each row. Numbers as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.config import ConfigReader
from graphs.preprocess.image import MAX_SIDE, ImageProcessor
from graphs.preprocess.navit import cut
from graphs.preprocess.picture import Normalized, Picture
from graphs.preprocess.splitting import HALF


@dataclass(frozen=True)
class PaddedRasterProcessor(Normalized):
    """How a picture becomes patches and what the prompt says of them.

    `side`: of a patch, in pixels. `max_height`, `max_width`: of a picture, multiples of it. `padding`: the value of
    pixels beyond its edges, in all channels. `image`: the token of an embedding, `line_end`: the one behind a row,
    `before` and `end`: what stands around the picture. The rest as in `ImageProcessor`.
    """

    side: int
    max_height: int
    max_width: int
    padding: int = 1
    image: str = "|SPEAKER|"
    line_end: str = "|NEWLINE|"
    before: str = ""
    end: str = "<s>"  # a text begins behind the picture
    resample: int = Image.Resampling.BILINEAR
    image_mean: tuple[float, ...] = HALF
    image_std: tuple[float, ...] = HALF
    rescale_factor: float = 1 / 255

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, side: int) -> Self:
        """The processor that a preprocessor_config.json with the keys of FuyuImageProcessor describes.

        Without one, pictures are at most 36 x 64 patches, as published. Raises: UserError naming the key at fault, and
        where patches are not of the model's `side`.
        """
        height, width = 36 * side, 64 * side
        if not config:
            return cls(side, height, width)
        given = {key: value for key, value in config.items() if value is not None}
        reader = ConfigReader(given, "preprocessor_config.json")
        for step in ("do_resize", "do_pad", "do_convert_rgb"):
            if not reader.bool(step, True):
                raise reader.error(f"{step} is false; pictures of this model fit its bounds, in whole patches, in RGB")
        reader.choice("padding_mode", ("constant",), default="constant")
        patch, size = reader.section("patch_size"), reader.section("size")
        found = patch.int("height", side), patch.int("width", side)
        if found != (side, side):
            raise reader.error(f"patch_size is {found[0]} x {found[1]}; this model takes patches of {side} x {side}")
        bounds = size.int("height", height, high=MAX_SIDE), size.int("width", width, high=MAX_SIDE)
        if bounds[0] % side or bounds[1] % side:
            raise reader.error(f"size is {bounds[0]} x {bounds[1]}; both must be multiples of the patch's {side}")
        spread = {
            key: [value] * 3 if isinstance(value := given.get(key, 0.5), float) else value
            for key in ("image_mean", "image_std")
        }
        like = ImageProcessor.from_config({**given, **spread, "size": 1, "do_center_crop": False, "do_pad": False})
        return cls(
            side,
            *bounds,
            padding=int(reader.float("padding_value", 1.0, low=-1.0, high=255.0)),
            resample=reader.int("resample", Image.Resampling.BILINEAR, low=0, high=5),
            image_mean=like.image_mean,
            image_std=like.image_std,
            rescale_factor=like.rescale_factor,
        )

    @property
    def most(self) -> int:
        """The most patches of a picture."""
        return (self.max_height // self.side) * (self.max_width // self.side)

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """The size (height, width) of a picture within the bounds, its shape kept."""
        if width <= self.max_width and height <= self.max_height:
            return height, width
        scale = min(self.max_height / height, self.max_width / width)
        return max(1, int(height * scale)), max(1, int(width * scale))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches that a picture of `height` x `width` becomes."""
        height, width = self.fitted(height, width)
        return -(-height // self.side), -(-width // self.side)

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Raw patches [N, 3, side, side] uint8 in RGB order, row by row."""
        rows, columns = self.grid(image.height, image.width)
        height, width = self.fitted(image.height, image.width)
        picture = image.convert("RGB")
        if (width, height) != picture.size:
            picture = picture.resize((width, height), resample=self.resample)
        canvas = Image.new("RGB", (columns * self.side, rows * self.side), (self.padding,) * 3)
        canvas.paste(picture, (0, 0))
        return np.ascontiguousarray(cut(canvas, self.side, rows, columns))

    def picture(self, image: Image.Image) -> Picture:
        """The patches, and the lines of tokens that stand for them."""
        rows, columns = self.grid(image.height, image.width)
        lines = (self.image * columns + self.line_end) * rows
        return Picture((self(image),), self.before + lines + self.end)


PROCESSOR = PaddedRasterProcessor
