from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tests.runtimes.mil.packages import check, mb


def test_activations(tmp_path):
    x = np.random.default_rng(1).uniform(-8, 8, (2, 3, 4, 5)).astype(np.float32)
    a, b = np.array([0.1, 0.2, 0.3], np.float32), np.array([1.5, 0.5, 1.0], np.float32)
    column = torch.from_numpy(a).reshape(3, 1, 1), torch.from_numpy(b).reshape(3, 1, 1)
    cases = [
        (lambda x: mb.relu(x=x), F.relu),
        (lambda x: mb.relu6(x=x), F.relu6),
        (lambda x: mb.silu(x=x), F.silu),
        (lambda x: mb.sigmoid(x=x), torch.sigmoid),
        (lambda x: mb.softplus(x=x), F.softplus),
        (lambda x: mb.softsign(x=x), F.softsign),
        (lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu),
        (lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh")),
        (lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x * torch.sigmoid(1.702 * x)),
        (lambda x: mb.elu(x=x, alpha=np.float32(0.7)), lambda x: F.elu(x, 0.7)),
        (lambda x: mb.leaky_relu(x=x, alpha=np.float32(0.2)), lambda x: F.leaky_relu(x, 0.2)),
        (lambda x: mb.prelu(x=x, alpha=a), lambda x: F.prelu(x, torch.from_numpy(a))),
        (lambda x: mb.clamped_relu(x=x, alpha=np.float32(0.1), beta=np.float32(4)),
         lambda x: torch.where(x >= 0, x, 0.1 * x).clip(max=4)),
        (lambda x: mb.linear_activation(x=x, alpha=np.float32(2), beta=np.float32(3)), lambda x: 2 * x + 3),
        (lambda x: mb.scaled_tanh(x=x, alpha=np.float32(2), beta=np.float32(0.5)), lambda x: 2 * torch.tanh(0.5 * x)),
        (lambda x: mb.sigmoid_hard(x=x, alpha=np.float32(1 / 6), beta=np.float32(0.5)), F.hardsigmoid),
        (lambda x: mb.thresholded_relu(x=x, alpha=np.float32(-3)), lambda x: F.threshold(x, -3, 0)),
        (lambda x: mb.softplus_parametric(x=x, alpha=a, beta=b),
         lambda x: column[0] * torch.log1p(torch.exp(column[1] * x))),
        (lambda x: mb.softmax(x=x, axis=-1), lambda x: x.softmax(-1)),
        (lambda x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1)),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"x": x})
