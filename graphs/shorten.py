"""A program with one layer of each kind: what is run where the whole would take more memory or time than there is.

A stack of alike layers hands one value on, from layer to layer. A layer is left out by letting what reads its result
read what it was given; its weights and its state go with it. All else, and every layer that no other is like, stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from torch import fx

from graphs.lift import WRITES
from graphs.program import Program
from graphs.rewrite import Opened
from graphs.stack import DEPTHS, depth_of, owners, stacked


def superfluous(program: Program) -> dict[str, tuple[str, ...]]:
    """By method, the paths of the layers that are like another one: all of a stack's kind but its middle one.

    In layers that no other is like, stages of a tower, those of the stacks in them.
    """
    found: dict[str, tuple[str, ...]] = {}
    for method in program:
        graph = Opened.open(program, method).graph
        found[method] = ()
        for depth in DEPTHS:
            found[method] += tuple(path for path in alike(graph, depth) if not inside(path, found[method]))
    return found


def alike(graph: fx.Graph, depth: int) -> list[str]:
    """The paths of layers at a depth that are like another one."""
    kinds: dict[tuple[int, str], list[str]] = {}
    stack, made = 0, None
    for layer in stacked(graph, depth):
        stack += layer.given is not made
        made = layer.made
        kinds.setdefault((stack, layer.kind), []).append(layer.path)
    return [path for paths in kinds.values() for number, path in enumerate(paths) if number != len(paths) // 2]


def inside(path: str, others: Iterable[str]) -> bool:
    """Whether a module lies in one of others."""
    return any(path.startswith(f"{other}.") for other in others)


def shorten(program: Program, without: Mapping[str, tuple[str, ...]]) -> Program:
    """`program` without the layers `without` (method -> paths), each of which can be left out.

    Methods keep inputs and outputs; state of the layers goes. Raises KeyError for a layer that cannot be left out.
    """
    for method, paths in without.items():
        if not paths:
            continue
        opened = Opened.open(program, method)
        for depth in sorted(set(map(depth_of, paths))):
            leave_out(opened.graph, {path for path in paths if depth_of(path) == depth}, depth)
            opened.drop_unread()
        program = opened.lift()
    return program


def leave_out(graph: fx.Graph, left: Collection[str], depth: int) -> None:
    """Let nothing read what layers at a depth make, nor write their state."""
    found = {layer.path: layer for layer in stacked(graph, depth)}
    owner = owners(graph, depth)
    for node in [n for n in graph.nodes if n.target is WRITES]:
        if owner.get(node.args[1]) in left:
            graph.erase_node(node)
    given = {found[path].made: found[path].given for path in left}
    for made, node in given.items():
        while node in given:  # the layer before it is left out too
            node = given[node]
        made.replace_all_uses_with(node)


def operators(program: Program, method: str) -> Counter[str]:
    """How often each operator occurs in a method."""
    graph = program.methods[method].exported.graph
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
