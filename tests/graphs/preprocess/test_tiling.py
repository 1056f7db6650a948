"""Tiles and rows against transformers' own arithmetic, over sizes from slivers to panoramas."""

from __future__ import annotations

import numpy as np
import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from graphs.preprocess.tiling import NEWLINE, best_resolution, fitted, packing, unpadded

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def sizes() -> list[tuple[int, int]]:
    drawn = np.random.default_rng(0).integers(1, 3000, (300, 2)).tolist()
    return [(1, 1), (1, 2999), (2999, 1), (336, 336), (672, 672), (673, 671), *map(tuple, drawn)]


def test_resolutions_and_sizes_are_transformers() -> None:
    for height, width in sizes():
        best = best_resolution(height, width, PINPOINTS)
        assert best == select_best_resolution((height, width), [list(pinpoint) for pinpoint in PINPOINTS])
        image = np.empty((3, height, width), np.uint8)
        assert fitted(height, width, best) == get_patch_output_size(image, best, "channels_first")


def test_what_shows_padding_is_left_out_as_in_transformers() -> None:
    for height, width in sizes():
        for rows, columns in ((24, 48), (48, 48), (72, 24)):
            grid = torch.arange(rows * columns).reshape(1, rows, columns)
            expected = unpad_image(grid, (height, width))[0]
            assert torch.equal(grid[0][unpadded(height, width, rows, columns)], expected)


def test_rows_go_across_tiles_and_end_in_a_newline() -> None:
    rows = packing(48, 96, (48, 96), side=48, grid=2)  # two tiles side by side, which a picture fills
    whole, first, second = np.arange(4) + 1, np.arange(4) + 5, np.arange(4) + 9
    lines = [[*first[:2], *second[:2], NEWLINE], [*first[2:], *second[2:], NEWLINE]]
    assert rows.tolist() == [*whole, *lines[0], *lines[1]]
