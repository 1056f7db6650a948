"""Places of patches in a shared table against PyTorch's own buckets, as transformers' towers compute them."""

from __future__ import annotations

import pytest
import torch

from graphs.preprocess.buckets import bucketed


@pytest.mark.parametrize("side", [4, 6, 26, 27, 32, 70])
def test_equals_torchs_buckets(side: int) -> None:
    edges = torch.arange(1 / side, 1.0, 1 / side)
    differences = []
    for count in range(1, 2 * side):
        fraction = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
        cells = torch.bucketize(fraction.clamp(max=1 - 1e-6), edges, right=True)
        found = torch.from_numpy(bucketed(count, 1, side)) // side
        differences += [count] if not torch.equal(found, cells) else []
        assert torch.equal(torch.from_numpy(bucketed(1, count, side)), found)
    assert not differences


def test_cells_are_rows_then_columns() -> None:
    assert bucketed(2, 4, 4).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert bucketed(1, 1, 70).tolist() == [0]
