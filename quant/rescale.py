"""Factors moved between the weights of a program so that it computes the same with numbers that quantize better.

x W^T = (x / s) (W s)^T: the division goes into whatever makes x, where that is linear in a weight: a norm's weight (and
bias), or the linear layer that one side of a product comes from (up_proj before down_proj). No operator is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphs.program import Constant, Program
from quant.layers import Layer

aten = torch.ops.aten


@dataclass(frozen=True)
class Group:
    """Layers that read one value, and the entries of the weights whose first axis makes its channels."""

    layers: tuple[Layer, ...]
    absorbers: tuple[str, ...]


def producers(node: fx.Node) -> tuple[str, ...]:
    """Entries of the weights that scale the channels of a node's value, one division of each by s dividing it."""
    if node.target is aten.layer_norm.default and len(node.args) > 3:
        return entries(node.args[2:4])
    if node.target is aten.rms_norm.default and len(node.args) > 2:
        return entries(node.args[2:3])
    if node.target is aten.mul.Tensor:
        for side in node.args:
            if isinstance(side, fx.Node) and side.target is aten.linear.default and len(side.users) == 1:
                return entries(side.args[1:3])
    return ()


def entries(arguments: Sequence[object]) -> tuple[str, ...]:
    """The names of constant weights; none unless all are, each read by nobody else."""
    nodes = [a for a in arguments if a is not None]
    named = [a for a in nodes if isinstance(a, fx.Node) and a.op == "get_attr" and len(a.users) == 1]
    return tuple(str(node.target) for node in named) if len(named) == len(nodes) else ()


def groups(layers: Sequence[Layer]) -> Iterator[Group]:
    """The groups among `layers` (of one method) whose input can absorb a division: all its readers are among them."""
    readers: dict[fx.Node, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(layer.input, []).append(layer)
    for node, reading in readers.items():
        absorbers = producers(node)
        if absorbers and set(node.users) == {layer.node for layer in reading}:
            yield Group(tuple(reading), absorbers)


def scaled(program: Program, name: str, factors: Tensor, axis: int) -> Constant:
    """A weight times `factors` along an axis, computed when it is asked for."""
    base: Callable[[str], Tensor] = program.value

    def compute() -> Tensor:
        weight = base(name)
        shape = [1] * weight.dim()
        shape[axis] = -1
        return (weight.float() * factors.view(shape)).to(weight.dtype)

    return compute


def rescale(program: Program, method: str, group: Group, factors_K: Tensor) -> Program:
    """`program` with the weights of a group times s along their inputs, and its absorbers divided by s."""
    traced = program.methods[method]
    names, constants = dict(traced.weight_names), dict[str, Constant]()
    for entry, factors, axis in (
        *((layer.entry, factors_K, 1) for layer in group.layers),
        *((entry, 1 / factors_K, 0) for entry in group.absorbers),
    ):
        old = names[entry]
        names[entry] = f"{old}*{method}.{group.layers[0].entry}"
        constants[names[entry]] = scaled(program, old, factors, axis)
    return program.replace(method, replace(traced, weight_names=names), constants)
