"""A picture for two towers at once, as DeepSeek-VL's larger model sees it: fitted into a large square and a small one.

The small square is made from the large one, bars and all (as in transformers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.preprocess.image import CLIP_MEAN, CLIP_STD
from graphs.preprocess.letterbox import as_pixels, colour, letterboxed, read_letterbox
from graphs.preprocess.picture import Normalized


@dataclass(frozen=True)
class LetterboxPairProcessor(Normalized):
    """`side` and `large_side`: of the squares, in pixels. Fields with `large_` are the large square's, and the bars'.

    The rest as in `LetterboxProcessor`.
    """

    side: int
    large_side: int
    least: int = 14
    resample: int = Image.Resampling.BICUBIC
    large_resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    large_mean: tuple[float, ...] = CLIP_MEAN
    large_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    large_bars: tuple[int, ...] = colour(CLIP_MEAN)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, side: int, large_side: int) -> Self:
        """What a preprocessor_config.json describes, for towers of these sides. Raises: as `read_letterbox`."""
        small, large = read_letterbox(config, side), read_letterbox(config, large_side, "high_res_")
        return cls(
            side=side,
            large_side=large_side,
            least=small["least"],
            resample=small["resample"],
            large_resample=large["resample"],
            image_mean=small["image_mean"],
            image_std=small["image_std"],
            large_mean=large["image_mean"],
            large_std=large["image_std"],
            rescale_factor=small["rescale_factor"],
            large_bars=large["bars"],
        )

    def __call__(self, image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Raw pixels, uint8 [1, 3, side, side] and [1, 3, large_side, large_side] in RGB order."""
        large = letterboxed(image.convert("RGB"), self.large_side, self.least, self.large_resample, self.large_bars)
        small = large.resize((self.side, self.side), resample=self.resample)
        return as_pixels(small), as_pixels(large)


PROCESSOR = LetterboxPairProcessor
