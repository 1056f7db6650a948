"""Pictures prepared as CLIP's are, then cut into patches, for towers that take any number of them: AIMv2's native one.

What does not fill a patch at the right and lower edge is left out, as a convolution leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from graphs.errors import UserError
from graphs.preprocess.image import ImageProcessor
from graphs.preprocess.navit import cut
from graphs.preprocess.picture import Array
from graphs.preprocess.raster import places


@dataclass(frozen=True)
class PatchedProcessor(ImageProcessor):
    """As `ImageProcessor`; `side`: of a patch, in pixels. `most`: patches along a side of a picture."""

    side: int = 14
    most: int = 64

    def __call__(self, image: Image.Image) -> tuple[Array, ...]:  # type: ignore[override]
        """Raw patches [N, 3, side, side] uint8 in RGB order, row by row; the row and column [N, 2] of each.

        Raises: UserError for a picture smaller than a patch or larger than the graph takes.
        """
        pixels = Image.fromarray(super().__call__(image)[0].transpose(1, 2, 0))
        rows, columns = pixels.height // self.side, pixels.width // self.side
        if not 0 < min(rows, columns) <= max(rows, columns) <= self.most:
            raise UserError(
                f"a picture of {pixels.width} x {pixels.height}: this model takes sides of {self.side} to "
                f"{self.most * self.side} pixels"
            )
        return np.ascontiguousarray(cut(pixels, self.side, rows, columns)), places(rows, columns)


PROCESSOR = PatchedProcessor
