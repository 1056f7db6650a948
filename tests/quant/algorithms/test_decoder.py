"""On the trained decoder's layers and their real inputs: errors of the outputs, on pictures not calibrated on."""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor

from quant.algorithms import ALGORITHMS, awq
from quant.algorithms.inputs import Inputs
from quant.scheme import WeightScheme
from tests.quant.algorithms.decoder import Recorded, decoder

LAYERS = ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.2.self_attn.o_proj", "layers.2.mlp.down_proj")


def statistics(rows: Tensor) -> Inputs:
    return Inputs(rows.T @ rows / len(rows), absmean_K=rows.abs().mean(0), rows_RK=rows[::4])


@cache
def recorded(seed: int) -> dict[str, Recorded]:
    return decoder(16, seed)


def error(name: str, kept: Tensor) -> float:
    """Relative error of the layer's outputs for `kept` in place of its weight."""
    held_out = recorded(8)[name]
    wanted = held_out.rows @ held_out.weight.T
    return float((held_out.rows @ kept.T - wanted).norm() / wanted.norm())


@cache
def errors(name: str, scheme: WeightScheme) -> dict[str, float]:
    weight, inputs = recorded(7)[name].weight, statistics(recorded(7)[name].rows)
    found = {key: error(name, quantize(weight, scheme, inputs).dequantized()) for key, quantize in ALGORITHMS.items()}
    factors = awq.rescale([weight], scheme, inputs)
    found["awq"] = error(name, awq.clip(weight * factors, scheme, inputs.divided_by(factors)).dequantized() / factors)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_groups_of_32_at_4_bits(name: str) -> None:
    found = errors(name, WeightScheme("int", 4, 32))
    assert found["gptq"] <= found["rtn"]
    assert found["awq"] <= found["rtn"]
    assert found["mse"] <= found["rtn"]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, WeightScheme("int", 4)) for name in LAYERS),
        *((name, WeightScheme("int", 3, 32)) for name in LAYERS),
        (LAYERS[3], WeightScheme("int", 4, 128)),
        (LAYERS[3], WeightScheme("int", 4, 128, True)),
    ],
    ids=str,
)
def test_coarse_grids_gain_clearly(name: str, scheme: WeightScheme) -> None:
    found = errors(name, scheme)
    assert found["gptq"] <= 0.9 * found["rtn"]
    assert found["awq"] <= 0.9 * found["rtn"]


def test_gptq_is_nearest_on_the_whole() -> None:
    for scheme in (WeightScheme("int", 4, 32), WeightScheme("int", 3, 32)):
        means = {key: sum(errors(name, scheme)[key] for name in LAYERS) for key in ("rtn", "clip", "awq", "gptq")}
        assert means["gptq"] < 0.9 * min(means["clip"], means["awq"])
        assert max(means["clip"], means["awq"]) < 0.9 * means["rtn"]
