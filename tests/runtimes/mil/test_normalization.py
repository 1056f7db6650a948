from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tests.runtimes.mil.packages import check, mb


def test_norms(tmp_path):
    rng = np.random.default_rng(3)
    x = (3 * rng.standard_normal((2, 3, 4, 5)) + 1).astype(np.float32)
    g3, b3, m3 = (rng.standard_normal(3).astype(np.float32) for _ in range(3))
    v3 = rng.uniform(0.5, 2, 3).astype(np.float32)
    g45, b45 = (rng.standard_normal((4, 5)).astype(np.float32) for _ in range(2))
    t = torch.from_numpy
    eps = np.float32(1e-3)
    cases = [
        (lambda x: mb.layer_norm(x=x, axes=[2, 3], gamma=g45, beta=b45, epsilon=eps),
         lambda x: F.layer_norm(x, (4, 5), t(g45), t(b45), 1e-3)),
        (lambda x: mb.layer_norm(x=x, axes=[-1], epsilon=eps), lambda x: F.layer_norm(x, (5,), eps=1e-3)),
        (lambda x: mb.batch_norm(x=x, mean=m3, variance=v3, gamma=g3, beta=b3, epsilon=eps),
         lambda x: F.batch_norm(x, t(m3), t(v3), t(g3), t(b3), eps=1e-3)),
        (lambda x: mb.batch_norm(x=x, mean=m3, variance=v3, epsilon=eps),
         lambda x: F.batch_norm(x, t(m3), t(v3), eps=1e-3)),
        (lambda x: mb.instance_norm(x=x, gamma=g3, beta=b3, epsilon=eps),
         lambda x: F.instance_norm(x, weight=t(g3), bias=t(b3), eps=1e-3)),
        (lambda x: mb.l2_norm(x=x, epsilon=eps), lambda x: x / (x.square().sum((1, 2, 3), keepdim=True) + 1e-3).sqrt()),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": x}, 2e-5)
