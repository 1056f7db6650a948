"""Pictures of any size as windows of patches, for towers that attend within windows (Qwen2.5-VL, arXiv 2502.13923).

Every window is filled up to its full number of patches: those outside the picture see each other alone, and what
becomes of them is left out. So attention within windows is one batch, and costs as many pixels as there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphs.errors import UserError
from graphs.preprocess.patches import PatchProcessor, by_units, rows_and_columns, times
from graphs.preprocess.picture import Array

OUTSIDE = -1  # the group of patches that are not of the picture
SPARE = 16  # windows more than are half full: very small pictures, and very long ones, leave most of theirs empty


def in_windows(units: Array, side: int, fill: int) -> Array:
    """Units [T, H, W, ...] as windows [B, side**2, ...], those outside the picture filled with `fill`."""
    t, h, w, *rest = units.shape
    down, across = -(-h // side), -(-w // side)
    padding = [(0, 0), (0, down * side - h), (0, across * side - w), *[(0, 0) for _ in rest]]
    padded = np.pad(units, padding, constant_values=fill)
    split = padded.reshape(t, down, side, across, side, *rest)
    return split.swapaxes(2, 3).reshape(-1, side * side, *rest)


@dataclass(frozen=True)
class WindowProcessor(PatchProcessor):
    """`PatchProcessor` whose patches stand window by window. `window`: side of one, in embeddings."""

    window: int = 4

    def arrays(self, patches: NDArray[np.uint8]) -> tuple[Array, ...]:
        """What the encoder takes of patches [T, H, W, V]: B windows of P patches, those of an embedding side by side.

        Raw pixels, uint8 [B, P, V]; rows and columns [B, P, 2]; frames [B, P], within which patches see each other; and
        which of the B * P / U embeddings to take, [M] int64, in the order in which a prompt reads them.
        Raises: UserError for more than `most_windows`.
        """
        t, h, w, _ = patches.shape
        grid = t, h // self.merge_size, w // self.merge_size
        kinds = (patches, 0), (rows_and_columns((t, h, w)), 0), (times((t, h, w)), OUTSIDE)
        made = []
        for kind, fill in kinds:
            units = by_units(kind, self.merge_size)
            windows = in_windows(units.reshape(*grid, *units.shape[1:]), self.window, fill)
            made.append(windows.reshape(len(windows), -1, *kind.shape[3:]))
        if len(made[0]) > self.most_windows:
            raise UserError(
                f"{t} frame(s) of {w * self.patch_size} x {h * self.patch_size} stand in {len(made[0])} windows, "
                f"mostly empty; this bundle takes {self.most_windows}: give larger or fewer frames"
            )
        number = np.arange(grid[0] * grid[1] * grid[2], dtype=np.int64).reshape(grid)
        standing = in_windows(number, self.window, OUTSIDE).reshape(-1)
        order = np.empty(number.size, np.int64)
        order[standing[standing != OUTSIDE]] = np.flatnonzero(standing != OUTSIDE)
        return (*made, order)

    @property
    def most_windows(self) -> int:
        """The most windows that are taken: enough for `max_tokens` embeddings in half full ones, and some more."""
        return 2 * -(-self.max_tokens // self.window**2) + SPARE


PROCESSOR = WindowProcessor
