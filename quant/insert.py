"""Quantize and dequantize operators put into a traced method, as `graphs` data says: which layer, which scheme.

What each operator computes is in `quant.ops`; the numbers (integers, scales, ranges) are given as `Values`, asked for
only when a target writes them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from graphs.program import Program
from graphs.rewrite import Opened
from quant.layers import Layer, layers
from quant.ops import FLOAT8
from quant.scheme import Scheme, WeightScheme

vlmx = torch.ops.vlmx
aten = torch.ops.aten

#: scale and zero point (None: symmetric) of a tensor's static quantization, both of rank 0
Range = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Choice:
    """What one layer gets. `weight` gives the parts of its quantized weight by name: `q`, `scale`, `zero_point`, or
    `index` and `table` of a palette; `name` tells equal choices of equal weights apart from others.
    """

    scheme: Scheme
    name: str
    weight: Callable[[], Mapping[str, Tensor]]
    input: Range | None = None
    output: Range | None = None


def insert(program: Program, choices: Mapping[tuple[str, str], Choice]) -> Program:
    """`program` with the layers of `choices`, by (method, entry of the weight), quantized."""
    for method in program:
        mine = {entry: choice for (name, entry), choice in choices.items() if name == method}
        if mine:
            opened = Opened.open(program, method)
            Inserter(opened, mine).run()
            program = opened.lift()
    return program


def part_shapes(shape: tuple[int, ...], scheme: WeightScheme) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The parts of a quantized weight: shapes and dtypes, so that graphs are made before numbers are."""
    if scheme.kind == "palette":
        return {"index": (shape, torch.uint8), "table": ((1, 1 << scheme.bits), torch.float32)}
    scale = (*shape[:-1], shape[-1] // scheme.group) if scheme.group else (shape[0], *[1] * (len(shape) - 1))
    parts = {"q": (shape, FLOAT8 if scheme.kind == "float8" else torch.int8), "scale": (scale, torch.float32)}
    return {**parts, "zero_point": (scale, torch.int8)} if scheme.asymmetric else parts


def part_of(choice: Choice, part: str) -> Tensor:
    """One part of a quantized weight, computed now."""
    return choice.weight()[part]


class Inserter:
    """Changes one opened method; what several layers read is quantized once."""

    def __init__(self, opened: Opened, choices: Mapping[str, Choice]) -> None:
        self.opened = opened
        self.choices = choices
        self.weights: dict[str, fx.Node] = {}
        self.inputs: dict[tuple[fx.Node, str, int], fx.Node] = {}

    def run(self) -> None:
        for layer in layers(self.opened):
            if layer.entry in self.choices:
                choice = self.choices[layer.entry]
                self.embedding(layer, choice) if layer.kind == "embedding" else self.layer(layer, choice)
        self.opened.drop_unread()

    def layer(self, layer: Layer, choice: Choice) -> None:
        """A linear layer or a convolution."""
        read_now = layer.node.args[0]  # quantizing a layer before this one may have exchanged what it reads
        assert isinstance(read_now, fx.Node)
        layer = replace(layer, input=read_now)
        graph = self.opened.graph
        with graph.inserting_before(layer.node):
            read = self.input(layer, choice)
            weight = self.weights.get(layer.entry)
            if weight is None:
                weight = self.dequantized(choice.scheme.weights, **self.parts(layer, choice))
                self.weights[layer.entry] = weight
        layer.node.replace_input_with(layer.weight, weight)
        layer.node.replace_input_with(layer.input, read)
        if choice.output is not None:
            with graph.inserting_after(layer.node):
                anchor = graph.call_function(aten.alias.default, (layer.node,))
            layer.node.replace_all_uses_with(anchor, delete_user_cb=lambda user: user is not anchor)
            with graph.inserting_before(anchor):
                kept = self.static(layer.node, f"{layer.entry}_out", choice.output, torch.int8)
            anchor.replace_all_uses_with(kept)
            graph.erase_node(anchor)

    def embedding(self, layer: Layer, choice: Choice) -> None:
        """Integers are gathered, and only the rows that were gathered dequantized."""
        graph, scheme = self.opened.graph, choice.scheme.weights
        with graph.inserting_before(layer.node):
            parts = self.parts(layer, choice)
            rows = {
                name: graph.call_function(aten.embedding.default, (node, layer.input)) for name, node in parts.items()
            }
            made = self.dequantized(scheme, **rows)
        layer.node.replace_all_uses_with(made)
        graph.erase_node(layer.node)

    def parts(self, layer: Layer, choice: Choice) -> dict[str, fx.Node]:
        """Nodes that read the parts of the quantized weight."""
        made = {}
        for part, (shape, dtype) in part_shapes(layer.shape, choice.scheme.weights).items():
            entry, value = f"{layer.entry}_{part}", partial(part_of, choice, part)
            made[part] = self.opened.constant(entry, value, shape, dtype, f"{choice.name}.{part}")
        return made

    def dequantized(self, scheme: WeightScheme, **parts: fx.Node) -> fx.Node:
        graph = self.opened.graph
        if scheme.kind == "palette":
            return graph.call_function(vlmx.palette.default, (parts["index"], parts["table"], scheme.bits))
        return graph.call_function(
            vlmx.dequantize.default, (parts["q"], parts["scale"], parts.get("zero_point"), scheme.bits, scheme.group)
        )

    def input(self, layer: Layer, choice: Choice) -> fx.Node:
        """What the layer reads, quantized and dequantized as its scheme says."""
        graph, activations = self.opened.graph, choice.scheme.activations
        group = choice.scheme.weights.group if activations == "a8b" else 0
        if not activations:
            return layer.input
        if choice.input is not None:
            dtype = FLOAT8 if activations == "af8" else torch.int8
            key = (layer.input, f"{choice.input[0].item()} {choice.input[1]}", 0)
        else:
            key = (layer.input, activations, group)
        if key not in self.inputs:
            if choice.input is not None:
                self.inputs[key] = self.static(layer.input, f"{layer.entry}_in", choice.input, dtype)
            elif activations == "a8t":
                made = graph.call_function(vlmx.quantize_per_token.default, (layer.input,))
                q, scale, zero = (graph.call_function(operator.getitem, (made, n)) for n in range(3))
                self.inputs[key] = graph.call_function(vlmx.dequantize.default, (q, scale, zero, 8, 0))
            else:
                made = graph.call_function(vlmx.quantize_per_block.default, (layer.input, group))
                q, scale = (graph.call_function(operator.getitem, (made, n)) for n in range(2))
                self.inputs[key] = graph.call_function(vlmx.dequantize.default, (q, scale, None, 8, group))
        return self.inputs[key]

    def static(self, node: fx.Node, entry: str, range_: Range, dtype: torch.dtype) -> fx.Node:
        """A node through quantize and dequantize with constant scale and zero point."""
        graph = self.opened.graph
        scale, zero = (
            None if value is None else self.opened.constant(f"{entry}_{part}", value, (), value.dtype)
            for part, value in zip(("scale", "zero_point"), range_, strict=True)
        )
        q = graph.call_function(vlmx.quantize.default, (node, scale, zero, dtype))
        return graph.call_function(vlmx.dequantize.default, (q, scale, zero, 8, 0))
