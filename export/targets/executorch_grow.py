"""Lowered graphs with all their layers, made of ones that were lowered with three of each stack.

ExecuTorch's passes cost the same for every layer. What they make of a stack is periodic: a unit of operators and
delegates, which may begin and end inside of a layer, comes once for each step from a layer to the next. Of a stack's
first two layers and its last one there are two such units, U1 and U2; all that lie between are copies of U2 that read
each what the one before it made, and their delegates are written with weights of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.node import map_arg

from export.targets.executorch_delegates import Delegates, compact, shared, structure, weights
from graphs.lift import rebuilt
from graphs.program import Program
from graphs.rewrite import Opened
from graphs.shorten import inside
from graphs.stack import DEPTHS, form, stacked

#: layers of a run from which some are left out
LEAST = 4

#: by method, the paths of the layers of each stack of alike ones
Stacks = Mapping[str, list[tuple[str, ...]]]


def runs(program: Program, method: str) -> list[tuple[str, ...]]:
    """The paths of layers that follow one another and are alike, of each stack that is long enough to be shortened.

    Stages of a tower are no such stack; those within them are.
    """
    graph = Opened.open(program, method).graph
    found: list[tuple[str, ...]] = []
    for depth in DEPTHS:
        whole = [path for paths in found for path in paths]
        found += [paths for paths in followed(graph, depth) if len(paths) >= LEAST and not inside(paths[0], whole)]
    return found


def followed(graph: fx.Graph, depth: int) -> list[tuple[str, ...]]:
    """The paths of layers at a depth that follow one another and are alike."""
    found: list[list[str]] = []
    last = None
    for layer in stacked(graph, depth):
        if last is None or layer.given is not last.made or layer.kind != last.kind:
            found.append([])
        found[-1].append(layer.path)
        last = layer
    return [tuple(paths) for paths in found]


def middle(stacks: Stacks) -> dict[str, tuple[str, ...]]:
    """The layers that need not be lowered: all of a stack but its first two and its last one."""
    return {method: tuple(path for paths in found for path in paths[2:-1]) for method, found in stacks.items()}


def renamed(name: str, places: Mapping[str, str]) -> str:
    """An entry's name in another layer: `places` are paths of layers and what takes their place."""
    for old, new in places.items():
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


@dataclass
class Grower:
    """Grows one method, `exported`, which was lowered with `delegates` of a program that lacks some of the layers."""

    method: str
    exported: ExportedProgram
    program: Program  # with all layers
    delegates: Delegates

    def __post_init__(self) -> None:
        self.module = self.exported.graph_module
        self.graph = self.module.graph
        self.inputs = list(self.exported.graph_signature.input_specs)
        self.outputs = list(self.exported.graph_signature.output_specs)
        self.state = dict(self.exported.state_dict)
        self.made = 0

    def run(self, stacks: Sequence[Sequence[str]]) -> ExportedProgram | None:
        """The method with all layers of its stacks; None where one is not periodic or shares no delegates."""
        if not all(self.grow(paths) for paths in stacks):
            return None
        self.graph.lint()
        self.module.recompile()
        return rebuilt(self.exported, self.module, ExportGraphSignature(self.inputs, self.outputs), self.state)

    @property
    def targets(self) -> dict[str, str]:
        """Names of placeholders to the entries that they hold."""
        return {spec.arg.name: spec.target for spec in self.inputs if spec.target is not None}

    def lowered(self, node: fx.Node) -> Any:
        """The delegate that a node calls; None for other nodes."""
        first = node.args[0] if node.args else None
        if not (isinstance(first, fx.Node) and first.op == "get_attr"):
            return None
        return getattr(self.module, str(first.target))

    def key(self, node: fx.Node) -> str:
        """What a node computes, whatever it reads."""
        module = self.lowered(node)
        if module is not None:
            return structure(module.original_module)
        return f"{node.target} {map_arg((node.args, node.kwargs), form)} {form(node)}"

    def touched(self, node: fx.Node, places: Sequence[str]) -> set[int]:
        """Which of some layers' entries a node reads, by their numbers."""
        module, targets = self.lowered(node), self.targets
        names = [targets.get(read.name, "") for read in node.all_input_nodes]
        names += [name for name, _ in weights(module.original_module)] if module is not None else []
        return {number for name in names for number, path in enumerate(places) if name.startswith(f"{path}.")}

    def grow(self, paths: Sequence[str]) -> bool:
        """Put in the layers of one stack that were left out; whether that could be."""
        short = (paths[0], paths[1], paths[-1])
        return any(self.follows(*units, short) and self.put(*units, paths) for units in self.units(short))

    def units(self, short: Sequence[str]) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
        """Pairs of units that compute the same one after the other, so that all of the second layer is within them."""
        nodes = [node for node in self.graph.nodes if node.op == "call_function"]
        keys = [self.key(node) for node in nodes]
        touched = [self.touched(node, short) for node in nodes]
        for length in range(1, len(nodes) // 2 + 1):
            for start in range(len(nodes) - 2 * length + 1):
                half, end = start + length, start + 2 * length
                if keys[start:half] != keys[half:end] or not any(touched[half:end]):
                    continue
                if all(layers <= {0} for layers in touched[:start]) and all(layers <= {2} for layers in touched[end:]):
                    yield nodes[start:half], nodes[half:end]

    def follows(self, first: list[fx.Node], second: list[fx.Node], short: Sequence[str]) -> bool:
        """Whether `second` reads what `first` reads, a unit and a layer later, and nothing else reads `first`."""
        place = {node: index for index, node in enumerate(first)}
        again = {node: index for index, node in enumerate(second)}
        targets, later = self.targets, {short[0]: short[1], short[1]: short[2]}
        if self.escapes(first, {*first, *second}):
            return False
        for one, two in zip(first, second, strict=True):
            for before, now in zip(one.all_input_nodes, two.all_input_nodes, strict=True):
                if now in again:
                    fits = place.get(before) == again[now]
                elif now in place:
                    fits = before not in place and form(before) == form(now)
                elif before.name in targets and now.name in targets:
                    held = {**self.exported.constants, **self.state}
                    entries = (targets[before.name], targets[now.name])
                    old, new = ((entry, held[entry]) for entry in entries)
                    fits = self.same(old, new, later)
                elif before.op == now.op == "get_attr":
                    modules = (getattr(self.module, str(node.target)).original_module for node in (before, now))
                    pairs = zip(*map(weights, modules), strict=True)
                    fits = all(self.same(old, new, later) for old, new in pairs)
                else:
                    fits = self.alike(before, now)
                if not fits:
                    return False
        return True

    def same(self, old: tuple[str, Tensor], new: tuple[str, Tensor], later: Mapping[str, str]) -> bool:
        """Whether an entry is another one of the layer behind, or both are constants of one value that passes made."""
        return renamed(old[0], later) == new[0] or self.equal(old, new)

    def equal(self, old: tuple[str, Tensor], new: tuple[str, Tensor]) -> bool:
        """Whether entries are constants of one value that passes made."""
        known = self.program.methods[self.method].exported.state_dict
        return old[0] not in known and new[0] not in known and torch.equal(old[1], new[1])

    def alike(self, before: fx.Node, now: fx.Node) -> bool:
        """Whether nodes are one, or compute the same of equal constants."""
        targets, held = self.targets, {**self.exported.constants, **self.state}
        if before is now:
            return True
        if before.name in targets and now.name in targets:
            old, new = ((targets[node.name], held[targets[node.name]]) for node in (before, now))
            return self.equal(old, new)
        if not (before.op == now.op == "call_function" and self.key(before) == self.key(now)):
            return False
        return all(map(self.alike, before.all_input_nodes, now.all_input_nodes))

    def escapes(self, unit: list[fx.Node], inside: set[fx.Node]) -> bool:
        """Whether something behind reads `unit`, besides the graph's output, which writes its state."""
        mutations = {
            spec.arg.name for spec in self.outputs if spec.kind is OutputKind.BUFFER_MUTATION and spec.arg is not None
        }
        return any(
            user not in inside and not (user.op == "output" and node.name in mutations)
            for node in unit
            for user in node.users
        )

    def put(self, first: list[fx.Node], second: list[fx.Node], paths: Sequence[str]) -> bool:
        """Exchange `second` for as many units as there are steps between layers."""
        made, before = first, {node: index for index, node in enumerate(first)}
        number = {node: index for index, node in enumerate(second)}
        mutated = {spec.arg.name: spec for spec in self.outputs if spec.kind is OutputKind.BUFFER_MUTATION}
        written: list[tuple[fx.Node, str]] = []
        for step in range(1, len(paths) - 1):
            places = {paths[1]: paths[step], paths[-1]: paths[step + 1]}
            unit: list[fx.Node] = []
            for node in second:
                copies: dict[fx.Node, fx.Node] = {}
                for read in node.all_input_nodes:
                    if read in number:
                        copies[read] = unit[number[read]]
                    elif read in before:
                        copies[read] = made[before[read]]
                    elif read.name in self.targets:
                        copies[read] = self.placeholder(read, places)
                    elif read.op == "get_attr":
                        called = self.called(node, places, second[0])
                        if called is None:
                            return False
                        copies[read] = called
                with self.graph.inserting_before(second[0]):
                    copy = self.graph.node_copy(node, lambda read, copies=copies: copies.get(read, read))
                copy.meta = dict(node.meta)
                unit.append(copy)
                if node.name in mutated:
                    written.append((copy, renamed(str(mutated[node.name].target), places)))
            made = unit
        self.exchange(second, made, written)
        return True

    def called(self, node: fx.Node, places: Mapping[str, str], behind: fx.Node) -> fx.Node | None:
        """A delegate as the one that `node` calls, with weights of other layers; None where it cannot be made so."""
        module = self.lowered(node)
        made = self.delegates.again(self.method, module, lambda name: renamed(name, places))
        if made is None:
            return None
        self.made += 1
        name = f"grown_module_{self.made}"
        self.module.add_module(name, made)
        with self.graph.inserting_before(behind):
            return self.graph.get_attr(name)

    def placeholder(self, read: fx.Node, places: Mapping[str, str]) -> fx.Node:
        """The placeholder of an entry in another layer, put in where there is none yet."""
        targets = self.targets
        target = renamed(targets[read.name], places)
        known = {entry: name for name, entry in targets.items()}
        if target in known:
            return next(node for node in self.graph.find_nodes(op="placeholder") if node.name == known[target])
        index, spec = next((i, spec) for i, spec in enumerate(self.inputs) if spec.arg.name == read.name)
        prefix = "p_" if spec.kind is InputKind.PARAMETER else "b_"
        with self.graph.inserting_after(read):
            made = self.graph.placeholder(prefix + target.replace(".", "_"))
        made.meta = dict(read.meta)
        self.inputs.insert(index + 1, InputSpec(spec.kind, TensorArgument(made.name), target, spec.persistent))
        value = compact(self.program.tensor(self.method, target))
        value = value.reshape(read.meta["val"].shape)  # a cache may be laid out anew
        self.state[target] = shared(nn.Parameter(value, False) if spec.kind is InputKind.PARAMETER else value)
        return made

    def exchange(self, old: list[fx.Node], new: list[fx.Node], written: list[tuple[fx.Node, str]]) -> None:
        """Take `old` out, have what reads it read `new`, and write the state of all units at the end."""
        leaving = zip(self.graph.output_node().args[0], self.outputs, strict=True)
        state = [
            (node, spec.target) for node, spec in leaving if spec.kind is OutputKind.BUFFER_MUTATION and node not in old
        ]
        for node, other in zip(old, new, strict=True):
            node.replace_all_uses_with(other, lambda user: user not in old)
        output = self.graph.output_node()
        given = output.args[0][-len(self.exported.graph_signature.user_outputs) :]
        every = [(OutputKind.BUFFER_MUTATION, *pair) for pair in (*state, *written)]
        every += [(OutputKind.USER_OUTPUT, node, None) for node in given]
        output.args = (tuple(node for _, node, _ in every),)
        self.outputs = [OutputSpec(kind, TensorArgument(node.name), target) for kind, node, target in every]
        for node in reversed(old):
            called = [read for read in node.all_input_nodes if read.op == "get_attr"]
            self.graph.erase_node(node)
            for read in called:
                if not read.users:
                    delattr(self.module, str(read.target))
                    self.graph.erase_node(read)
