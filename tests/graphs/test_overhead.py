"""What is left out changes nothing: graphs compute what they did, and their code is there when it is asked for."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, fx, nn
from torch.fx.traceback import NodeSource

from graphs.overhead import COMPILE, spared


class Net(nn.Module):
    """Two operators."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) + 1


def test_code_follows_the_graph() -> None:
    x = torch.tensor([-1.0, 2.0])
    with spared():
        module = fx.symbolic_trace(Net())
        (relu,) = module.graph.find_nodes(op="call_function", target=torch.relu)
        relu.target = torch.neg
        module.recompile()
        assert "neg" not in module.code  # nobody has asked yet
        other = copy.deepcopy(module)
        assert list(inspect.signature(module.forward).parameters) == ["x"]
        assert "neg" in module.code
        assert module(x).tolist() == other(x).tolist() == [2.0, -1.0]
        relu.target = torch.relu
        module.recompile()
    assert fx.GraphModule.recompile is COMPILE
    assert module(x).tolist() == [1.0, 3.0]
    assert other(x).tolist() == [2.0, -1.0]


def test_records_are_shared_for_a_while() -> None:
    graph = fx.symbolic_trace(Net()).graph
    record = NodeSource(next(iter(graph.nodes)), "a pass")
    with spared():
        assert copy.deepcopy([record])[0] is record
    assert copy.deepcopy([record])[0] is not record
