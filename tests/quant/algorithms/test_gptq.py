"""GPTQ against the paper's plain recursion, and at its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphs.errors import UserError
from quant.algorithms import gptq, mse, rtn
from quant.algorithms.base import decode, encode
from quant.algorithms.inputs import Inputs
from quant.scheme import WeightScheme


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs [R, K] of strong correlation, some channels much louder than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 4, width, generator=generator)
    values = torch.randn(rows, width // 4, generator=generator) @ mix
    values += 0.3 * torch.randn(rows, width, generator=generator)
    return values * torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]


def naive(weight: Tensor, scheme: WeightScheme, hessian: Tensor, act_order: bool) -> Tensor:
    """Optimal brain quantization in a fixed order: after each input the inverse Hessian is made anew without it.

    float64, no blocks, no Cholesky factor. A group's scales are found as its first input comes, or all beforehand.
    """
    outputs, width = weight.shape
    group = scheme.group or width
    current, result = weight.double().clone(), torch.zeros(outputs, width, dtype=torch.float64)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(width, dtype=torch.float64)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(width))
    scales = {}
    if act_order:
        for begin in range(0, width, group):
            scales[begin] = mse.search(weight[:, begin : begin + group].unsqueeze(1), scheme)
    for position, k in enumerate(order):
        begin = k // group * group
        if begin not in scales:
            scales[begin] = mse.search(current[:, begin : begin + group].float().unsqueeze(1), scheme)
        scale, zero = scales[begin]
        scale, offset = scale[:, 0, 0].double(), 0.0 if zero is None else zero[:, 0, 0].double()
        low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
        result[:, k] = (((current[:, k] / scale).round() + offset).clamp(low, high) - offset) * scale
        left = order[position:]
        inverse = torch.linalg.inv(damped[left][:, left])
        error = (current[:, k] - result[:, k]) / inverse[0, 0]
        current[:, left] -= error[:, None] * inverse[0]
    return result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "scheme",
    [WeightScheme("int", 4), WeightScheme("int", 3, 16), WeightScheme("int", 4, 32, True), WeightScheme("int", 8, 64)],
    ids=str,
)
@pytest.mark.parametrize("block", [16, 48, 128])
def test_blocks_compute_the_plain_recursion(
    scheme: WeightScheme, act_order: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "BLOCK", block)
    rows = correlated(400, 192)
    hessian = rows.T @ rows / len(rows)
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(1)) * 0.05
    found = gptq.quantize(weight, scheme, Inputs(hessian_KK=hessian), act_order=act_order)
    expected = naive(weight, scheme, hessian, act_order)
    # a number in the middle of two points may fall to either in single precision, and what follows moves with it
    same = (found.dequantized() - expected).abs() < 1e-3 * expected.abs().max()
    assert same.float().mean() > 0.97

    def error(delta: Tensor) -> float:
        return float(((delta @ hessian.double()) * delta).sum())

    assert error(found.dequantized() - weight.double()) == pytest.approx(error(expected - weight), rel=0.02)
    assert error(found.dequantized() - weight.double()) < 0.5 * error(
        rtn.quantize(weight, scheme).dequantized() - weight.double()
    )


def test_the_factor_is_of_the_inverse() -> None:
    rows = correlated(300, 96)
    hessian = rows.T @ rows / 300
    factor = gptq.inverse_factor(hessian, torch.arange(len(hessian))).double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(96, dtype=torch.float64)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(96, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("scheme", [WeightScheme("int", 4, 32), WeightScheme("float8", 8)], ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_never_seen_are_rounded_to_nearest(scheme: WeightScheme, act_order: bool) -> None:
    rows = correlated(200, 64)
    rows[:, [3, 40, 63]] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    found = gptq.quantize(weight, scheme, Inputs(rows_RK=rows), act_order=act_order)
    steps = found.scale.repeat_interleave(64 // found.scale.shape[1], 1)
    nearest = decode(encode(weight, steps, None, scheme), steps, None)
    dead = [3, 40, 63]
    assert torch.equal(found.dequantized()[:, dead], nearest[:, dead])
    assert not torch.equal(found.dequantized(), nearest)
    assert found.dequantized().isfinite().all()


@pytest.mark.parametrize(
    "hessian",
    [torch.zeros(64, 64), torch.ones(64, 64), -torch.eye(64) + 1.0, torch.eye(64) * 1e-30, torch.eye(64) * 1e30],
    ids=["zero", "rank 1", "indefinite", "small", "large"],
)
def test_hessians_that_do_not_factor_still_quantize(hessian: Tensor) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    found = gptq.quantize(weight, WeightScheme("int", 4, 32), Inputs(hessian_KK=hessian))
    assert found.dequantized().isfinite().all()
    assert (found.dequantized() - weight).abs().max() < 4.0
    if bool((hessian == hessian.diag().diag()).all()):  # nothing to make up for: round to nearest on the same scales
        assert torch.equal(found.q, mse.quantize(weight, WeightScheme("int", 4, 32)).q)


def test_it_needs_inputs_and_is_deterministic() -> None:
    weight, scheme = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), WeightScheme("int", 4, 32)
    with pytest.raises(UserError, match="gptq needs the Hessian"):
        gptq.quantize(weight, scheme, Inputs(square_K=torch.ones(64)))
    inputs = Inputs(rows_RK=correlated(100, 64))
    assert torch.equal(gptq.quantize(weight, scheme, inputs).q, gptq.quantize(weight.clone(), scheme, inputs).q)


def test_rows_are_rounded_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, scheme = correlated(300, 96), WeightScheme("int", 4, 32)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    whole = gptq.quantize(weight, scheme, Inputs(rows_RK=rows))
    monkeypatch.setattr(gptq, "ROWS", 7 * 96)
    parted = gptq.quantize(weight, scheme, Inputs(rows_RK=rows))
    assert torch.equal(parted.scale, whole.scale)
    assert (parted.q != whole.q).float().mean() < 0.01  # products of other shapes differ in their last bits
