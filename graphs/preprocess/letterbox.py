"""Pictures fitted into a square, bars of the mean colour around them, as DeepSeek-VL and Janus prepare them.

The longer side becomes that of the square, the shorter one no less than a minimum; then the rest is filled, so that
nothing is cut or distorted (https://github.com/deepseek-ai/DeepSeek-VL; sizes rounded as transformers does, which its
checkpoints' authors cut off).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.config import ConfigReader
from graphs.errors import UserError
from graphs.files import shown
from graphs.preprocess.image import CLIP_MEAN, CLIP_STD, MAX_SIDE
from graphs.preprocess.picture import Normalized, Picture

WHERE = "preprocessor_config.json"


def letterboxed(image: Image.Image, side: int, least: int, resample: int, colour: tuple[int, ...]) -> Image.Image:
    """`image`, RGB, as a square of `side` pixels: resized to fit, no side below `least`, and centred on `colour`."""
    scale = side / max(image.size)
    width, height = (max(round(length * scale), least) for length in image.size)
    resized = image.resize((width, height), resample=resample)
    if width == height:
        return resized
    square = Image.new("RGB", (side, side), colour)
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square


def as_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Raw pixels, uint8 [1, 3, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)[None])


def colour(mean: tuple[float, ...]) -> tuple[int, ...]:
    """The colour of bars: the mean, cut to whole numbers."""
    return tuple(min(255, max(0, int(value * 255))) for value in mean)


@dataclass(frozen=True)
class LetterboxProcessor(Normalized):
    """`side`: of the square, `least`: of any side of the picture in it, both in pixels. `bars`: their colour.

    A prompt reads the picture as `begin`, `mark` for each of `tokens` embeddings, `end`; as one placeholder where
    `tokens` is 0. The rest as in `ImageProcessor`.
    """

    side: int
    least: int = 14
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    bars: tuple[int, ...] = colour(CLIP_MEAN)
    begin: str = ""
    mark: str = ""
    end: str = ""
    tokens: int = 0

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Raw pixels, uint8 [1, 3, side, side] in RGB order."""
        return as_pixels(letterboxed(image.convert("RGB"), self.side, self.least, self.resample, self.bars))

    def picture(self, image: Image.Image) -> Picture:
        text = f"{self.begin}{self.mark * self.tokens}{self.end}" if self.tokens else ""
        return Picture((self(image),), text)


def read_letterbox(config: Mapping[str, Any] | None, side: int, prefix: str = "") -> dict[str, Any]:
    """Fields of a `LetterboxProcessor` that a preprocessor_config.json of DeepSeek-VL or Janus describes.

    `side` is the tower's, and the default; `prefix` begins the keys of a second tower. Raises: UserError for steps left
    out, and for another size than the tower's.
    """
    reader = ConfigReader(config or {}, WHERE)
    for step in ("do_resize", "do_pad", "do_rescale"):
        if not reader.bool(step, True):
            raise reader.error(f"{step} is false; pictures must be fitted, filled and rescaled for this tower")
    size = reader.values.get(f"{prefix}size") or {}
    if not isinstance(size, Mapping):
        raise reader.error(f"{prefix}size is {shown(repr(size), 60)}; it must be a JSON object")
    square = ConfigReader(size, f"{WHERE}: {prefix}size")
    default = reader.int("image_size", side, high=MAX_SIDE)  # as the authors' own files say it
    found = tuple(square.int(key, default, high=MAX_SIDE) for key in ("height", "width"))
    if found != (side, side):
        raise UserError(f"{WHERE}: {prefix}size is {found}; this tower takes pictures of {side} x {side}")
    mean = reader.floats(f"{prefix}image_mean", CLIP_MEAN, length=3, low=-1e3, high=1e3)
    std = reader.floats(f"{prefix}image_std", CLIP_STD, length=3, low=0.0, high=1e3)
    normalize = reader.bool("do_normalize", True)
    return {
        "side": side,
        "least": reader.int("min_size", 14, high=side),
        "resample": reader.int(f"{prefix}resample", Image.Resampling.BICUBIC, low=0, high=5),
        "image_mean": mean if normalize else (0.0, 0.0, 0.0),
        "image_std": std if normalize else (1.0, 1.0, 1.0),
        "rescale_factor": reader.float("rescale_factor", 1 / 255, low=0.0),
        "bars": colour(mean),
    }


PROCESSOR = LetterboxProcessor
