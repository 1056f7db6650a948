from __future__ import annotations

import numpy as np
import pytest
import torch

from runtimes.mil.ops import OPERATORS
from tests.runtimes.mil.packages import check, mb

X = np.random.default_rng(7).standard_normal((3, 4, 5)).astype(np.float32)


def test_reading_by_index(tmp_path):
    rows, grid = np.array([2, 0], np.int32), np.array([[0, 3], [1, 1], [2, 0]], np.int32)
    along = np.random.default_rng(8).integers(0, 4, (3, 2, 5)).astype(np.int32)
    pairs = np.array([[2, 3], [0, 1]], np.int32)
    cases = [
        (lambda x: mb.gather(x=x, indices=rows, axis=0), lambda x: x[[2, 0]]),
        (lambda x: mb.gather(x=x, indices=np.int32(1), axis=2), lambda x: x[:, :, 1]),
        (lambda x: mb.gather(x=x, indices=grid, axis=1), lambda x: x[:, torch.from_numpy(grid).long()]),
        (lambda x: mb.gather(x=x, indices=grid, axis=1, batch_dims=1),
         lambda x: torch.stack([a[i] for a, i in zip(x, torch.from_numpy(grid).long(), strict=True)])),
        (lambda x: mb.gather_along_axis(x=x, indices=along, axis=1),
         lambda x: x.gather(1, torch.from_numpy(along).long())),
        (lambda x: mb.gather_nd(x=x, indices=pairs), lambda x: torch.stack([x[2, 3], x[0, 1]])),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": X})


def test_writing_by_index(tmp_path):
    rows, long = np.array([2, 0], np.int32), torch.tensor([2, 0])
    new = np.ones((3, 2, 5), np.float32)
    along = np.tile(np.array([[1], [3]], np.int32), (3, 1, 5))
    cases = [
        (lambda x: mb.scatter(data=x, indices=rows, updates=new, axis=1, mode="add"),
         lambda x: x.index_add(1, long, torch.ones(3, 2, 5))),
        (lambda x: mb.scatter(data=x, indices=rows, updates=new, axis=1, mode="update"),
         lambda x: x.index_copy(1, long, torch.ones(3, 2, 5))),
        (lambda x: mb.scatter_along_axis(data=x, indices=along, updates=new, axis=1, mode="add"),
         lambda x: x.scatter_add(1, torch.from_numpy(along).long(), torch.ones(3, 2, 5))),
        (lambda x: mb.scatter_nd(
            data=x, indices=np.array([[0, 1], [2, 3]], np.int32), updates=np.ones((2, 5), np.float32), mode="max"),
         lambda x: torch.stack([torch.stack([
             r.clip(min=1) if (i, j) in {(0, 1), (2, 3)} else r for j, r in enumerate(p)]) for i, p in enumerate(x)])),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": X})


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(IndexError, match="of 3"):
        OPERATORS["gather"].run(x=X, indices=np.array([0, index]), axis=0)
