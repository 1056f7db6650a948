from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tests.runtimes.mil.packages import check, mb

rng = np.random.default_rng(6)


def test_shapes(tmp_path):
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    cases = [
        (lambda x: mb.reshape(x=x, shape=[4, -1]), lambda x: x.reshape(4, 6)),
        (lambda x: mb.reshape(x=x, shape=[1, 0, -1, 0]), lambda x: x.reshape(1, 2, 3, 4)),
        (lambda x: mb.transpose(x=x, perm=[2, 0, 1]), lambda x: x.permute(2, 0, 1)),
        (lambda x: mb.expand_dims(x=x, axes=[0, -1]), lambda x: x[None, ..., None]),
        (lambda x: mb.squeeze(x=mb.expand_dims(x=x, axes=[1, 2]), axes=[1]), lambda x: x[:, None]),
        (lambda x: mb.concat(values=[x, x, x], axis=1), lambda x: torch.cat([x, x, x], 1)),
        (lambda x: mb.concat(values=[x], axis=0), lambda x: x),
        (lambda x: mb.concat(values=[x, mb.mul(x=x, y=np.float32(2))], axis=1, interleave=True),
         lambda x: torch.stack([x, 2 * x], 2).flatten(1, 2)),
        (lambda x: mb.concat(values=[mb.reduce_max(x=x, axes=[0, 1, 2]), mb.reduce_min(x=x, axes=[0, 1, 2])], axis=0),
         lambda x: torch.stack([x.max(), x.min()])),
        (lambda x: mb.stack(values=[x, x], axis=1), lambda x: torch.stack([x, x], 1)),
        (lambda x: mb.split(x=x, num_splits=2, axis=2), lambda x: x.split(2, 2)),
        (lambda x: mb.split(x=x, split_sizes=[1, 2], axis=1), lambda x: x.split([1, 2], 1)),
        (lambda x: mb.tile(x=x, reps=[1, 2, 3]), lambda x: x.tile(1, 2, 3)),
        (lambda x: mb.flatten2d(x=x, axis=2), lambda x: x.reshape(6, 4)),
        (lambda x: mb.reverse(x=x, axes=[0, 2]), lambda x: x.flip(0, 2)),
        (lambda x: mb.shape(x=x), lambda x: torch.tensor(x.shape)),
        (lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], mode="constant", constant_val=np.float32(7)),
         lambda x: F.pad(x, (0, 3, 1, 2), value=7)),
        (lambda x: mb.pad(x=x, pad=[1, 2], mode="reflect"), lambda x: F.pad(x, (1, 2), mode="reflect")),
        (lambda x: mb.pad(x=x, pad=[1, 2], mode="replicate"), lambda x: F.pad(x, (1, 2), mode="replicate")),
        (lambda x: mb.band_part(x=x, lower=1, upper=0), lambda x: x.tril() - x.tril(-2)),
        (lambda x: mb.band_part(x=x, lower=-1, upper=1), lambda x: x.tril(1)),
        (lambda x: mb.fill(shape=[2, 2], value=np.float32(3)), lambda x: torch.full((2, 2), 3.0)),
        (lambda x: mb.fill_like(ref_tensor=x, value=np.float32(-1)), lambda x: torch.full_like(x, -1)),
        (lambda x: mb.fill(shape=mb.shape(x=x), value=np.float32(3)), lambda x: torch.full_like(x, 3)),
        (lambda x: mb.one_hot(indices=mb.reduce_argmax(x=x, axis=-1), one_hot_vector_size=4),
         lambda x: F.one_hot(x.argmax(-1), 4)),
        (lambda x: mb.non_zero(x=mb.cast(x=mb.greater(x=x, y=np.float32(0)), dtype="int32")),
         lambda x: (x > 0).nonzero()),
        (lambda x: mb.range_1d(start=mb.reduce_sum(x=mb.shape(x=x), axes=[0], keep_dims=False), end=20, step=3),
         lambda x: torch.arange(9, 20, 3)),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": x})


def test_space_and_depth(tmp_path):
    x = rng.standard_normal((1, 8, 4, 6)).astype(np.float32)

    def depth_to_space(x):  # TensorFlow's order, the block before the channels
        return x.reshape(1, 2, 2, 2, 4, 6).permute(0, 3, 4, 1, 5, 2).reshape(1, 2, 8, 12)

    cases = [
        (lambda x: mb.pixel_shuffle(x=x, upscale_factor=2), lambda x: F.pixel_shuffle(x, 2)),
        (lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(2)), lambda x: F.pixel_unshuffle(x, 2)),
        (lambda x: mb.depth_to_space(x=x, block_size=2), depth_to_space),
        (lambda x: mb.space_to_depth(x=mb.depth_to_space(x=x, block_size=2), block_size=2), lambda x: x),
    ]
    check(tmp_path / "a.mlpackage", cases, {"x": x})
