"""A program with one layer of each kind: what is run where the whole would take more memory or time than there is.

A stack of alike layers hands one value on, from layer to layer. A layer is left out by letting what reads its result
read what it was given; its weights and its state go with it. All else, and every layer that no other is like, stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from graphs.lift import WRITES
from graphs.program import Program
from graphs.rewrite import Opened
from graphs.stack import owners, stacked


def superfluous(program: Program) -> dict[str, tuple[str, ...]]:
    """By method, the paths of the layers that are like another one: all of a stack's kind but its middle one."""
    found = {}
    for method in program:
        kinds: dict[tuple[int, str], list[str]] = {}
        stack, made = 0, None
        for layer in stacked(Opened.open(program, method).graph):
            stack += layer.given is not made
            made = layer.made
            kinds.setdefault((stack, layer.kind), []).append(layer.path)
        found[method] = tuple(p for paths in kinds.values() for i, p in enumerate(paths) if i != len(paths) // 2)
    return found


def shorten(program: Program, without: Mapping[str, tuple[str, ...]]) -> Program:
    """`program` without the layers `without` (method -> paths), each of which can be left out.

    Methods keep inputs and outputs; state of the layers goes. Raises KeyError for a layer that cannot be left out.
    """
    for method, paths in without.items():
        if not paths:
            continue
        opened = Opened.open(program, method)
        graph = opened.graph
        found = {layer.path: layer for layer in stacked(graph)}
        owner = owners(graph)
        left = set(paths)
        for node in [n for n in graph.nodes if n.target is WRITES]:
            if owner.get(node.args[1]) in left:
                graph.erase_node(node)
        given = {found[path].made: found[path].given for path in paths}
        for made, node in given.items():
            while node in given:  # the layer before it is left out too
                node = given[node]
            made.replace_all_uses_with(node)
        opened.drop_unread()
        program = opened.lift()
    return program


def operators(program: Program, method: str) -> Counter[str]:
    """How often each operator occurs in a method."""
    graph = program.methods[method].exported.graph
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
