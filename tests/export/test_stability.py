"""Gates follow how far a graph moves from itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from calibration.source import Calibration
from export.gate import Distance, Limit
from export.pipeline import Request
from export.stability import MOST, Change, Shaken, choosing, rounding, trial
from export.stages import silent
from export.targets.base import load_target
from export.verify import program_signatures, seeded_inputs
from graphs.compress.base import apply, parse, write
from graphs.model import load_model
from graphs.program import Program
from graphs.trace import trace
from quant.apply import Quantization
from quant.recipe import recipe
from quant.resolve import Resolved, resolve
from runtimes.eager import EagerRuntime


@cache
def made(passes: str, name: str) -> tuple[Resolved, Program]:
    """The trained nano, compressed and quantized for onnxruntime."""
    model = load_model(Request("mobilevlm"))
    compressed = apply(parse(passes), trace(model.architecture, model.weights))
    resolved = resolve(recipe(name), compressed, "onnxruntime", load_target("onnxruntime").capabilities)
    statistics = None
    if resolved.needs_statistics:
        statistics = Calibration(count=8).statistics(
            model, compressed, write(parse(passes)), resolved.needs_hessians, silent
        )
    return resolved, Quantization(resolved, statistics, silent).rounded(compressed)


def test_floats_are_gated_as_they_stand() -> None:
    resolved, program = made("pool{factor=2}", "reference-fp32")
    found = trial(resolved, 1e-4, program, program)
    assert found.seed == 0
    assert set(found.limits.values()) == {Limit(1e-4)}
    assert rounding(resolved) == set() == choosing(program)


def test_a_choice_in_floats_may_not_differ() -> None:
    resolved, program = made("prune{keep=18,method=divprune}", "reference-fp32")
    assert choosing(program) == {"vision_encoder"}
    found = trial(resolved, 1e-4, program, program)
    assert found.limits["vision_encoder"] == Limit(1e-4, 0)
    assert found.limits["text_decoder"] == Limit(1e-4)


def test_a_choice_by_rounded_numbers_may_differ_by_a_few() -> None:
    resolved, program = made("prune{keep=18,method=divprune}", "mobile-fast")
    assert rounding(resolved) == {"vision_encoder", "text_decoder"}
    found = trial(resolved, 1e-2, program, program)
    limit = found.limits["vision_encoder"]
    assert 1e-2 < limit.relative_l2 <= MOST
    assert limit.others is not None
    assert 0 <= limit.others <= 6
    assert found.limits["text_decoder"].others is None


def test_weights_are_changed_and_come_back() -> None:
    _, program = made("", "reference-fp32")
    shaken = Shaken(EagerRuntime(program), "vision_encoder")
    inputs = seeded_inputs(program_signatures(program))["vision_encoder"]
    name = "tower.layers.0.mlp.fc1.weight"
    before = program.tensor("vision_encoder", name).clone()
    plain, noisy, again = (
        shaken.calls(inputs, change)[0].outputs[0] for change in (Change(0.0), Change(1e-2, 3), Change(0.0))
    )
    assert (plain == again).all()
    assert 1e-3 < abs(noisy - plain).max() / abs(plain).max() < 1
    assert torch.equal(program.tensor("vision_encoder", name), before)
    assert Distance(0.1, 18, 2).farthest(Distance(0.2, 18, 1)) == replace(Distance(0.2, 18), others=2)
