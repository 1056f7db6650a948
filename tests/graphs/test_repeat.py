"""Stacks of which two layers are traced give the graph that tracing all of them gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from graphs import repeat
from graphs.model import Request, load_model
from graphs.program import Program
from graphs.shorten import operators as operators_of
from graphs.shorten import superfluous
from graphs.stack import stacked
from graphs.trace import trace
from runtimes.eager import EagerRuntime


def both(monkeypatch: pytest.MonkeyPatch, request: Request) -> tuple[Program, Program]:
    """A model's program as traced, and with every layer of it traced."""
    model = load_model(request)
    grown = trace(model.architecture, model.weights)
    with monkeypatch.context() as patch:
        patch.setattr(repeat, "TRACED", 1 << 20)
        return grown, trace(model.architecture, model.weights)


def operators(program: Program, method: str) -> list[str]:
    graph = program.methods[method].exported.graph
    return sorted(f"{node.target} {node.meta['val']}" for node in graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("request_", [Request("mobilevlm"), Request("clip", "clip-vit-b-16")], ids=lambda r: r.model)
def test_the_grown_graph_is_the_traced_one(monkeypatch: pytest.MonkeyPatch, request_: Request) -> None:
    grown, whole = both(monkeypatch, request_)
    grown.check()
    for method in whole:
        mine, theirs = grown.methods[method], whole.methods[method]
        assert mine.signature == theirs.signature
        assert mine.weight_names == {e: n for e, n in theirs.weight_names.items() if e in mine.exported.state_dict}
        assert len(operators(grown, method)) == len(operators(whole, method))
        kinds = [[layer.kind for layer in stacked(p.methods[method].exported.graph)] for p in (grown, whole)]
        assert kinds[0] == kinds[1]


def test_it_computes_the_same_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    grown, whole = both(monkeypatch, Request("mobilevlm"))
    places = [
        set(node.meta.get("nn_module_stack", {}).values())
        for node in grown.methods["text_decoder"].exported.graph.nodes
    ]
    assert any("layers.3.mlp" in path for stack in places for path, _ in stack)
    for method in whole:
        calls = list(whole.methods[method].signature.method(method).examples(seed=3))
        for call in calls:
            arrays = [tensor.numpy() for tensor in call]
            mine, theirs = (EagerRuntime(program).call(method, arrays) for program in (grown, whole))
            assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))


class Numbered(nn.Module):
    """Layers that are not alike to the module that runs them, which says nothing of `repeated`; and one that lies."""

    def __init__(self, lies: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.extra = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        if lies:
            self.repeated = lambda: self.layers

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(seen[-1] + seen[0]))
        return torch.stack(seen[1:]).sum(0)


def test_layers_that_read_more_than_the_last_are_traced_whole() -> None:
    assert repeat.stacks(Numbered(lies=False)) == []
    found = repeat.stacks(Numbered(lies=True))
    assert [stack.left_out for stack in found] == [["2", "3", "4"]]
    module = Numbered(lies=True)
    (stack,) = repeat.stacks(module)
    with repeat.shortened([stack]):
        short = torch.export.export(module, (torch.zeros(1, 4),), strict=False).run_decompositions({})
    assert len(module.layers) == 5
    assert repeat.grown(short, module, [stack]) is None


def test_layers_of_other_shapes_are_no_stack() -> None:
    module = Numbered(lies=True)
    module.layers[3] = nn.Linear(4, 4, bias=False)
    assert repeat.stacks(module) == []


@pytest.mark.parametrize("model", ["qwen2_vl", "internvl2_5", "pixtral", "kosmos2", "blip2"])
def test_stacks_of_other_families(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Five layers of each are the five that all of them traced give, and one of them is run to check."""
    tiny = load_model(Request(model, "tiny")).architecture
    deep = replace(tiny, **{part: replace(getattr(tiny, part), num_hidden_layers=5) for part in ("vision", "text")})
    grown = trace(deep, {})
    monkeypatch.setattr(repeat, "TRACED", 1 << 20)
    whole = trace(deep, {})
    left = superfluous(grown)
    assert left == superfluous(whole)
    assert all(len(left[method]) >= 3 for method in ("vision_encoder", "text_decoder"))
    for method in whole:
        counts = [
            {name: count for name, count in operators_of(program, method).items() if name.startswith("aten.")}
            for program in (grown, whole)  # sizes may be computed once more
        ]
        assert counts[0] == counts[1]
        assert len(grown.methods[method].exported.state_dict) == len(whole.methods[method].exported.state_dict)
        kinds = [[layer.kind for layer in stacked(p.methods[method].exported.graph)] for p in (grown, whole)]
        assert kinds[0] == kinds[1]
