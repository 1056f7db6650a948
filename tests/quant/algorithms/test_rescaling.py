"""AWQ and SmoothQuant against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.algorithms import ALGORITHMS, RESCALINGS, awq, rtn, smoothquant
from quant.algorithms.inputs import Inputs
from quant.scheme import WeightScheme
from tests.numbers import relative_l2
from tests.quant.algorithms.test_gptq import correlated

INT4 = WeightScheme("int", 4, 32)
INT8 = WeightScheme("int", 8)


def weights(width: int = 64, seed: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(outputs, width, generator=generator) * 0.05 for outputs in (24, 40)]


def outlying(rows: int = 300, width: int = 64) -> Tensor:
    """Inputs with a few loud channels, as a language model's."""
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(5))
    values[:, [3, 20, 50]] *= 40
    return values


def test_awq_finds_the_best_power_of_the_mean_magnitude() -> None:
    rows, both = correlated(300, 64), weights()
    found = awq.rescale(both, INT4, Inputs(rows_RK=rows))

    def error(scale: Tensor) -> float:
        total = 0.0
        for weight in both:
            kept = rtn.quantize(weight * scale, INT4).dequantized()
            total += float(((rows / scale) @ kept.T - rows @ weight.T).square().sum())
        return total

    mean = rows.abs().mean(0)
    tried = []
    for step in range(20):
        power = (mean / mean.mean()) ** (step / 20)
        tried.append(power / (power.max() * power.min()).sqrt())
    best = min(tried, key=error)
    assert torch.allclose(found, best, rtol=1e-4)
    assert error(found) < error(torch.ones(64))


def test_awq_takes_other_statistics_for_rows() -> None:
    rows, both = correlated(300, 64), weights()
    hessian = rows.T @ rows / 300
    exact = awq.rescale(both, INT4, Inputs(rows_RK=rows))
    assert torch.allclose(awq.rescale(both, INT4, Inputs(hessian, absmean_K=rows.abs().mean(0))), exact, rtol=1e-4)
    assert awq.rescale(both, INT4, Inputs(square_K=hessian.diagonal())).isfinite().all()
    assert torch.equal(awq.rescale(both, INT4, Inputs(rows_RK=torch.zeros(9, 64))), torch.ones(64))


def test_rows_count_as_they_are_weighted() -> None:
    rows, both = correlated(60, 64), weights()
    counts = torch.arange(60) % 3 + 1
    repeated = rows.repeat_interleave(counts, 0)
    weighted = Inputs(rows_RK=rows, row_weights_R=counts.float())
    assert torch.allclose(weighted.hessian(), Inputs(rows_RK=repeated).hessian(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(weighted.absmean(), repeated.abs().mean(0), rtol=1e-5)
    assert weighted.output_error(both[0]) == pytest.approx(Inputs(rows_RK=repeated).output_error(both[0]), rel=1e-4)
    hessian = Inputs(hessian_KK=weighted.hessian())
    assert hessian.output_error(both[0]) == pytest.approx(weighted.output_error(both[0]), rel=1e-4)
    factors = torch.linspace(0.5, 2, 64)
    assert torch.allclose(
        weighted.divided_by(factors).hessian(), hessian.divided_by(factors).hessian(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("scheme", [INT4, WeightScheme("int", 3), WeightScheme("int", 3, 16, True)], ids=str)
def test_clipping_takes_the_best_range_for_each_channel_and_group(scheme: WeightScheme) -> None:
    rows, weight = correlated(100, 64), weights()[0]
    found = awq.clip(weight, scheme, Inputs(rows_RK=rows)).dequantized()
    group = scheme.group or 64
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    for begin in range(0, 64, group):
        part, seen = weight[:, begin : begin + group], rows[:, begin : begin + group]
        full = rtn.quantize(part, WeightScheme("int", scheme.bits, 0, scheme.asymmetric))
        zero = torch.zeros(()) if full.zero_point is None else full.zero_point
        best = torch.full((len(part),), torch.inf)
        for ratio in torch.linspace(1.0, 0.5, 21).tolist():
            scale = full.scale * ratio
            kept = (((part / scale).round() + zero).clamp(low, high) - zero) * scale
            best = torch.minimum(best, (seen @ (kept - part).T).square().sum(0))
        mine = (seen @ (found[:, begin : begin + group] - part).T).square().sum(0)
        assert torch.allclose(mine, best, rtol=1e-2, atol=1e-5)


def test_smoothquant_is_its_formula() -> None:
    both, absmax = weights(), torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1
    absmax[7] = 0
    found = smoothquant.rescale(both, INT8, Inputs(absmax_K=absmax))
    expected = (absmax / torch.cat(both).abs().amax(0)).sqrt()
    expected[7] = 1
    assert torch.allclose(found, expected, rtol=1e-5)


def test_smoothquant_halves_the_error_of_loud_inputs() -> None:
    rows, both = outlying(), weights()
    inputs = Inputs(rows_RK=rows)
    searched = smoothquant.rescale(both, INT8, inputs)
    fixed = smoothquant.factors(rows.abs().amax(0), both, 0.5)

    def error(scale: Tensor) -> float:
        given = smoothquant.round_activations(rows / scale)
        return max(
            relative_l2(given @ rtn.quantize(weight * scale, INT8).dequantized().T, rows @ weight.T) for weight in both
        )

    assert error(fixed) < 0.6 * error(torch.ones(64))
    assert error(searched) <= error(fixed) * 1.02


def test_every_algorithm_takes_every_scheme() -> None:
    inputs = Inputs(rows_RK=correlated(100, 64))
    for scheme in (INT4, INT8, WeightScheme("int", 4, 32, True), WeightScheme("float8", 8)):
        for name, algorithm in ALGORITHMS.items():
            kept = algorithm(weights()[0], scheme, inputs)
            assert kept.q.dtype == (torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn), name
            assert (kept.zero_point is not None) == scheme.asymmetric, name
            assert relative_l2(kept.dequantized(), weights()[0]) < 0.3, name
        for name, rescale in RESCALINGS.items():
            factors = rescale(weights(), scheme, inputs)
            assert factors.shape == (64,), name
            assert (factors > 0).all(), name
