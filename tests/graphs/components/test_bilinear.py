"""Resizing by products with constant matrices against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from graphs.components.vision.bilinear import BilinearResize
from tests.numbers import relative_l2


@pytest.mark.parametrize(("before", "after"), [(64, 96), (9, 16), (7, 7), (20, 8), (5, 40)])
def test_equals_interpolation(before: int, after: int) -> None:
    x = torch.randn(2, 3, before, before, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x.double(), size=(after, after), mode="bilinear", align_corners=False)
    assert relative_l2(BilinearResize(before, after)(x), expected) <= 1e-6
