"""Passes over graphs whose values are recorded: the same graphs as without, computed only where something changed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from executorch.exir import to_edge
from executorch.exir.dialects._ops import ops
from executorch.exir.pass_base import ExportPass, PassResult
from torch import Tensor, fx, nn

from export.targets.executorch_overhead import spared


class Net(nn.Module):
    """Every operator's output shape follows from the rows that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.cat([torch.relu(x), x]).sigmoid() @ self.layer.weight.T + self.layer.bias
        return out.transpose(0, 1)


class Same(ExportPass):
    """Changes nothing."""


class Twice(ExportPass):
    """Rows after relu twice: everything behind it has other shapes."""

    def call_operator(self, op: Any, args: Any, kwargs: Any, meta: Any) -> Any:
        made = super().call_operator(op, args, kwargs, meta)
        if op is ops.edge.aten.relu.default:
            return super().call_operator(ops.edge.aten.cat.default, ([made, made], 0), {}, meta)
        return made


class Part(ExportPass):
    """One part less of what is joined: a node is told so in place, as XNNPACK's passes do."""

    def call(self, module: fx.GraphModule) -> PassResult:
        node = next(node for node in module.graph.nodes if node.target is ops.edge.aten.cat.default)
        node.args = (node.args[0][:1],)
        return super().call(module)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    rows = torch.export.Dim("rows", min=2, max=16)
    exported = torch.export.export(Net().eval(), (torch.zeros(3, 8),), dynamic_shapes=({0: rows},))
    with spared():
        module: fx.GraphModule = Same()(to_edge(exported).exported_program().graph_module).graph_module
    return module


def told(module: fx.GraphModule) -> list[str]:
    """Each node and what is recorded of it."""
    return [f"{node.target} {node.args} {node.meta.get('val')}" for node in module.graph.nodes]


@pytest.mark.parametrize(("change", "computed"), [(Same, 0), (Twice, 6), (Part, 5)])
def test_only_what_changed_is_computed(
    graph: fx.GraphModule, change: type[ExportPass], computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    own = fx.Interpreter.call_function

    def counted(self: fx.Interpreter, target: Any, args: Any, kwargs: Any) -> Any:
        calls.append(target)
        return own(self, target, args, kwargs)

    monkeypatch.setattr(fx.Interpreter, "call_function", counted)
    expected = told(change()(deepcopy(graph)).graph_module)
    assert len(calls) > 5
    calls.clear()
    with spared():
        assert told(change()(deepcopy(graph)).graph_module) == expected
    assert len(calls) == computed
    assert ("3*s" in str(expected)) == (change is Twice)
