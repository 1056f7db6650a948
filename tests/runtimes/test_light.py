"""Large layers run by rows give what they give whole."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from quant.ops import dequantize
from runtimes import light


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("zero", [False, True])
def test_rows_are_those_of_the_whole_layer(monkeypatch: pytest.MonkeyPatch, group: int, zero: bool) -> None:
    monkeypatch.setattr(light, "PART", 64 * 7)  # seven rows at a time of fifty
    draw = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (50, 64), generator=draw, dtype=torch.int8)
    scale = torch.rand(50, 64 // group if group else 1, generator=draw)
    point = torch.randint(-8, 8, scale.shape, generator=draw, dtype=torch.int8) if zero else None
    x, bias = torch.randn(1, 3, 64, generator=draw), torch.randn(50, generator=draw)
    whole = torch.nn.functional.linear(x, dequantize(q, scale, point, 8, group), bias)
    assert torch.allclose(light.linear_by_rows(x, q, scale, point, 8, group, bias), whole, rtol=1e-5, atol=1e-4)


def test_only_large_quantized_layers_are_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light, "LARGE", 40 * 8)
    graph = fx.Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale")
    made = []
    for rows in (39, 40):
        q = graph.placeholder(f"q{rows}")
        weight = graph.call_function(dequantize._opoverload, (q, scale, None, 8, 0))
        weight.meta["val"] = torch.empty(rows, 8)
        made.append(graph.call_function(light.LINEAR, (x, weight)))
    graph.output(tuple(made))
    module = fx.GraphModule({}, graph)
    given = [torch.randn(2, 8), torch.rand(1, 1), *(torch.randint(-9, 9, (r, 8), dtype=torch.int8) for r in (39, 40))]
    before = module(*given)
    light.lighten(module)
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert targets == [dequantize._opoverload, light.LINEAR, light.linear_by_rows]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before, module(*given), strict=True))


def test_half_convolutions_are_rounded_once() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 64, 9, 9, generator=draw), torch.randn(8, 64, 3, 3, generator=draw)
    graph = fx.Graph()
    made = []
    for dtype in (torch.float16, torch.float32):
        given = [graph.placeholder(f"{name}_{len(made)}") for name in ("x", "weight")]
        node = graph.call_function(torch.ops.aten.conv2d.default, (*given, None, [2, 2], [1, 1]))
        node.meta["val"] = torch.empty(1, 8, 5, 5, dtype=dtype)
        made.append(node)
    graph.output(tuple(made))
    module = fx.GraphModule({}, graph)
    light.lighten(module)
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert targets == [light.in_float32, torch.ops.aten.conv2d.default]
    half, whole = module(x.half(), weight.half(), x.half().float(), weight.half().float())
    assert half.dtype == torch.float16
    assert torch.equal(half, whole.half())
