"""Pictures and videos of any size as patches, as Qwen2-VL cuts them (arXiv 2409.12191; numbers as in transformers).

A picture is resized to multiples of a merged patch, its number of pixels bounded, its shape nearly kept. Patches that
become one embedding stand side by side. A video is its frames, resized alike, `temporal_patch_size` of them to a patch;
a picture is a video that stands still for the length of one patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from graphs.config import ConfigReader
from graphs.errors import UserError
from graphs.preprocess.image import CLIP_MEAN, CLIP_STD
from graphs.preprocess.picture import Array, Picture, Processor

MAX_ASPECT = 200  # of a picture's longer side to its shorter
MAX_BUDGET = 1 << 27  # pixels that a configuration may ask for

Grid = tuple[int, int, int]  # patches in time, down, across


def within(height: int, width: int, factor: int, high: int) -> tuple[int, int]:
    """The largest size (height, width) of multiples of `factor`, of a picture's shape and of `high` pixels at most."""
    shrink = math.sqrt(height * width / high)
    return (
        max(factor, math.floor(height / shrink / factor) * factor),
        max(factor, math.floor(width / shrink / factor) * factor),
    )


def smart_resize(height: int, width: int, factor: int, low: int, high: int) -> tuple[int, int]:
    """Size (height, width) of multiples of `factor` pixels, `low` to `high` pixels in all where its shape allows.

    Raises: UserError for a picture more than `MAX_ASPECT` times as long as wide.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UserError(f"a picture of {width} x {height}: this model takes sides of up to {MAX_ASPECT} to 1")
    down, across = round(height / factor) * factor, round(width / factor) * factor
    if down * across > high:
        return within(height, width, factor, high)
    if down * across < low:
        grow = math.sqrt(low / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return down, across


def by_units(tensor: Array, merge: int) -> Array:
    """[T, H, W, ...] of patches as [T * H * W / merge**2, merge**2, ...]: those of one embedding side by side."""
    t, h, w, *rest = tensor.shape
    cut = tensor.reshape(t, h // merge, merge, w // merge, merge, *rest)
    return cut.swapaxes(2, 3).reshape(-1, merge * merge, *rest)


def cut(frames: NDArray[np.uint8], patch: int, temporal: int) -> NDArray[np.uint8]:
    """Frames [F, H, W, 3] as patches [F / temporal, H / patch, W / patch, V]: values by channel, time, row, column."""
    count, height, width, _ = frames.shape
    grid = count // temporal, height // patch, width // patch
    split = frames.reshape(grid[0], temporal, grid[1], patch, grid[2], patch, 3)
    return split.transpose(0, 2, 4, 6, 1, 3, 5).reshape(*grid, -1)


def rows_and_columns(grid: Grid) -> NDArray[np.int64]:
    """The place [T, H, W, 2] of each patch in its frame: row and column."""
    t, h, w = grid
    places = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    return np.broadcast_to(places, (t, h, w, 2)).astype(np.int64)


def times(grid: Grid) -> NDArray[np.int64]:
    """The place [T, H, W] of each patch in time."""
    return np.broadcast_to(np.arange(grid[0], dtype=np.int64)[:, None, None], grid)


@dataclass(frozen=True)
class PatchProcessor(Processor):
    """How a picture or a video becomes patches.

    `min_pixels`, `max_pixels`: of a picture or a frame. `max_tokens`: embeddings that a picture or a whole video may
    become; sizes are bounded to it. `fps`: frames a second of the videos that are given. `time_scale`: steps in time
    of rotary positions a second; 0 for one step a patch. `before`, `image`, `after`: how the prompt reads it, `image`
    once an embedding. The rest as in `ImageProcessor`.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    max_tokens: int = 1024
    fps: float = 2.0
    time_scale: float = 0.0
    before: str = "<|vision_start|>"
    image: str = "<|image_pad|>"
    after: str = "<|vision_end|>"
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255

    @property
    def factor(self) -> int:
        """Pixels along the side of what becomes one embedding."""
        return self.patch_size * self.merge_size

    def read(self, config: Mapping[str, Any]) -> Self:
        """This processor with what a preprocessor_config.json says. Raises: UserError naming the key at fault."""
        reader = ConfigReader(config, "preprocessor_config.json")
        for step in ("do_resize", "do_convert_rgb"):
            if not reader.bool(step, True):
                raise reader.error(f"{step} is false; pictures of this model are resized and RGB")
        for key in ("patch_size", "temporal_patch_size", "merge_size"):
            if (given := reader.int(key, getattr(self, key), high=1024)) != getattr(self, key):
                raise reader.error(f"{key} is {given}, the tower's is {getattr(self, key)}")
        size = reader.section("size")
        bounds = []
        for key, edge, default in (
            ("min_pixels", "shortest_edge", self.min_pixels),
            ("max_pixels", "longest_edge", self.max_pixels),
        ):
            nested = size.int(edge if edge in size else key, default, high=MAX_BUDGET)
            bounds.append(reader.int(key, nested, high=MAX_BUDGET))
        if bounds[0] > bounds[1]:
            raise reader.error(f"min_pixels {bounds[0]} is above max_pixels {bounds[1]}")
        normalize = reader.bool("do_normalize", True)
        return replace(
            self,
            min_pixels=bounds[0],
            max_pixels=bounds[1],
            resample=reader.int("resample", self.resample, low=0, high=5),
            image_mean=reader.floats("image_mean", self.image_mean, length=3) if normalize else (0.0, 0.0, 0.0),
            image_std=reader.floats("image_std", self.image_std, length=3, low=0.0) if normalize else (1.0, 1.0, 1.0),
            rescale_factor=reader.float("rescale_factor", 1 / 255) if reader.bool("do_rescale", True) else 1.0,
        )

    def frames(self, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
        """Frames [F, H, W, 3], F a multiple of `temporal_patch_size`: the last repeated, all of the first one's size.

        Raises: UserError for no frames, or where even the smallest are too many embeddings.
        """
        if not images:
            raise UserError("a video of no frames")
        steps = -(-len(images) // self.temporal_patch_size)
        room = self.max_tokens // steps * self.factor**2
        high = min(self.max_pixels, room)
        first = images[0]
        size = first.height, first.width, self.factor
        height, width = smart_resize(*size, min(self.min_pixels, high), high) if high else (0, 0)
        if height * width > room > 0:  # grown to no fewer pixels than that, and rounded up
            height, width = within(*size, room)
        tokens = steps * height * width // self.factor**2
        if not 0 < tokens <= self.max_tokens:
            raise UserError(
                f"{len(images)} frame(s) of {first.width} x {first.height} are more embeddings than the "
                f"{self.max_tokens} that this bundle takes: give fewer, or export with a larger --max-context"
            )
        shown = [image.convert("RGB").resize((width, height), resample=self.resample) for image in images]
        shown += shown[-1:] * (steps * self.temporal_patch_size - len(shown))
        return np.stack([np.asarray(image) for image in shown])

    def patches(self, image: Image.Image | Sequence[Image.Image]) -> NDArray[np.uint8]:
        """A picture, or the frames of a video, as patches [T, H, W, V]."""
        images = [image] if isinstance(image, Image.Image) else list(image)
        return cut(self.frames(images), self.patch_size, self.temporal_patch_size)

    def arrays(self, patches: NDArray[np.uint8]) -> tuple[Array, ...]:
        """What the encoder takes of patches [T, H, W, V]: M units of U patches each.

        Raw pixels, uint8 [M, U, V]; rows and columns [M, U, 2]; frames [M, U], within which patches see each other.
        """
        t, h, w, _ = patches.shape
        kinds = patches, rows_and_columns((t, h, w)), times((t, h, w))
        return tuple(np.ascontiguousarray(by_units(kind, self.merge_size)) for kind in kinds)

    def rope(self, grid: Grid) -> NDArray[np.int64]:
        """Positions [3, M] of a video's embeddings. Raises: UserError where time runs ahead of the decoder's table."""
        t, h, w = grid[0], grid[1] // self.merge_size, grid[2] // self.merge_size
        step = self.time_scale * self.temporal_patch_size / self.fps if self.time_scale and t > 1 else 1.0
        moments = (np.arange(t) * step).astype(np.int64)
        ids = np.stack(np.meshgrid(moments, np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1)
        if ids.max() >= ids.shape[1]:
            raise UserError(
                f"{t} moments of a video, {step:g} steps apart, outrun its {ids.shape[1]} embeddings: give larger or "
                "more frames"
            )
        return ids

    def __call__(self, image: Image.Image | Sequence[Image.Image]) -> tuple[Array, ...]:
        """What `arrays` gives of one picture, or of the frames of a video."""
        return self.arrays(self.patches(image))

    def picture(self, image: Image.Image | Sequence[Image.Image]) -> Picture:
        """The arrays, the text and the positions of one picture, or of the frames of a video."""
        patches = self.patches(image)
        t, h, w, _ = patches.shape
        tokens = t * h * w // self.merge_size**2
        text = self.before + self.image * tokens + self.after
        return Picture(self.arrays(patches), text, self.rope((t, h, w)))


PROCESSOR = PatchProcessor
