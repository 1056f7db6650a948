"""fp16 is evaluated as fp16: results are rounded, what overflows is infinite, sums are taken in fp32."""

from __future__ import annotations

import numpy as np
import pytest

from runtimes.mil.dtypes import round_fp16
from runtimes.mil.ops import OPERATORS
from tests.runtimes.mil.packages import mb, save, types

X = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float16)


def run(path, body, x=X, kind=types.fp16, name="a"):
    model = save(path / f"{name}.mlpackage", {"x": mb.TensorSpec(x.shape, kind)}, body)
    return list(model({"x": x}).values())


def test_results_are_fp16_and_rounded_once(tmp_path):
    weight = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float16)
    exp, linear, mean = run(
        tmp_path,
        lambda x: (mb.exp(x=x), mb.linear(x=x, weight=weight), mb.reduce_mean(x=x, axes=[1], keep_dims=False)),
    )
    assert {a.dtype for a in (exp, linear, mean)} == {np.dtype(np.float16)}
    assert np.array_equal(exp, np.exp(X.astype(np.float32)).astype(np.float16))
    exact = X.astype(np.float64) @ weight.T.astype(np.float64)
    assert np.abs(linear - exact).max() <= np.abs(exact).max() * 2**-11  # half a unit of the last place, once
    assert np.array_equal(mean, X.astype(np.float32).mean(1).astype(np.float16))


def test_overflow_is_visible_and_not_trapped(tmp_path):
    big = np.full((1, 4), 300, np.float16)
    square, back, total = run(
        tmp_path,
        lambda x: (mb.square(x=x), mb.sqrt(x=mb.square(x=x)), mb.reduce_sum(x=mb.mul(x=x, y=x), axes=[1])),
        big,
    )
    assert np.isinf(square).all()  # 90000 is more than 65504
    assert np.isinf(back).all()
    assert np.isinf(total).all()
    (mean,) = run(tmp_path, lambda x: mb.reduce_mean(x=x, axes=[1]), np.full((1, 4096), 60000, np.float16), name="b")
    assert mean.item() == 60000  # the sum inside the mean is taken in fp32


def test_a_mask_of_minus_30000_hides(tmp_path):
    mask = np.where(np.tri(4) > 0, 0, -30000).astype(np.float16)[None, None]
    qkv = X.reshape(1, 1, 4, 64)
    (out,) = run(tmp_path, lambda x: mb.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=mask), qkv)
    assert np.array_equal(out[0, 0, 0], qkv[0, 0, 0])  # the first query sees the first key alone
    scores = np.where(np.tri(4) > 0, qkv[0, 0].astype(np.float64) @ qkv[0, 0].astype(np.float64).T / 8, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights / weights.sum(1, keepdims=True) @ qkv[0, 0].astype(np.float64)
    assert np.linalg.norm(out[0, 0] - expected) / np.linalg.norm(expected) < 2e-3


def test_fp32_is_not_rounded(tmp_path):
    x = np.full((1, 1), 1.0001, np.float32)
    (y,) = run(tmp_path, lambda x: mb.mul(x=x, y=np.float32(300)), x, types.fp32)
    assert y.item() == np.float32(1.0001) * np.float32(300)


@pytest.mark.parametrize(
    ("value", "rounded"), [(1 + 2**-11, 1), (1 + 3 * 2**-11, 1 + 2**-9), (65519, 65504), (65520, np.inf), (2**-25, 0)]
)
def test_rounding_is_to_nearest_even(value, rounded):
    assert round_fp16(np.float64(value)).item() == rounded


def test_operators_that_move_values_do_not_compute():
    for name in ("reshape", "transpose", "concat", "slice_update", "gather", "read_state", "maximum"):
        assert OPERATORS[name].moves
    for name in ("add", "softmax", "linear", "conv", "layer_norm", "reduce_mean"):
        assert not OPERATORS[name].moves
