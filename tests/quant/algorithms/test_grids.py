"""Rounding, range search, palettes and activation ranges against brute force."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from graphs.errors import UserError
from quant.algorithms import base, mse, rtn
from quant.algorithms.activations import activation_range, float8_scale
from quant.algorithms.base import QuantizedWeight
from quant.algorithms.distribution import Distribution
from quant.algorithms.inputs import Inputs
from quant.algorithms.palette import palette
from quant.scheme import WeightScheme
from tests.numbers import relative_l2

SCHEMES = [
    WeightScheme("int", bits, group, asymmetric)
    for bits, group, asymmetric in itertools.product((3, 4, 8), (0, 32), (False, True))
]


def weight(outputs: int = 12, inputs: int = 64, seed: int = 0) -> Tensor:
    """Heavy-tailed and off centre, with a row and a block of zeros, and a row of one sign."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(outputs, inputs, generator=generator) ** 3 * 0.05 + 0.01
    values[1] = 0
    values[2, :32] = 0
    values[3] = values[3].abs()
    return values


def naive(values: Tensor, scheme: WeightScheme) -> Tensor:
    """Round to nearest, one number at a time: what a grid of this kind can represent of each block."""
    result = values.clone().double().numpy()
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    group = scheme.group or result.shape[1]
    for row in result:
        for begin in range(0, len(row), group):
            block = row[begin : begin + group]
            least, most = min(block.min(), 0.0), max(block.max(), 0.0)
            zero = 0
            if scheme.asymmetric:
                scale = max((most - least) / (high - low), 2**-24)
                zero = round(low - least / scale)
            else:
                scale = max(most / high, least / low, 2**-24)
            block[:] = [(min(max(round(x / scale) + zero, low), high) - zero) * scale for x in block]
    return torch.from_numpy(result)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_round_to_nearest_is_the_definition(scheme: WeightScheme) -> None:
    values = weight()
    quantized = rtn.quantize(values, scheme)
    groups = 64 // (scheme.group or 64)
    assert quantized.q.dtype == torch.int8
    assert quantized.q.shape == values.shape
    assert quantized.scale.shape == (12, groups)
    assert (quantized.zero_point is not None) == scheme.asymmetric
    assert int(quantized.q.min()) >= -(2 ** (scheme.bits - 1))
    assert int(quantized.q.max()) <= 2 ** (scheme.bits - 1) - 1
    expected = naive(values, scheme)
    # a number in the middle of two points may fall to either in single precision
    steps = (quantized.dequantized() - expected).abs() / quantized.scale.repeat_interleave(64 // groups, 1)
    assert (steps > 1e-3).float().mean() < 0.01
    assert steps.max() < 1.001


@pytest.mark.parametrize("algorithm", [rtn, mse])
@pytest.mark.parametrize("scheme", [*SCHEMES, WeightScheme("float8", 8)], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30, -3.0])
def test_constant_weights_have_finite_positive_scales(algorithm: object, scheme: WeightScheme, value: float) -> None:
    values = torch.full((3, 64), value)
    quantized = algorithm.quantize(values, scheme)  # type: ignore[attr-defined]
    assert (quantized.scale > 0).all()
    assert quantized.scale.isfinite().all()
    assert (quantized.dequantized() - values).abs().max() <= max(0.01 * abs(value), 1e-29)


def test_groups_that_do_not_divide_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"groups of 128 do not divide 192 inputs: choose from 32, 64"):
        rtn.quantize(torch.zeros(4, 192), WeightScheme("int", 4, 128))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_range_search_is_as_good_as_brute_force(scheme: WeightScheme) -> None:
    """Of scales 0.2 to 1.1 in steps of 0.5%, and every zero point, one block at a time."""
    values = weight(outputs=4)
    importance = torch.linspace(0.2, 3.0, 64)
    weights = importance / importance.mean()
    found = mse.quantize(values, scheme, Inputs(square_K=importance))
    group = scheme.group or 64
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    zeros = range(low, high + 1) if scheme.asymmetric and scheme.bits < 8 else [0]
    if scheme.asymmetric and scheme.bits == 8:
        assert found.zero_point is not None
        zeros = sorted({int(z) for z in found.zero_point.flatten()})
    total, best_total = 0.0, 0.0
    for row, begin in itertools.product(range(4), range(0, 64, group)):
        block, cost = values[row, begin : begin + group].numpy(), weights[begin : begin + group].numpy()
        span = max(float(np.ptp(np.append(block, 0))) / (high - low), 1e-9)
        whole = span if scheme.asymmetric else max(float(np.abs(block).max()) / high, 1e-9)
        scales = whole * np.arange(0.2, 1.1, 0.005)[:, None]
        best = min(
            (cost * ((np.clip(np.round(block / scales) + zero, low, high) - zero) * scales - block) ** 2).sum(1).min()
            for zero in zeros
        )
        mine = found.dequantized()[row, begin : begin + group].numpy()
        total, best_total = total + float((cost * (mine - block) ** 2).sum()), best_total + float(best)
    assert total <= 1.1 * best_total + 1e-12


def test_range_search_weighs_inputs_by_their_squares() -> None:
    values, square = weight(64, 64, 3), torch.logspace(-2, 2, 64)
    scheme = WeightScheme("int", 3)
    costs = [
        float(((found.dequantized() - values).square() * square).sum())
        for found in (mse.quantize(values, scheme, Inputs(square_K=square)), mse.quantize(values, scheme))
    ]
    assert costs[0] < 0.95 * costs[1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("algorithm", [rtn, mse])
def test_results_do_not_depend_on_how_many_rows_are_worked_on_at_once(
    monkeypatch: pytest.MonkeyPatch, algorithm: ModuleType, scheme: WeightScheme
) -> None:
    rows = weight(50).half()
    whole = algorithm.quantize(rows, scheme)
    monkeypatch.setattr(base, "CHUNK", 7 * 64)
    parts = algorithm.quantize(rows, scheme)
    assert torch.equal(parts.q, whole.q)
    assert torch.equal(parts.scale, whole.scale)
    assert (parts.zero_point is None) == (not scheme.asymmetric)
    assert whole.zero_point is None or torch.equal(parts.zero_point, whole.zero_point)


def test_float8_puts_each_channels_largest_on_448() -> None:
    values = weight()
    quantized = rtn.quantize(values, WeightScheme("float8", 8))
    assert quantized.q.dtype == torch.float8_e4m3fn
    filled = [0, *range(2, 12)]
    assert torch.equal(quantized.q.float().abs().amax(1)[filled], torch.full((11,), 448.0))
    assert relative_l2(quantized.dequantized(), values) < 2**-4 / 3**0.5  # half a step of three bits of mantissa
    assert float(float8_scale(-0.0)) > 0
    assert float(float8_scale(896.0)) == 2.0


def test_dequantized_follows_the_layout() -> None:
    q = torch.arange(-4, 4, dtype=torch.int8).view(2, 4)
    scale, zero = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[0, 1], [-1, 2]], dtype=torch.int8)
    expected = torch.tensor([[-4.0, -3, -6, -4], [4, 8, 0, 8]])
    assert torch.equal(QuantizedWeight(q, scale, zero).dequantized(), expected)


def lloyd(values: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Weighted k-means from `levels`, by distances of every value to every level."""
    for _ in range(300):
        nearest = np.abs(values[:, None] - levels[None]).argmin(1)
        moved = levels.copy()
        for index in range(len(levels)):
            mine = nearest == index
            if mine.any():
                moved[index] = (values[mine] * weights[mine]).sum() / weights[mine].sum()
        if np.allclose(moved, levels, rtol=0, atol=1e-9):
            break
        levels = np.sort(moved)
    return levels


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_palettes_are_as_good_as_k_means(bits: int, weighted: bool) -> None:
    values, square = weight(8, 64, 5), torch.linspace(0.1, 2.0, 64)
    found = palette(values, bits, 4, Inputs(square_K=square) if weighted else None)
    assert found.index.dtype == torch.uint8
    assert found.table.shape == (2, 1 << bits)
    for part in range(2):
        numbers = values[4 * part : 4 * part + 4].double().numpy().ravel()
        costs = np.tile(square.double().numpy() if weighted else np.ones(64), 4)
        mine = found.dequantized()[4 * part : 4 * part + 4].double().numpy().ravel()
        table = found.table[part].double().numpy()
        assert np.abs(numbers - mine) == pytest.approx(np.abs(numbers[:, None] - table[None]).min(1), abs=1e-7)

        def cost(levels: np.ndarray, numbers: np.ndarray = numbers, costs: np.ndarray = costs) -> float:
            return float((costs * np.square(numbers[:, None] - levels[None]).min(1)).sum())

        settled = lloyd(numbers, costs, table)  # ours is a fixed point of the plain iteration
        assert cost(table) <= 1.001 * cost(settled) + 1e-12
        quantiles = np.quantile(numbers, (np.arange(1 << bits) + 0.5) / (1 << bits))
        assert cost(table) <= 1.05 * cost(lloyd(numbers, costs, quantiles))


def test_a_palette_of_few_values_is_exact_and_odd_groups_are_refused() -> None:
    values = torch.tensor([[0.0, 0.5, -0.25, 0.0], [0.5, 0.5, 0.0, -0.25]])
    assert torch.equal(palette(values, 4).dequantized(), values)
    assert torch.equal(palette(torch.zeros(2, 4), 8).dequantized(), torch.zeros(2, 4))
    with pytest.raises(UserError, match="palettes of 3 output channels do not divide 8"):
        palette(torch.zeros(8, 4), 4, 3)


def test_the_cost_of_levels_is_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    values, weights = torch.randn(500, generator=generator), torch.rand(500, generator=generator)
    levels = torch.randn(9, generator=generator, dtype=torch.float64).sort().values
    nearest = (values.double()[:, None] - levels).square().amin(1)
    expected = float((weights * nearest).sum() / weights.double().sum())
    assert Distribution.of(values, weights).error(levels) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_activation_ranges_clip_outliers_where_it_pays(asymmetric: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(400, 500, generator=generator) + 0.5
    values[0, 0] = 30.0
    scale, zero = activation_range(values, asymmetric=asymmetric)
    assert scale.shape == ()
    assert (zero is not None) == asymmetric

    def error(scale: float, zero: float) -> float:
        points = (values.double() / scale).round().add(zero).clamp(-128, 127)
        return float(((points - zero) * scale - values).square().mean())

    mine = error(float(scale), 0.0 if zero is None else float(zero))
    shares = np.linspace(0.1, 1.0, 16)
    if asymmetric:
        spans = [(float(values.min()) * a, 30.0 * b) for a in shares for b in shares]
        best = min(error((high - low) / 255, round(-128 - low * 255 / (high - low))) for low, high in spans)
    else:
        best = min(error(30.0 * share / 127, 0) for share in shares)
    assert mine <= 1.1 * best
    assert mine < 0.9 * error(30.0 / 127, 0)


@pytest.mark.parametrize("values", [torch.zeros(5), torch.full((5,), 2.0), torch.full((5,), -2.0), torch.rand(100)])
def test_activation_ranges_of_simple_values_hold_them(values: Tensor) -> None:
    for asymmetric in (False, True):
        scale, zero = activation_range(values, asymmetric=asymmetric)
        offset = 0.0 if zero is None else float(zero)
        given = ((values / scale).round().add(offset).clamp(-128, 127) - offset) * scale
        assert (given - values).abs().max() <= 0.51 * float(scale) + 1e-6
        assert 0 < float(scale) <= 2.0 / 127 + 1e-9


def test_activation_bounds_widen_what_is_searched() -> None:
    values = torch.linspace(-1, 1, 1000)
    assert torch.equal(activation_range(values)[0], activation_range(values, bounds=(-0.5, 0.5))[0])
    assert activation_range(values, bounds=(-1.0, 1.02))[0] == pytest.approx(2.02 / 255, rel=0.05)
