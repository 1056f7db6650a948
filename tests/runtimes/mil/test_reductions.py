from __future__ import annotations

import numpy as np

from tests.runtimes.mil.packages import check, mb


def test_reductions_sorts_and_running_sums(tmp_path):
    x = np.random.default_rng(2).uniform(0.5, 2, (2, 3, 4)).astype(np.float32)
    how = {"axes": [1, 2], "keep_dims": True}
    cases = [
        (lambda x: mb.reduce_sum(x=x, axes=[-1], keep_dims=False), lambda x: x.sum(-1)),
        (lambda x: mb.reduce_mean(x=x, **how), lambda x: x.mean((1, 2), keepdim=True)),
        (lambda x: mb.reduce_max(x=x, **how), lambda x: x.amax((1, 2), keepdim=True)),
        (lambda x: mb.reduce_min(x=x, **how), lambda x: x.amin((1, 2), keepdim=True)),
        (lambda x: mb.reduce_prod(x=x, axes=[0], keep_dims=False), lambda x: x.prod(0)),
        (lambda x: mb.reduce_l1_norm(x=x, **how), lambda x: x.abs().sum((1, 2), keepdim=True)),
        (lambda x: mb.reduce_l2_norm(x=x, **how), lambda x: x.square().sum((1, 2), keepdim=True).sqrt()),
        (lambda x: mb.reduce_sum_square(x=x, **how), lambda x: x.square().sum((1, 2), keepdim=True)),
        (lambda x: mb.reduce_log_sum(x=x, **how), lambda x: x.sum((1, 2), keepdim=True).log()),
        (lambda x: mb.reduce_log_sum_exp(x=x, axes=[2], keep_dims=False), lambda x: x.logsumexp(2)),
        (lambda x: mb.reduce_argmax(x=x, axis=1, keep_dims=False), lambda x: x.argmax(1)),
        (lambda x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True), lambda x: x.argmin(-1, keepdim=True)),
        (lambda x: mb.cumsum(x=x, axis=1), lambda x: x.cumsum(1)),
        (lambda x: mb.cumsum(x=x, axis=2, exclusive=True, reverse=True),
         lambda x: x.flip(2).cumsum(2).sub(x.flip(2)).flip(2)),
        (lambda x: mb.argsort(x=x, axis=-1, ascending=True), lambda x: x.argsort(-1)),
        (lambda x: mb.topk(x=x, k=2, axis=-1), lambda x: tuple(x.topk(2, -1))),
        (lambda x: mb.topk(x=x, k=2, axis=1, ascending=True), lambda x: tuple(x.topk(2, 1, largest=False))),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": x})


def test_sorting_unsigned_integers_with_ties():
    from runtimes.mil.ops.reductions import argsort, topk

    x = np.array([[0, 7, 0, 9, 7]], np.uint16)
    assert argsort(x).tolist() == [[3, 1, 4, 0, 2]]
    assert argsort(x, ascending=True).tolist() == [[0, 2, 1, 4, 3]]
    assert [part.tolist() for part in topk(x, k=3)] == [[[9, 7, 7]], [[3, 1, 4]]]
