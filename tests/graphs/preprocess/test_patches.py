"""Patches: sizes as transformers chooses them, units of patches, and records of the processors."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from graphs.errors import UserError
from graphs.preprocess.patches import PatchProcessor, by_units, smart_resize, within
from graphs.preprocess.picture import from_json
from graphs.preprocess.thinned import ThinningProcessor
from graphs.preprocess.windows import OUTSIDE, WindowProcessor, in_windows


def test_sizes_are_transformers() -> None:
    generator = np.random.default_rng(0)
    for height, width in np.exp(generator.uniform(1.6, 8.5, (500, 2))).astype(int).tolist():
        bounds = (28, 56 * 56, 28 * 28 * 400)
        if max(height, width) <= 200 * min(height, width):
            assert smart_resize(height, width, *bounds) == reference(height, width, *bounds)
        else:
            with pytest.raises(UserError, match="200 to 1"):
                smart_resize(height, width, *bounds)


def test_what_grows_beyond_the_room_is_made_to_fit() -> None:
    assert smart_resize(36, 48, 8, 4096, 4096) == (56, 80)  # rounded up to more than is allowed
    assert within(36, 48, 8, 4096) == (48, 72)
    frames = PatchProcessor(4, min_pixels=10_000, max_pixels=20_000, max_tokens=64).frames([Image.new("RGB", (48, 36))])
    assert frames.shape == (2, 48, 72, 3)


def test_units_and_windows_keep_squares_together() -> None:
    grid = np.arange(24).reshape(1, 4, 6)
    assert by_units(grid, 2).tolist()[:2] == [[0, 1, 6, 7], [2, 3, 8, 9]]
    windows = in_windows(np.arange(6).reshape(1, 2, 3), 2, OUTSIDE)
    assert windows.tolist() == [[0, 1, 3, 4], [2, OUTSIDE, 5, OUTSIDE]]


@pytest.mark.parametrize("kind", [PatchProcessor, WindowProcessor, ThinningProcessor])
def test_processors_are_made_again_from_their_records(kind: type[PatchProcessor]) -> None:
    processor = kind(max_tokens=9, fps=3.0)
    again = from_json(processor.to_json())
    assert again == processor
    assert type(again) is kind
