"""Specs, methods and their seeded examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphs.spec import Dim, Method, TensorSpec

LENGTH = Dim("sequence", 1, 10)
POSITION = TensorSpec("cache_position", (LENGTH,), torch.int64, "positions")
IDS = TensorSpec("input_ids", (1, LENGTH), torch.int64, "ids", 5)
PIXELS = TensorSpec("pixel_values", (1, 3, 8, 8), torch.uint8, "pixels")


def test_examples_are_of_the_spec_and_of_the_seed() -> None:
    ids = IDS.example({"sequence": 1000 // 100}, seed=1)
    assert ids.shape == (1, 10)
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < 5
    assert torch.equal(ids, IDS.example({"sequence": 10}, seed=1))
    assert not torch.equal(ids, IDS.example({"sequence": 10}, seed=2))
    pixels = PIXELS.example({}, seed=0)
    assert pixels.dtype == torch.uint8
    assert int(pixels.max()) > 200


def test_calls_of_a_stateful_method_follow_one_another() -> None:
    state = TensorSpec("cache", (1, 4))
    calls = list(Method("m", nn.Identity(), (IDS, POSITION), (), (state,)).examples(lengths=(4, 1, 2)))
    assert [position.tolist() for _, position in calls] == [[0, 1, 2, 3], [4], [5, 6]]
    assert [ids.shape[1] for ids, _ in calls] == [4, 1, 2]


def test_lengths_are_clipped_to_the_bounds() -> None:
    (call,) = Method("m", nn.Identity(), (IDS,), ()).examples(lengths=(99,))
    assert call[0].shape == (1, 10)


@pytest.mark.parametrize(("side", "expected"), [(32, 12), (448, 3), (2048, 3), (336, 5)])
def test_examples_hold_few_large_pictures(side: int, expected: int) -> None:
    tiles = TensorSpec("pixel_values", (Dim("tiles", 1, 40), 3, side, side), torch.uint8, "pixels")
    assert Method("m", nn.Identity(), (tiles,), ()).example_length == expected
    assert Method("m", nn.Identity(), (IDS, PIXELS), ()).example_length == 12  # one picture, whatever its size
