from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tests.runtimes.mil.packages import check, mb

rng = np.random.default_rng(4)


def array(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def test_products(tmp_path):
    x, y, w, b = array(2, 3, 4), array(2, 4, 5), array(6, 4), array(6)
    cases = [
        (
            lambda x, y: mb.linear(x=x, weight=w, bias=b),
            lambda x, y: F.linear(x, torch.from_numpy(w), torch.from_numpy(b)),
        ),
        (lambda x, y: mb.linear(x=x, weight=w), lambda x, y: F.linear(x, torch.from_numpy(w))),
        (lambda x, y: mb.matmul(x=x, y=y), torch.matmul),
        (lambda x, y: mb.matmul(x=x, y=x, transpose_x=False, transpose_y=True), lambda x, y: x @ x.mT),
        (lambda x, y: mb.matmul(x=y, y=x, transpose_x=True, transpose_y=True), lambda x, y: y.mT @ x.mT),
    ]
    check(tmp_path / "a.mlpackage", cases, {"x": x, "y": y})


def test_einsum(tmp_path):
    case = (
        lambda x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        lambda x, y: torch.einsum("nchw,nwhu->nchu", x, y),
    )
    check(tmp_path / "a.mlpackage", [case], {"x": array(2, 3, 4, 5), "y": array(2, 5, 4, 6)})


def test_attention_with_and_without_masks(tmp_path):
    q, k, v, mask = array(1, 2, 3, 8), array(1, 2, 5, 8), array(1, 2, 5, 8), array(3, 5)
    mask[:, 0] = 0  # so that the boolean mask hides no whole row
    cases = [
        (lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v),
         lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v)),
        (lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
         lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m)),
        (lambda q, k, v, m: mb.scaled_dot_product_attention(
            query=q, key=k, value=v, attn_mask=mb.greater(x=m, y=np.float32(-0.3))),
         lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m > -0.3)),
    ]  # fmt: skip
    check(tmp_path / "a.mlpackage", cases, {"q": q, "k": k, "v": v, "m": mask})
