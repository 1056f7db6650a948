"""Runs a traced graph a stretch at a time and accumulates what its linear layers and convolutions read and write.

Accumulation is in float32 and in the order of calls, samples are drawn by seeded generators: the same calls give the
same numbers.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calibration.moments import LayerStatistics, Moments, Outputs
from calibration.sweep import Calls, Labels, Sweep
from graphs.errors import UserError
from graphs.program import Program

LINEAR = (torch.ops.aten.linear.default,)
CONVOLUTIONS = (
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.convolution.default,
)

#: rows that are gathered before they are added to second moments: each addition reads and writes [K, K]
GATHERED = 1024

#: columns of second moments that are computed at once, those on their right with them; the rest is their mirror image
COLUMNS = 1024

Layers = Mapping[str, LayerStatistics]  # by the name of the weight
Given = tuple[Tensor, ...]  # by a method


class Reservoir:
    """A uniform sample of at most `size` rows of a stream: those with the largest of random keys, largest first.

    Vitter's reservoir by the keys of Efraimidis and Spirakis (2006), with equal weights.
    """

    def __init__(self, size: int, seed: int, name: str) -> None:
        self.size = size
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        self.keys = torch.empty(0, dtype=torch.float64)
        self.held = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Offer rows [N, K]."""
        keys = torch.rand(len(rows), generator=self.generator, dtype=torch.float64)
        free = self.size - len(self.keys)
        if free:
            self.keys = torch.cat([self.keys, keys[:free]])
            self.held = torch.cat([self.held, rows[:free]]) if len(self.held) else rows[:free].clone()
            keys, rows = keys[free:], rows[free:]
        if not len(keys):
            return
        better = (keys > self.keys.min()).nonzero()[:, 0]  # soon few
        kept = torch.cat([self.keys, keys[better]]).topk(self.size).indices
        stays = torch.zeros(self.size, dtype=torch.bool)
        stays[kept[kept < self.size]] = True
        places, come = (~stays).nonzero()[:, 0], better[kept[kept >= self.size] - self.size]
        self.keys[places], self.held[places] = keys[come], rows[come]

    @property
    def rows(self) -> Tensor:
        """What was drawn, [R, K]."""
        return self.held[self.keys.argsort(descending=True)]


class Hessian:
    """The sum of x x^T over rows x [K]."""

    def __init__(self, width: int) -> None:
        self.sum_KK = torch.zeros(width, width)
        self.gathered: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Count rows [N, K], which are kept until there are many."""
        self.gathered.append(rows)
        if sum(map(len, self.gathered)) >= GATHERED:
            self.flush()

    def flush(self) -> None:
        """Add what was gathered to the right of, and on, the diagonal's blocks."""
        if self.gathered:
            rows = torch.cat(self.gathered)
            self.gathered = []
            for start in range(0, len(self.sum_KK), COLUMNS):
                some = slice(start, start + COLUMNS)
                self.sum_KK[some, start:].addmm_(rows[:, some].T, rows[:, start:])

    def whole(self) -> Tensor:
        """[K, K]."""
        self.flush()
        for start in range(COLUMNS, len(self.sum_KK), COLUMNS):
            self.sum_KK[start : start + COLUMNS, :start] = self.sum_KK[:start, start : start + COLUMNS].T
        return self.sum_KK


class Extremes:
    """Grows into `Outputs`."""

    def __init__(self, width: int, reservoir: Reservoir) -> None:
        self.minimum = torch.full((width,), torch.inf)
        self.maximum = torch.full((width,), -torch.inf)
        self.reservoir = reservoir

    def add(self, rows: Tensor) -> None:
        """Count rows, float32 [N, K]. Two reductions: `aminmax` along columns takes ten times as long."""
        torch.minimum(self.minimum, rows.amin(0), out=self.minimum)
        torch.maximum(self.maximum, rows.amax(0), out=self.maximum)
        self.reservoir.add(rows)

    def outputs(self) -> Outputs:
        """What was counted."""
        return Outputs(self.minimum, self.maximum, self.reservoir.rows)


class Accumulator(Extremes):
    """Grows into `Moments`."""

    def __init__(self, width: int, hessian: bool, reservoir: Reservoir) -> None:
        super().__init__(width, reservoir)
        self.count = 0
        self.sum_abs = torch.zeros(width)
        self.sum_square = torch.zeros(width)
        self.hessian = Hessian(width) if hessian else None

    def add(self, rows: Tensor) -> None:
        super().add(rows)
        self.count += len(rows)
        self.sum_abs += rows.abs().sum(0)
        self.sum_square += rows.square().sum(0)
        if self.hessian is not None:
            self.hessian.add(rows)

    def moments(self) -> Moments:
        """What was counted."""
        return Moments(
            self.count,
            self.minimum,
            self.maximum,
            self.sum_abs,
            self.sum_square,
            None if self.hessian is None else self.hessian.whole(),
            self.reservoir.rows,
        )


def layer_nodes(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The nodes of an unlifted graph that apply a weight, by the weight's name; a weight may be applied twice."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in LINEAR + CONVOLUTIONS:
            weight = node.args[1]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                found.setdefault(str(weight.target), []).append(node)
    return found


def as_rows(value: Tensor, node: fx.Node) -> Tensor:
    """The input or output of a layer as float32 [N, K]: the last axis of a linear layer, the channels of pictures."""
    if node.target in CONVOLUTIONS:
        value = value.movedim(1, -1)
    return value.detach().reshape(-1, value.shape[-1]).float()


def rows_of(labels: Labels, count: int) -> Labels:
    """The positions of each modality among `count` rows that a layer sees of them.

    A graph that drops image positions on its way (decoder pruning keeps the order) leaves that many fewer of them; one
    that drops more than there are reads the last positions alone (`last_logits`); all rows are of one modality where
    the call is. Raises ValueError for more rows than positions.
    """
    total = sum(map(len, labels.values()))
    if count == total:
        return labels
    if len(labels) == 1:
        return {name: torch.arange(count) for name in labels}
    lost = total - count
    if lost < 0:
        raise ValueError(f"a layer sees {count} rows of {total} positions")
    pictures = labels["image"]
    kept = torch.arange(total) >= lost
    if lost <= len(pictures):
        kept[:] = True
        kept[pictures[len(pictures) - lost :]] = False
    moved = kept.cumsum(0) - 1
    return {name: moved[positions[kept[positions]]] for name, positions in labels.items()}


class Observer:
    """One method of a program, run with real weights; `run` observes its layers, each in one sweep.

    Layers that read the same nodes form a group: its inputs are counted once, at the first of them.
    """

    def __init__(
        self,
        program: Program,
        method: str,
        *,
        hessians: re.Pattern[str] | None,
        rows: int,
        outputs: int,
        seed: int,
    ) -> None:
        self.sweep = Sweep(program, method)
        self.method = method
        self.hessians, self.size, self.outputs_size, self.seed = hessians, rows, outputs, seed
        graph = self.sweep.graph
        layers = layer_nodes(graph)
        self.group: dict[str, str] = {}  # a layer's, called by its first one
        first: dict[tuple[fx.Node, ...], str] = {}
        for entry, nodes in layers.items():
            read = tuple(node.all_input_nodes[0] for node in nodes)
            kind = nodes[0].target in CONVOLUTIONS
            self.group[entry] = first.setdefault((*read, graph.output_node()) if kind else read, entry)
        self.entry = {node: entry for entry, nodes in layers.items() for node in nodes}
        stretch = {node: number for number, nodes in enumerate(self.sweep.stretches) for node in nodes}
        self.extent: dict[str, tuple[int, int]] = {}  # the stretches where a group's counting begins, and is complete
        for node, entry in self.entry.items():
            begin, end = self.extent.get(self.group[entry], (stretch[node], 0))
            self.extent[self.group[entry]] = min(begin, stretch[node]), max(end, stretch[node])
        self.inputs: dict[str, dict[str, Accumulator]] = {entry: {} for entry in self.extent}
        self.outputs: dict[str, Extremes] = {}

    def counted_bytes(self) -> dict[str, int]:
        """What is counted of the inputs of each group, in one modality."""
        found: dict[str, int] = {}
        for node, entry in self.entry.items():
            if self.group[entry] == entry and isinstance(weight := node.args[1], fx.Node):
                width = weight.meta["val"].shape[1]
                hessian = width if node.target in LINEAR and self.wants_hessian(entry) else 0
                found[entry] = 4 * width * (hessian + self.size)
        return found

    def held_bytes(self, modalities: int) -> int:
        """The most that a stretch's weights, and what is counted of its layers' inputs, take."""
        most = self.sweep.weight_bytes()
        for entry, counted in self.counted_bytes().items():
            begin, end = self.extent[entry]
            for number in range(begin, end + 1):
                most[number] += modalities * counted
        return max(most)

    def run(
        self,
        sequences: Sequence[Calls],
        keep: Callable[[Layers], None],
        say: Callable[[str], None] = lambda line: None,
        take: Callable[[Given], Given] = lambda outputs: outputs,
    ) -> list[list[Given]]:
        """Run the method and count its layers' values; what `take` keeps of its outputs. Once for an observer.

        `keep` gets the layers of each group that is complete, which share `inputs`, and holds them alone then. Raises
        UserError where the model computed numbers that are not finite.
        """
        count = len(self.sweep.stretches)

        def after(number: int) -> None:
            for leader in [leader for leader, (_, end) in self.extent.items() if end == number]:
                if found := self.statistics(leader):
                    keep(found)
            if (number + 1) % -(-count // 8) == 0:
                say(f"{self.method}: {number + 1} of {count} stretches")

        return self.sweep.sweep(sequences, self.see, after, take)

    def see(self, node: fx.Node, read: Mapping[fx.Node, Any], result: Any, labels: Labels) -> None:
        """Where a node is a layer, count what it reads and gives."""
        entry = self.entry.get(node)
        if entry is None:
            return
        if self.group[entry] == entry:
            self.count_inputs(entry, node, as_rows(read[node.all_input_nodes[0]], node), labels)
        rows = as_rows(result, node)
        if entry not in self.outputs:
            name = f"{self.method}:{entry}:outputs"
            self.outputs[entry] = Extremes(rows.shape[1], Reservoir(self.outputs_size, self.seed, name))
        self.outputs[entry].add(rows)

    def count_inputs(self, entry: str, node: fx.Node, rows: Tensor, labels: Labels) -> None:
        """Add a layer's input to the accumulators of the modalities in it."""
        for modality, positions in rows_of(labels, len(rows)).items():
            if not len(positions):
                continue
            accumulators = self.inputs[entry]
            if modality not in accumulators:
                name = f"{self.method}:{entry}:{modality}"
                hessian = node.target in LINEAR and self.wants_hessian(entry)
                reservoir = Reservoir(self.size, self.seed, name)
                accumulators[modality] = Accumulator(rows.shape[1], hessian, reservoir)
            accumulators[modality].add(rows if len(positions) == len(rows) else rows[positions])

    def members(self, leader: str) -> list[str]:
        """The layers of a group."""
        return [entry for entry, first in self.group.items() if first == leader]

    def wants_hessian(self, leader: str) -> bool:
        """Whether a layer of the group matches the expression."""
        return self.hessians is not None and any(
            self.hessians.search(f"{self.method}:{name}") for name in self.members(leader)
        )

    def statistics(self, leader: str) -> dict[str, LayerStatistics]:
        """Of the layers of a group that were run, which are forgotten. Raises UserError for numbers that are none."""
        inputs = {modality: accumulator.moments() for modality, accumulator in sorted(self.inputs.pop(leader).items())}
        found: dict[str, LayerStatistics] = {}
        for entry in self.members(leader):
            if entry not in self.outputs:
                continue
            given = self.outputs.pop(entry).outputs()
            values = (given.minimum, given.maximum, *(moments.sum_square for moments in inputs.values()))
            if not all(bool(value.isfinite().all()) for value in values):
                raise UserError(f"{self.method}: {entry} reads or gives NaN or Inf: these weights cannot be calibrated")
            found[entry] = LayerStatistics(inputs, given)
        return found
