"""The layers of a traced method whose weights a scheme can be given to, found by operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from graphs.rewrite import Opened

aten = torch.ops.aten
Kind = Literal["linear", "conv", "embedding"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: operator -> the kind of layer, and where its arguments hold what it reads and its weight
OPERATORS: dict[Callable[..., object], tuple[Kind, int, int]] = {
    aten.linear.default: ("linear", 0, 1),
    aten.conv2d.default: ("conv", 0, 1),
    aten.embedding.default: ("embedding", 1, 0),
}


@dataclass(frozen=True)
class Weighed:
    """One operator with a constant weight; `entry` is the weight's name in the method's state dict."""

    method: str
    entry: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def path(self) -> str:
        """What recipes match: `text_decoder/layers.0.mlp.up_proj`; the method alone where it is one layer."""
        name = self.entry.rpartition(".")[0]
        return f"{self.method}/{name}" if name else self.method

    @property
    def inputs(self) -> int:
        """K: how many numbers each output reads, along the axis that groups run over."""
        return self.shape[-1] if self.kind == "embedding" else int(torch.Size(self.shape[1:]).numel())


@dataclass(frozen=True)
class Layer(Weighed):
    """The same in a traced graph."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node


def layers(opened: Opened) -> list[Layer]:
    """Every layer of a method in the order of computation. One weight read twice (tied) is two layers."""
    found = []
    for node in opened.graph.nodes:
        if node.op != "call_function" or node.target not in OPERATORS:
            continue
        kind, reads, weighs = OPERATORS[node.target]
        weight = node.args[weighs]
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            tensor: Tensor = weight.meta["val"]
            read = node.args[reads]
            assert isinstance(read, fx.Node)
            found.append(Layer(opened.method, str(weight.target), kind, tuple(tensor.shape), node, read, weight))
    return found
