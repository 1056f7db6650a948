"""Weights rounded a part at a time, and the results that are kept for the next reader."""

from __future__ import annotations

import pytest
import torch

from graphs.program import Program
from quant import apply
from quant.apply import Kept, Quantization
from quant.recipe import Recipe, Rule
from quant.resolve import resolve
from tests.quant.everything import Everything
from tests.tiny import tiny_program


@pytest.mark.parametrize("scales", ["rtn", "mse"])
def test_parts_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch, scales: str) -> None:
    program = tiny_program("tiny")
    chosen = Recipe("r", "", layers=(Rule("text_decoder/*", ("w8",), kind="linear", scales=scales),))
    resolved = resolve(chosen, program, "everything", Everything())
    released: list[tuple[str, str]] = []
    monkeypatch.setattr(Program, "release", lambda self, method, entry: released.append((method, entry)))
    layer, scheme, rule = next(iter(resolved.layers.values()))
    whole = Quantization(resolved, None).choice(program, layer, scheme, rule).weight()
    assert len(released) == 1
    monkeypatch.setattr(apply, "RELEASED", 4 * layer.inputs)
    parts = Quantization(resolved, None).choice(program, layer, scheme, rule).weight()
    assert len(released) == 1 + -(-len(whole["q"]) // 4)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_no_result_is_made_beside_one_that_is_too_large() -> None:
    kept = Kept(limit=100)
    large, small = {"q": torch.zeros(101, dtype=torch.int8)}, {"q": torch.zeros(40, dtype=torch.int8)}

    def made_alone() -> dict[str, torch.Tensor]:
        assert not kept.results
        return small

    assert kept.get("large", lambda: large) is large
    assert kept.get("large", lambda: small) is large  # the last one is kept, however large
    assert kept.get("a", made_alone) is small
    kept.get("b", lambda: small)
    assert list(kept.results) == ["a", "b"]
    kept.get("c", lambda: small)
    assert list(kept.results) == ["b", "c"]
