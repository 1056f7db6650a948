"""A resolved recipe applied to a program: factors moved, weights rounded, operators inserted, floats cast."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from calibration.statistics import Combined, Statistics
from graphs.program import Program
from quant.algorithms import ALGORITHMS, RESCALINGS
from quant.algorithms.activations import activation_range, float8_scale
from quant.algorithms.base import QuantizedWeight, by_rows
from quant.algorithms.inputs import Inputs
from quant.algorithms.palette import palette
from quant.insert import Choice, Range, insert
from quant.kv_cache import Int8Cache
from quant.layers import Layer
from quant.precision import CastFloats
from quant.recipe import Rule
from quant.rescale import groups, rescale
from quant.resolve import Key, Resolved
from quant.scheme import Scheme

Say = Callable[[str], None]

#: quantized weights kept for the next reader (a target, then the reference), the least recently used go first
KEPT_BYTES = 64 << 20

#: algorithms whose rows do not depend on each other, and elements of a weight whose pages go once they are rounded
ROWWISE, RELEASED = frozenset({"rtn", "mse"}), 1 << 24


class Kept:
    """Results by name, as many as fit `limit` bytes: memory stays bounded whatever the model's size."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.limit = limit
        self.results: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()

    def get(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        if name not in self.results:
            self.shrink(0)  # one alone may be beyond the limit: the next is not made beside it
            self.results[name] = compute()
        self.results.move_to_end(name)
        self.shrink(1)
        return self.results[name]

    def shrink(self, least: int) -> None:
        """Forget what is beyond the limit, but for so many results."""
        while len(self.results) > least and sum(map(size, self.results.values())) > self.limit:
            self.results.popitem(last=False)


def size(parts: Mapping[str, Tensor]) -> int:
    """Bytes of a quantized weight."""
    return sum(part.nbytes for part in parts.values())


def inputs_of(combined: Combined) -> Inputs:
    """Statistics of a layer as the algorithms read them."""
    return Inputs(combined.hessian, combined.mean_square, combined.absmean, combined.absmax, combined.rows)


class Quantization:
    """One resolved recipe on one program, with what calibration saw of it (None where the recipe needs nothing)."""

    def __init__(self, resolved: Resolved, statistics: Statistics | None, say: Say = lambda line: None) -> None:
        self.resolved = resolved
        self.statistics = statistics
        self.say = say
        self.kept = Kept()
        self.factors: dict[Key, Tensor] = {}

    def forget(self) -> None:
        """Let go of quantized weights that were kept for a next reader."""
        self.kept.results.clear()

    def on(self, program: Program) -> Quantization:
        """The same for a part of the program."""
        return Quantization(self.resolved.on(program), self.statistics, self.say)

    def apply(self, program: Program) -> Program:
        """The program in the recipe's numbers; its inputs and outputs keep their names and dtypes."""
        return self.cast(self.rounded(program))

    def cast(self, program: Program) -> Program:
        """The program with its floats cast, unless the target's converter does that."""
        return CastFloats(getattr(torch, self.resolved.floats)).run(program) if self.resolved.cast else program

    def rounded(self, program: Program) -> Program:
        """The program with quantized layers and cache, everything else still float32."""
        program = self.rescaled(program)
        program = insert(program, {key: self.choice(program, *found) for key, found in self.resolved.layers.items()})
        if self.resolved.kv_cache == "int8":
            program = Int8Cache().run(program)
        return program

    def combined(self, layer: Layer) -> Combined | None:
        """What the layer read; None where nothing was measured."""
        if self.statistics is None or layer.kind == "embedding":
            return None
        return self.statistics[layer.method, layer.entry].combined(self.resolved.recipe.modality)

    def release(self, layer: Layer) -> None:
        """What was measured of a layer has been read: its pages may go."""
        if self.statistics is not None and (layer.method, layer.entry) in self.statistics:
            self.statistics.release((layer.method, layer.entry))

    def rescaled(self, program: Program) -> Program:
        """Moves factors between the weights of layers whose rule says so."""
        for name, search in RESCALINGS.items():
            chosen = [f for f in self.resolved.layers.values() if f[2].rescale == name and f[0].kind == "linear"]
            schemes = {layer.node: scheme for layer, scheme, _ in chosen}
            for group in groups([layer for layer, _, _ in chosen]):
                first = group.layers[0]
                combined = self.combined(first)
                if combined is None:
                    continue
                self.say(f"{name}: {first.path}")
                weights = [program.tensor(layer.method, layer.entry) for layer in group.layers]
                found = search(weights, schemes[first.node].weights, inputs_of(combined))
                self.release(first)
                program = rescale(program, first.method, group, found)
                self.factors.update({(layer.method, layer.entry): found for layer in group.layers})
        return program

    def inputs(self, layer: Layer) -> Inputs | None:
        """What the layer reads, after factors were moved."""
        combined = self.combined(layer)
        if combined is None or layer.kind == "conv":
            return None
        inputs = inputs_of(combined)
        self.release(layer)
        factors = self.factors.get((layer.method, layer.entry))
        return inputs if factors is None else inputs.divided_by(factors)

    def choice(self, program: Program, layer: Layer, scheme: Scheme, rule: Rule) -> Choice:
        """What `insert` needs to know of a layer."""
        key = (layer.method, layer.entry)
        source = program.methods[layer.method].weight_names[layer.entry]
        name = f"{source}:{scheme}:{rule.scales}"

        def compute() -> Mapping[str, Tensor]:
            return self.quantized(program.stored(*key), layer, scheme, rule.scales, partial(program.release, *key))

        def weight() -> Mapping[str, Tensor]:
            return self.kept.get(name, compute)

        return Choice(scheme, name, weight, *self.ranges(layer, scheme))

    def quantized(
        self, weight: Tensor, layer: Layer, scheme: Scheme, scales: str, release: Callable[[], None]
    ) -> Mapping[str, Tensor]:
        """The parts of one layer's weight: integers and scales in the shapes that `insert.part_shapes` declares.

        `release` is called each time some of the weight has been read, where rows do not depend on each other.
        """
        inputs = self.inputs(layer)
        matrix = weight.flatten(1)
        if scheme.weights.kind == "palette":
            found = palette(matrix, scheme.weights.bits, inputs=inputs)
            release()
            return {"index": found.index.view(weight.shape), "table": found.table}
        chosen = scales if inputs is not None or scales != "gptq" else "mse"

        def rows(some_OK: Tensor) -> QuantizedWeight:
            found = ALGORITHMS[chosen](some_OK, scheme.weights, inputs)
            release()
            return found

        made = by_rows(matrix, rows, RELEASED if chosen in ROWWISE else matrix.numel())
        if scheme.bfloat16_scales:
            made = replace(made, scale=made.scale.bfloat16().float())
        scale_shape = made.scale.shape if weight.dim() == 2 else (len(weight), *[1] * (weight.dim() - 1))
        parts = {"q": made.q.view(weight.shape), "scale": made.scale.view(scale_shape)}
        return parts if made.zero_point is None else {**parts, "zero_point": made.zero_point.view(scale_shape)}

    def ranges(self, layer: Layer, scheme: Scheme) -> tuple[Range | None, Range | None]:
        """Static ranges of what the layer reads and gives, where the scheme fixes them."""
        if not scheme.needs_ranges:
            return None, None
        assert self.statistics is not None
        combined = self.combined(layer)
        assert combined is not None
        factors = self.factors.get((layer.method, layer.entry))
        rows = combined.rows if factors is None else combined.rows / factors
        if scheme.activations == "af8":
            absmax = combined.absmax if factors is None else combined.absmax / factors
            return (float8_scale(absmax.max()), None), None
        asymmetric = not self.resolved.symmetric
        given = self.statistics[layer.method, layer.entry].outputs if scheme.activations == "a8o" else None
        output = None if given is None else activation_range(given.rows, asymmetric=asymmetric)
        found = activation_range(rows, asymmetric=asymmetric)
        self.release(layer)
        return found, output
