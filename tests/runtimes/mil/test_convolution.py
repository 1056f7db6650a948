from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tests.runtimes.mil.packages import check, mb

rng = np.random.default_rng(5)
t = torch.from_numpy


def array(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def test_convolutions(tmp_path):
    x = array(2, 4, 9, 8)
    w, b, deep, up, group_up = array(6, 4, 3, 3), array(6), array(4, 1, 3, 3), array(4, 5, 3, 2), array(4, 3, 2, 2)
    cases = [
        (lambda x: mb.conv(
            x=x, weight=w, bias=b, strides=[2, 1], pad_type="custom", pad=[1, 1, 2, 2], dilations=[1, 2]),
         lambda x: F.conv2d(x, t(w), t(b), (2, 1), (1, 2), (1, 2))),
        (lambda x: mb.conv(x=x, weight=deep, pad_type="valid", groups=4), lambda x: F.conv2d(x, t(deep), groups=4)),
        (lambda x: mb.conv(x=x, weight=w, pad_type="custom", pad=[0, 1, 2, 0]),
         lambda x: F.conv2d(F.pad(x, (2, 0, 0, 1)), t(w))),
        (lambda x: mb.conv(x=x, weight=w, strides=[2, 2], pad_type="same"),
         lambda x: F.conv2d(F.pad(x, (0, 1, 1, 1)), t(w), stride=2)),
        (lambda x: mb.conv(x=x, weight=w, strides=[2, 2], pad_type="same_lower"),
         lambda x: F.conv2d(F.pad(x, (1, 0, 1, 1)), t(w), stride=2)),
        (lambda x: mb.conv_transpose(
            x=x, weight=up, bias=np.ones(5, np.float32), strides=[2, 3], pad_type="custom", pad=[1, 1, 0, 0]),
         lambda x: F.conv_transpose2d(x, t(up), torch.ones(5), (2, 3), (1, 0))),
        (lambda x: mb.conv_transpose(x=x, weight=group_up, strides=[2, 2], groups=2),
         lambda x: F.conv_transpose2d(x, t(group_up), None, 2, groups=2)),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": x})


def test_convolution_of_one_and_three_axes(tmp_path):
    w1, w3 = array(6, 4, 3), array(2, 4, 2, 2, 2)
    cases = [
        (lambda x, y: mb.conv(x=x, weight=w1, strides=[2], pad_type="custom", pad=[1, 1]),
         lambda x, y: F.conv1d(x, t(w1), stride=2, padding=1)),
        (lambda x, y: mb.conv(x=y, weight=w3), lambda x, y: F.conv3d(y, t(w3))),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": array(2, 4, 9), "y": array(1, 4, 3, 4, 5)})


def test_pools(tmp_path):
    x = array(2, 3, 7, 8)
    two, custom = {"kernel_sizes": [3, 2], "strides": [2, 2]}, {"pad_type": "custom", "pad": [1, 1, 1, 1]}
    cases = [
        (lambda x: mb.avg_pool(x=x, **two, pad_type="valid"), lambda x: F.avg_pool2d(x, (3, 2), 2)),
        (lambda x: mb.avg_pool(x=x, **two, **custom, exclude_padding_from_average=True),
         lambda x: F.avg_pool2d(x, (3, 2), 2, 1, count_include_pad=False)),
        (lambda x: mb.avg_pool(x=x, **two, **custom), lambda x: F.avg_pool2d(x, (3, 2), 2, 1)),
        (lambda x: mb.avg_pool(x=x, kernel_sizes=[3, 3], strides=[2, 2], **custom, ceil_mode=True),
         lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)),
        (lambda x: mb.max_pool(x=x, **two, **custom), lambda x: F.max_pool2d(x, (3, 2), 2, 1)),
        (lambda x: mb.max_pool(
            x=x, kernel_sizes=[3, 3], strides=[2, 2], pad_type="custom", pad=[0, 0, 0, 0], ceil_mode=True),
         lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True)),
        (lambda x: mb.l2_pool(x=x, **two, pad_type="valid"), lambda x: F.lp_pool2d(x, 2, (3, 2), 2)),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": x})


def test_enlarging(tmp_path):
    cases = [
        (lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
         lambda x: F.interpolate(x, scale_factor=(2, 3))),
        (lambda x: mb.upsample_bilinear(x=x, scale_factor_height=2, scale_factor_width=3, align_corners=True),
         lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear", align_corners=True)),
        (lambda x: mb.upsample_bilinear(
            x=x, scale_factor_height=2, scale_factor_width=2, align_corners=False, half_pixel_centers=True),
         lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": array(1, 2, 4, 5)})
