from __future__ import annotations

import numpy as np
import pytest

from runtimes.mil.ops import OPERATORS
from tests.runtimes.mil.packages import check, mb


def test_slices(tmp_path):
    x = np.arange(2 * 5 * 6, dtype=np.float32).reshape(2, 5, 6)

    def updated(x):
        y = x.clone()
        y[:, 1:3, 2:6:2] = -1
        return y

    minus = np.full((2, 2, 2), -1, np.float32)
    cases = [
        (lambda x: mb.slice_by_index(x=x, begin=[0, 1, -3], end=[2, 4, -1]), lambda x: x[0:2, 1:4, -3:-1]),
        (lambda x: mb.slice_by_index(
            x=x, begin=[1, 0, 0], end=[0, 0, 0], stride=[1, 2, 1], begin_mask=[False, True, True],
            end_mask=[False, True, True], squeeze_mask=[True, False, False]),
         lambda x: x[1, ::2]),
        (lambda x: mb.slice_by_index(
            x=x, begin=[0, 4, 5], end=[2, 0, 0], stride=[1, -2, -1], end_mask=[False, False, True]),
         lambda x: x[:, [4, 2]].flip(2)),
        (lambda x: mb.slice_by_size(x=x, begin=[0, 2, 1], size=[1, -1, 3]), lambda x: x[:1, 2:, 1:4]),
        (lambda x: mb.slice_update(x=x, update=minus, begin=[0, 1, 2], end=[2, 3, 6], stride=[1, 1, 2]), updated),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": x})


def test_a_slice_beyond_the_tensor_is_refused():
    x = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"a slice 2\.\.5 of 4"):
        OPERATORS["slice_by_size"].run(x=x, begin=[0, 2], size=[4, 3])
    with pytest.raises(ValueError, match=r"writes \[4, 3\] to a slice of shape \[4, 2\]"):
        OPERATORS["slice_update"].run(x=x, update=np.zeros((4, 3), np.float32), begin=[0, 2], end=[4, 5])


def test_slice_update_leaves_its_operand_alone():
    x = np.zeros(4, np.float32)
    y = OPERATORS["slice_update"].run(x=x, update=np.ones(2, np.float32), begin=[1], end=[3])
    assert x.sum() == 0
    assert list(y) == [0, 1, 1, 0]
