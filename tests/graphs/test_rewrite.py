"""Graphs opened to be changed."""

from __future__ import annotations

import torch
from torch import nn

from graphs.program import Signature
from graphs.rewrite import Opened
from graphs.spec import TensorSpec
from tests.tiny import toy_program


class Plain(nn.Module):
    """A method without weights, as one that compares two embeddings."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)


def test_a_method_without_weights_is_opened() -> None:
    program = toy_program("net", Plain, Signature((TensorSpec("x", (1, 8)),), (TensorSpec("y", (1, 8)),)))
    opened = Opened.open(program, "net")
    with opened.mode:
        assert isinstance(torch.empty(2), torch._subclasses.FakeTensor)
    again = opened.lift()
    again.check()
    assert [str(node.target) for node in again.methods["net"].exported.graph.nodes if node.op == "call_function"] == [
        "aten.softmax.int"
    ]
