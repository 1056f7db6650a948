"""Videos as frames for two pathways, as SlowFast-LLaVA samples them (Xu et al., arXiv 2407.15841).

Of all frames at most so many are taken, from the middles of equal stretches; each is stretched to the tower's square.
Some of those, evenly from the first on, are seen in detail. A picture is a video of one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from graphs.errors import UserError
from graphs.preprocess.image import ImageProcessor
from graphs.preprocess.picture import Array, Picture


def middles(total: int, wanted: int) -> list[int]:
    """Which `wanted` of `total` frames are taken: the middle of each stretch, as the authors round."""
    edges = [int(np.round(float(total - 1) / wanted * index)) for index in range(wanted + 1)]
    return [(start + stop) // 2 for start, stop in pairwise(edges)]


@dataclass(frozen=True)
class SlowFastProcessor(ImageProcessor):
    """As `ImageProcessor` for each frame; `frames`: the most that are taken. `slow`: how many are seen in detail."""

    frames: int = 50
    slow: int = 10

    def __call__(self, image: Image.Image | Sequence[Image.Image]) -> tuple[Array, ...]:  # type: ignore[override]
        """Raw pixels [T, 3, H, W] uint8 in RGB order, and which of them are seen in detail, [slow] int64.

        Raises: UserError for a video of no frames.
        """
        given = [image] if isinstance(image, Image.Image) else list(image)
        if not given:
            raise UserError("a video of no frames")
        count = min(len(given), self.frames)
        taken = [super(SlowFastProcessor, self).__call__(given[index]) for index in middles(len(given), count)]
        return np.concatenate(taken), np.arange(self.slow, dtype=np.int64) * count // self.slow

    def picture(self, image: Image.Image | Sequence[Image.Image]) -> Picture:
        """The arrays of one picture, or of the frames of a video."""
        return Picture(self(image))


PROCESSOR = SlowFastProcessor
