"""Activations by the names that config.json files give them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that CLIP was trained with (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (arXiv 1606.08415).

    Written out: XNNPACK has one GELU, the exact one, and takes this for it, which is off by 1e-4.
    """
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))


def relu2(x: Tensor) -> Tensor:
    """The squared ReLU (Primer, arXiv 2109.08668)."""
    return F.relu(x) * F.relu(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
}
