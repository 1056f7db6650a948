"""GPTQ (Frantar et al., arXiv 2210.17323): rounds one input's weights at a time and lets later ones make up for it.

With H = E[x x^T] and U the upper Cholesky factor of its inverse, rounding column k of the weight by an error e costs
least when the columns behind it move by -e U[k, k:] / U[k, k]. Columns go in blocks, so that the far ones are updated
by one product a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphs.errors import UserError
from quant.algorithms import mse
from quant.algorithms.base import QuantizedWeight, blocks, by_rows, decode, encode, pack
from quant.algorithms.inputs import Inputs
from quant.scheme import WeightScheme

BLOCK = 128
ROWS = 1 << 23  # elements of the rows that are rounded at once: 32 MiB a temporary
BASE = 512  # the width from which on triangular matrices are inverted by halves
DAMPING = 0.01  # of the mean diagonal, the paper's; ten times more after each failure to factor


def quantize(
    weight_OK: Tensor, scheme: WeightScheme, inputs: Inputs | None = None, *, act_order: bool = True
) -> QuantizedWeight:
    """The weight rounded so that the layer's output, not the weight, stays near.

    `act_order` takes inputs by falling second moment, with the groups' scales fixed beforehand; without it a group's
    scales are found when its turn comes, on the weights as compensated by then. Scales come from `mse.search`, not
    weighted: measured nearer than weighted ones, since what matters most is made up for anyway. An input that
    calibration never saw is rounded to nearest. Raises UserError without a Hessian or rows to make it from, and where
    the group does not divide K.
    """
    if inputs is None or (inputs.hessian_KK is None and inputs.rows_RK is None):
        raise UserError("gptq needs the Hessian of the layer's inputs: calibrate with it, or choose mse")
    blocks(weight_OK[:1], scheme.group)  # before the Hessian is factored, whether they fit
    hessian = inputs.hessian()
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(hessian))
    factor = inverse_factor(hessian, order)

    def rows(some_OK: Tensor) -> QuantizedWeight:
        return compensated(some_OK, scheme, factor, order, act_order)

    return by_rows(weight_OK, rows, ROWS)


def compensated(
    weight_OK: Tensor, scheme: WeightScheme, factor_KK: Tensor, order_K: Tensor, act_order: bool
) -> QuantizedWeight:
    """Some rows rounded, input by input in the given order; rows know nothing of each other."""
    factor, order, width = factor_KK, order_K, len(order_K)
    whole = blocks(weight_OK, scheme.group)
    group = whole.shape[-1]
    columns = whole.view(len(weight_OK), -1).T[order].contiguous()  # [K, O]: a column of the weight lies together
    points = torch.empty_like(columns)
    static = act_order or group == width
    scale, zero = mse.search_by_rows(whole, scheme)  # [O, n, 1]
    size = BLOCK if static or group > BLOCK else BLOCK // group * group
    for begin in range(0, width, size):
        end = min(begin + size, width)
        errors = torch.empty_like(columns[begin:end])
        for k in range(begin, end):
            index = int(order[k]) // group
            if not static and k % group == 0:
                pending = columns[k : k + group].clone()
                done = k - begin  # of this block: what they owe to columns beyond it is not paid yet
                if done and k + group > end:
                    pending[end - k :] -= factor[begin:k, end : k + group].T @ errors[:done]
                fresh, fresh_zero = mse.search(pending.T.unsqueeze(1), scheme)
                scale[:, index : index + 1] = fresh
                if zero is not None and fresh_zero is not None:
                    zero[:, index : index + 1] = fresh_zero
            step, offset = scale[:, index, 0], None if zero is None else zero[:, index, 0]
            points[k] = encode(columns[k], step, offset, scheme)
            errors[k - begin] = (columns[k] - decode(points[k], step, offset)) / factor[k, k]
            if k + 1 < end:
                columns[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - begin], alpha=-1)
        if end < width:
            columns[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    placed = torch.empty_like(points)
    placed[order] = points
    return pack(placed.T.contiguous(), scale, zero, scheme)


def inverse_factor(hessian_KK: Tensor, order_K: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (H + damping)^-1, H in the given order of inputs, float32 [K, K].

    H = R R^T with R upper triangular (a Cholesky factor read from the other end), so U = R^-1: one factorisation and
    one triangular inverse instead of the paper's inverse and two factorisations. Damping grows until H factors; an
    input that was never seen (a zero row) gets the mean diagonal.
    """
    back_K = order_K.flip(0)
    hessian = hessian_KK[back_K[:, None], back_K]
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return torch.eye(len(hessian))
    plain = torch.where(diagonal > 0, diagonal, mean)
    damping, failed = DAMPING, True
    while failed:
        diagonal.copy_(plain + damping * mean)
        lower, info = torch.linalg.cholesky_ex(hessian)
        damping, failed = damping * 10, bool(info != 0)
    del hessian, diagonal  # as large as the factor, and its inverse
    return lower_inverse(lower).flip(0, 1).contiguous()


def lower_inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular [K, K] by halves: products of matrices, 2/3 of what solving for it takes."""
    size = len(lower)
    if size <= BASE:
        return torch.linalg.solve_triangular(lower, torch.eye(size), upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    first = inverse[:half, :half] = lower_inverse(lower[:half, :half])
    second = inverse[half:, half:] = lower_inverse(lower[half:, half:])
    torch.matmul(second, lower[half:, :half] @ first, out=inverse[half:, :half]).neg_()
    return inverse
