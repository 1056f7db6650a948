"""A method run on many calls, a stretch of its graph at a time: memory holds a stretch's weights, not the model's.

Every call goes through one stretch before any goes through the next, so that each weight is read once, however many
calls there are. Between stretches a call is what later ones still read of it; stretches end where that is little. The
calls of a sequence share the method's state, which no stretch leaves half written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, fx

from graphs.program import Program, zeros
from graphs.rewrite import Opened

aten = torch.ops.aten

Labels = Mapping[str, Tensor]  # modality -> int64 positions of the call, together all of them

#: bytes of weights, as the graph reads them, from which on a stretch may end, and at which it does
LEAST_BYTES, MOST_BYTES = 64 << 20, 192 << 20


@dataclass(frozen=True)
class Call:
    """What a method is called with, and of which modality the positions are."""

    inputs: tuple[Tensor, ...]
    labels: Labels


Calls = Sequence[Call]  # that share state, in order
Outputs = tuple[Tensor, ...]
State = dict[str, Tensor]  # by name, what is not zeros any more
Watch = Callable[[fx.Node, Mapping[fx.Node, Any], Any, Labels], None]  # a node, what it read, what it gave


def size(value: Any, length: int = 0) -> int:
    """Bytes of a fake tensor whose dynamic dimensions are of a length, or else of those that it was traced with."""
    if not isinstance(value, Tensor):
        return 0
    return math.prod(extent(s, length) for s in value.shape) * value.element_size()


def extent(dimension: int | torch.SymInt, length: int = 0) -> int:
    """A dimension where all dynamic ones take a length, clipped to the bounds of each."""
    if isinstance(dimension, int):
        return dimension
    node = dimension.node
    if not length:
        return int(node.hint or 1)
    bounds = {symbol: node.shape_env.var_to_range[symbol] for symbol in node.expr.free_symbols}
    return int(node.expr.subs({symbol: max(b.lower, min(b.upper, length)) for symbol, b in bounds.items()}))


def write_early(graph: fx.Graph) -> None:
    """Move the writing of state to where its new value is made, and reading of weights to where they are first used."""
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        if isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr":
            node.all_input_nodes[1].append(node)
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="get_attr"):
        if node.users:
            min(node.users, key=place.__getitem__).prepend(node)


def ends(weights: Sequence[int], living: Sequence[int], open_state: Sequence[bool], least: int, most: int) -> list[int]:
    """How many nodes lie before the end of each stretch.

    Of each node, in order: bytes of weights that it reads, bytes that later nodes read of it and those before it, and
    whether some state is being written behind it. A stretch ends where least is kept, of the places behind `least`
    bytes of weights and before `most`, or at the first one where it may.
    """
    found: list[int] = []
    start = 0
    while start < len(weights):
        filled, best = 0, None
        for number in range(start, len(weights)):
            filled += weights[number]
            if best is not None and filled > most:
                break
            if filled >= least and not open_state[number] and (best is None or living[number] <= living[best]):
                best = number
        else:
            best = len(weights) - 1
        assert best is not None
        start = best + 1
        found.append(start)
    return found


class Sweep(fx.Interpreter):
    """A method of a program, run with its real weights."""

    def __init__(self, program: Program, method: str) -> None:
        opened = Opened.open(program, method)
        write_early(opened.graph)
        super().__init__(opened.module)
        self.program, self.method, self.mode = program, method, opened.mode
        self.states = {spec.name for spec in program.methods[method].signature.state}
        self.inputs = list(opened.graph.find_nodes(op="placeholder"))
        self.nodes = [node for node in opened.graph.nodes if node.op != "placeholder"]
        self.stretches = self.divided()
        self.loaded: dict[str, Tensor] = {}
        self.state: State = {}
        self.fake = False

    def last_reads(self) -> list[int]:
        """Of each node, the place of the last one that reads it; its own where none does."""
        place = {node: number for number, node in enumerate(self.nodes)}
        return [max((place[user] for user in node.users), default=place[node]) for node in self.nodes]

    def living(self, length: int = 0) -> list[int]:
        """Bytes of what is computed up to each node and read behind it, of one call; `length` as `size` has it."""
        found = [0] * len(self.nodes)
        for number, (node, last) in enumerate(zip(self.nodes, self.last_reads(), strict=True)):
            held = 0 if node.op == "get_attr" else size(node.meta.get("val"), length)
            for later in range(number, last if held else number):
                found[later] += held
        return found

    def weights(self) -> list[int]:
        """Bytes of weights that each node is, as the graph reads them."""
        return [
            size(node.meta.get("val")) if node.op == "get_attr" and node.target not in self.states else 0
            for node in self.nodes
        ]

    def divided(self) -> list[list[fx.Node]]:
        """The nodes of each stretch."""
        open_state = [False] * len(self.nodes)
        for number, (node, last) in enumerate(zip(self.nodes, self.last_reads(), strict=True)):
            if node.op == "get_attr" and node.target in self.states:
                open_state[number:last] = [True] * (last - number)
        cuts = ends(self.weights(), self.living(), open_state, LEAST_BYTES, MOST_BYTES)
        return [self.nodes[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]

    def weight_bytes(self) -> list[int]:
        """What the weights of each stretch take."""
        weights = iter(self.weights())
        return [sum(islice(weights, len(nodes))) for nodes in self.stretches]

    def passed_bytes(self, length: int) -> int:
        """The most that one call, with dynamic dimensions of a length, is between two stretches."""
        living = self.living(length)
        return max(living[end - 1] for end in accumulate(map(len, self.stretches)))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A weight, read once a stretch, or state, which begins as zeros."""
        if self.fake or (target not in self.states and target not in self.program.methods[self.method].weight_names):
            return super().get_attr(target, args, kwargs)
        if target in self.states:
            if target not in self.state:
                self.state[target] = zeros(self.fetch_attr(target))
            return self.state[target]
        if target not in self.loaded:
            self.loaded[target] = self.program.tensor(self.method, target)
        return self.loaded[target]

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node of `self.env`."""
        written = n.all_input_nodes[0] if n.target is aten.copy_.default else None
        if written is None or written.target not in self.states:
            return super().run_node(n)
        value = self.env[n.all_input_nodes[1]]
        self.state[str(written.target)] = value
        return value

    @torch.no_grad()
    def sweep(
        self,
        sequences: Sequence[Calls],
        watch: Watch | None = None,
        after: Callable[[int], None] = lambda number: None,
        take: Callable[[Outputs], Outputs] = lambda outputs: outputs,
        states: Sequence[State] | None = None,
    ) -> list[list[Outputs]]:
        """What `take` keeps of the outputs of all calls.

        `watch` sees every node computed, `after` is told of each stretch that is done. `states`: those that sequences
        go on with, and leave; without, each begins with its own, and no more than one is in memory at a time.
        """
        environments: list[list[dict[fx.Node, Any]]] = [
            [dict(zip(self.inputs, call.inputs, strict=True)) for call in calls] for calls in sequences
        ]
        results: list[list[Outputs]] = [[] for _ in sequences]
        for number, stretch in enumerate(self.stretches):
            for index, (calls, own, outputs) in enumerate(zip(sequences, environments, results, strict=True)):
                self.state = {} if states is None else states[index]
                for call, self.env in zip(calls, own, strict=True):
                    for node in stretch:
                        value = self.run_node(node)
                        if node.op == "output":
                            outputs.append(take(tuple(value) if isinstance(value, (tuple, list)) else (value,)))
                            continue
                        if watch is not None:
                            watch(node, self.env, value, call.labels)
                        if node.users:
                            self.env[node] = value
                        for read in self.user_to_last_uses.get(node, ()):
                            self.env.pop(read, None)
                self.state = {}
            for target in self.loaded:
                self.program.release(self.method, target)
            self.loaded = {}
            after(number)
        return results

    def shapes(self, inputs: Sequence[Tensor]) -> list[torch.Size]:
        """The outputs' shapes for such inputs, by fake tensors. Raises what torch does where they depend on data."""
        with self.mode:
            given = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in inputs]
            self.fake = True
            try:
                ((outputs,),) = self.sweep([[Call(tuple(given), {})]])
            finally:
                self.fake = False
        return [torch.Size(output.shape) for output in outputs]
