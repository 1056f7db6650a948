"""Layers of a stack in a traced graph: found by module path, told apart by what they compute."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from graphs.lift import WRITES

#: how deep stacks may lie in one another: the layers of a stage, of which there are some
DEPTHS = (1, 2)


@dataclass(frozen=True)
class Stacked:
    """One layer of a stack, which takes the value of `given` and hands on that of `made`, of the same shape and dtype.

    `kind` is the same for layers that compute the same operators on tensors of the same shapes.
    """

    path: str
    kind: str
    given: fx.Node
    made: fx.Node


def depth_of(path: str) -> int:
    """In how many numbered modules a path lies."""
    return sum(part.isdecimal() for part in path.split("."))


def layer_of(node: fx.Node, depth: int = 1) -> str:
    """The path, up to its number of that depth, of the stacked layer that a node came from; empty outside of any."""
    stack = node.meta.get("nn_module_stack") or {}
    parts = str([*stack.values()][-1][0]).split(".") if stack else []
    numbers = [place for place, part in enumerate(parts, 1) if part.isdecimal()]
    return ".".join(parts[: numbers[depth - 1]]) if len(numbers) >= depth else ""


def owners(graph: fx.Graph, depth: int = 1) -> dict[fx.Node, str]:
    """For each operator the layer that it belongs to: its own, or, for what was put in later, that of its readers."""
    owner: dict[fx.Node, str] = {}
    for node in reversed(graph.nodes):
        if node.op != "call_function":
            continue
        if node.meta.get("nn_module_stack"):
            owner[node] = layer_of(node, depth)
        else:
            readers = {owner.get(user, "") for user in node.users}
            owner[node] = readers.pop() if len(readers) == 1 else ""
    return owner


def form(node: fx.Node) -> str:
    """A node's value as text: shape and dtype."""
    found = node.meta.get("val")
    return f"{tuple(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else str(found)


def stacked(graph: fx.Graph, depth: int = 1) -> list[Stacked]:
    """The layers at a depth that can be left out, in the order of computation."""
    owner = owners(graph, depth)
    members: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if owner.get(node):
            members.setdefault(owner[node], []).append(node)
    found = []
    for path, nodes in members.items():
        inside = set(nodes)
        if not any(n.op == "get_attr" for node in nodes for n in node.all_input_nodes):
            continue  # an activation among numbered modules: nothing would be saved
        leaving = [n for n in nodes if any(user not in inside and user.target is not WRITES for user in n.users)]
        if len(leaving) != 1:
            continue
        read = dict.fromkeys(
            n for node in nodes for n in node.all_input_nodes if n not in inside and n.op != "get_attr"
        )
        alike = [n for n in read if form(n) == form(leaving[0])]
        if len(alike) == 1:
            found.append(Stacked(path, kind(nodes), alike[0], leaving[0]))
    return found


def kind(nodes: Iterable[fx.Node]) -> str:
    """A digest of what some nodes compute."""
    text = hashlib.sha256()
    for node in nodes:
        plain = fx.node.map_arg((node.args, node.kwargs), form)
        text.update(f"{node.target} {plain} {form(node)}\n".encode())
    return text.hexdigest()
