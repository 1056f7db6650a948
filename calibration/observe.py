"""Runs a traced graph one operator at a time and accumulates what its linear layers and convolutions read and write.

Accumulation is in float32 and in the order of calls, samples are drawn by seeded generators: the same calls give the
same numbers.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calibration.moments import Key, LayerStatistics, Moments, Outputs
from graphs.errors import UserError
from graphs.program import Program

LINEAR = (torch.ops.aten.linear.default,)
CONVOLUTIONS = (
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.convolution.default,
)

Labels = Mapping[str, Tensor]  # modality -> int64 positions of the call, together all of them


class Reservoir:
    """A uniform sample of at most `size` rows of a stream: those with the largest of random keys, largest first.

    Vitter's reservoir by the keys of Efraimidis and Spirakis (2006), with equal weights.
    """

    def __init__(self, size: int, seed: int, name: str) -> None:
        self.size = size
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Offer rows [N, K]."""
        keys = torch.rand(len(rows), generator=self.generator, dtype=torch.float64)
        chosen = keys.topk(min(self.size, len(keys))).indices  # no more than these can stay: only they are copied
        keys, rows = keys[chosen], rows[chosen]
        if len(self.keys):
            keys, rows = torch.cat([self.keys, keys]), torch.cat([self.rows, rows])
        self.keys, chosen = keys.topk(min(self.size, len(keys)))
        self.rows = rows[chosen].clone()


class Accumulator:
    """Grows into `Moments`."""

    def __init__(self, width: int, hessian: bool, reservoir: Reservoir) -> None:
        self.count = 0
        self.minimum = torch.full((width,), torch.inf)
        self.maximum = torch.full((width,), -torch.inf)
        self.sum_abs = torch.zeros(width)
        self.sum_square = torch.zeros(width)
        self.hessian = torch.zeros(width, width) if hessian else None
        self.reservoir = reservoir

    def add(self, rows: Tensor) -> None:
        """Count rows, float32 [N, K]."""
        self.count += len(rows)
        low, high = rows.aminmax(dim=0)
        torch.minimum(self.minimum, low, out=self.minimum)
        torch.maximum(self.maximum, high, out=self.maximum)
        self.sum_abs += rows.abs().sum(0)
        self.sum_square += rows.square().sum(0)
        if self.hessian is not None:
            self.hessian.addmm_(rows.T, rows)
        self.reservoir.add(rows)

    def moments(self) -> Moments:
        """What was counted."""
        return Moments(
            self.count,
            self.minimum,
            self.maximum,
            self.sum_abs,
            self.sum_square,
            self.hessian,
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


class Observer(fx.Interpreter):
    """One method of a program, run with real weights and state of its own; `call` observes its layers."""

    def __init__(
        self, program: Program, method: str, *, hessians: re.Pattern[str] | None, rows: int, outputs: int, seed: int
    ) -> None:
        module = program.module(method)
        assert isinstance(module, fx.GraphModule)
        super().__init__(module)
        self.method = method
        self.hessians, self.size, self.outputs_size, self.seed = hessians, rows, outputs, seed
        self.layers = layer_nodes(module.graph)
        states = {spec.name for spec in program.methods[method].signature.state}
        self.state = [buffer for name, buffer in module.named_buffers() if name in states]
        # Layers that read the same nodes form a group, called by the first one's weight: its inputs are counted once.
        self.group: dict[str, str] = {}
        first: dict[tuple[fx.Node, ...], str] = {}
        for entry, nodes in self.layers.items():
            read = tuple(node.all_input_nodes[0] for node in nodes)
            kind = nodes[0].target in CONVOLUTIONS
            self.group[entry] = first.setdefault((*read, module.graph.output_node()) if kind else read, entry)
        self.entry = {node: entry for entry, nodes in self.layers.items() for node in nodes}
        self.inputs: dict[str, dict[str, Accumulator]] = {entry: {} for entry in first.values()}
        self.outputs: dict[str, Accumulator] = {}
        self.labels: Labels = {}

    def reset(self) -> None:
        """Zero all state."""
        for buffer in self.state:
            buffer.zero_()

    def call(self, labels: Labels, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the method and count its layers' values; its outputs."""
        self.labels = labels
        with torch.no_grad():
            result = self.run(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node; where it is a layer, count what it reads and gives."""
        result = super().run_node(n)
        entry = self.entry.get(n)
        if entry is None:
            return result
        if self.group[entry] == entry:
            self.count_inputs(entry, n)
        rows = as_rows(result, n)
        if entry not in self.outputs:
            name = f"{self.method}:{entry}:outputs"
            self.outputs[entry] = Accumulator(rows.shape[1], False, Reservoir(self.outputs_size, self.seed, name))
        self.outputs[entry].add(rows)
        return result

    def count_inputs(self, entry: str, node: fx.Node) -> None:
        """Add a layer's input to the accumulators of the modalities in it."""
        rows = as_rows(self.env[node.all_input_nodes[0]], node)
        for modality, positions in rows_of(self.labels, len(rows)).items():
            if not len(positions):
                continue
            accumulators = self.inputs[entry]
            if modality not in accumulators:
                name = f"{self.method}:{entry}:{modality}"
                hessian = node.target in LINEAR and self.wants_hessian(entry)
                reservoir = Reservoir(self.size, self.seed, name)
                accumulators[modality] = Accumulator(rows.shape[1], hessian, reservoir)
            accumulators[modality].add(rows if len(positions) == len(rows) else rows[positions])

    def wants_hessian(self, entry: str) -> bool:
        """Whether a layer of the group that `entry` leads matches the expression."""
        members = [name for name, leader in self.group.items() if leader == entry]
        return self.hessians is not None and any(self.hessians.search(f"{self.method}:{name}") for name in members)

    def statistics(self) -> dict[Key, LayerStatistics]:
        """Of every layer that was run. Raises UserError where the model computed numbers that are not finite."""
        inputs = {
            leader: {modality: accumulator.moments() for modality, accumulator in sorted(accumulators.items())}
            for leader, accumulators in self.inputs.items()
        }
        found: dict[Key, LayerStatistics] = {}
        for entry, accumulator in self.outputs.items():
            total = accumulator.moments()
            values = [total, *inputs[self.group[entry]].values()]
            if not all(bool(moments.sum_square.isfinite().all()) for moments in values):
                raise UserError(f"{self.method}: {entry} reads or gives NaN or Inf: these weights cannot be calibrated")
            outputs = Outputs(total.minimum, total.maximum, total.rows)
            found[self.method, entry] = LayerStatistics(inputs[self.group[entry]], outputs)
        return found
