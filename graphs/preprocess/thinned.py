"""Pictures and videos as patches of which still parts are left out, as VideoLLaMA 3 does (arXiv 2501.13106).

Each patch of a picture becomes an embedding. Frames of a video are merged, 2x2 patches to an embedding, and embeddings
whose pixels hardly differ from those of the frame before are not read. All of that is known from the pixels, so it is
a list of the patches behind each embedding, and the graph averages those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.preprocess.patches import PatchProcessor, by_units, rows_and_columns, times
from graphs.preprocess.picture import Array, Picture

TAPS = 4  # patches averaged for an embedding: bilinear sampling of a square at its centre, as few as they be


def centre(merge: int) -> NDArray[np.int64]:
    """Which patches [TAPS] of a square of `merge` x `merge` bilinear sampling halfway averages, repeated if odd."""
    low, high = (merge - 1) // 2, merge // 2
    return np.array([row * merge + column for row in (low, high) for column in (low, high)], np.int64)


@dataclass(frozen=True)
class ThinningProcessor(PatchProcessor):
    """`PatchProcessor` for pictures; frames of videos have bounds and a merge of their own.

    `video_max_pixels`: of all frames together. `threshold`: by how much, of 255 and as normalised, the pixels of an
    embedding must change on average to be read; below 0 all are.
    """

    temporal_patch_size: int = 1
    merge_size: int = 1
    fps: float = 1.0
    before: str = ""
    after: str = ""
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    video_merge_size: int = 2
    video_min_pixels: int = 28 * 28 * 128
    video_max_pixels: int = 28 * 28 * 768
    threshold: float = 0.1

    def of_video(self, frames: int) -> Self:
        """This processor with what holds for a video of so many frames in place of what does for pictures."""
        share = self.video_max_pixels // max(1, frames)
        return replace(self, merge_size=self.video_merge_size, min_pixels=self.video_min_pixels, max_pixels=share)

    def changing(self, units: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which embeddings [T, M] of units [T, M, U, V] are read: those that change, and one of each frame at least."""
        by_channel = units.reshape(*units.shape[:3], 3, -1)
        scale = 255 * self.rescale_factor / np.array(self.image_std)
        kept = np.ones(units.shape[:2], bool)
        for moment in range(1, len(units)):
            moved = np.abs(by_channel[moment].astype(np.int16) - by_channel[moment - 1])
            kept[moment] = (moved.mean((1, 3)) * scale).mean(-1) > self.threshold
            kept[moment, 0] |= not kept[moment].any()
        return kept

    def read_frames(self, image: Image.Image | Sequence[Image.Image]) -> tuple[tuple[Array, ...], list[int]]:
        """What the encoder takes, and how many embeddings of each frame are read."""
        one = isinstance(image, Image.Image)
        like = self if isinstance(image, Image.Image) else self.of_video(len(image))
        patches = like.patches(image)
        t, h, w, values = patches.shape
        merge = like.merge_size
        pixels = by_units(patches, merge).reshape(t, -1, merge**2, values)
        kept = np.ones(pixels.shape[:2], bool) if one else self.changing(pixels)
        units = np.flatnonzero(kept)[:, None] * merge**2 + centre(merge)
        places, moments = (by_units(kind((t, h, w)), merge) for kind in (rows_and_columns, times))
        few = max(0, TAPS - t * h * w)  # patches that a graph for at least TAPS of them lacks see each other alone
        flat = (
            np.pad(pixels.reshape(-1, values), ((0, few), (0, 0))),
            np.pad(places.reshape(-1, 2), ((0, few), (0, 0))),
            np.pad(moments.reshape(-1), (0, few), constant_values=-1),
        )
        return (*map(np.ascontiguousarray, flat), units), kept.sum(1).tolist()

    def __call__(self, image: Image.Image | Sequence[Image.Image]) -> tuple[Array, ...]:
        """What the encoder takes of one picture, or of the frames of a video: N patches, M embeddings.

        Raw pixels, uint8 [N, V]; rows and columns [N, 2]; frames [N], within which patches see each other; and the
        patches [M, TAPS] that each embedding is the mean of.
        """
        return self.read_frames(image)[0]

    def picture(self, image: Image.Image | Sequence[Image.Image]) -> Picture:
        """The arrays, and the text: of a video with the moment of each frame."""
        arrays, counts = self.read_frames(image)
        if isinstance(image, Image.Image):
            return Picture(arrays, self.before + self.image * counts[0] + self.after)
        frames = [f"Time {moment / self.fps:.1f}s:{self.image * count}" for moment, count in enumerate(counts)]
        return Picture(arrays, self.before + ",".join(frames) + self.after)


PROCESSOR = ThinningProcessor
