"""How far a program's own outputs move when they are computed in other floats: what its artefacts may be off by.

Where activations are rounded to integers, a last-bit difference before the rounding turns into a whole step behind it,
and steps turn others over, layer after layer: two right computations of the same quantized graph then differ by far
more than their arithmetic does. So the gate of such a method is set by an experiment: the graph run by torch in a
second float type, float64 beside float32 or float16, whichever a target's floats call for, and again with all its
weights a few last bits larger or smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from export.verify import Vectors, compare, inputs_of, program_signatures, record, seeded_inputs
from graphs.program import Program
from quant.precision import CastFloats
from quant.resolve import Resolved
from runtimes.eager import EagerRuntime

#: an artefact may be this many times as far from the graph as the graph is from itself in other floats
SLACK = 2.0

#: and no farther than this, whatever the experiment says
MOST = 0.1

#: by how many roundings all floating weights are changed in turn: each change turns other steps over
NUDGES = (0, 1, -1, 4, -4)

#: the least of such roundings, some of float32's
LEAST = 2.0**-20

#: inputs that are tried for one at which the graph is steadier than that
SEEDS = 8


@dataclass(frozen=True)
class Nudged(Program):
    """A program whose floating weights are `factor` times as large; what it writes as quantized integers stays."""

    factor: float = 1.0

    def tensor(self, method: str, entry: str) -> Tensor:
        value = super().tensor(method, entry)
        return value * self.factor if value.is_floating_point() and value.dtype.itemsize > 1 else value


def second_floats(resolved: Resolved) -> torch.dtype:
    """The type to compute in besides the program's own: the target's, or one with more digits where that is its own."""
    return torch.float64 if resolved.floats == "float32" else getattr(torch, resolved.floats)


@dataclass(frozen=True)
class Trial:
    """What artefacts are checked on: inputs drawn by `seed`, the outputs expected, and the gate of each method."""

    seed: int
    expected: Vectors
    limits: Mapping[str, float]


def trial(resolved: Resolved, base: float, rounded: Program, program: Program) -> Trial:
    """The first of some seeds at whose inputs the program as deployed is steady enough to be checked against.

    Where tokens are chosen by content, noise may put two of them at a tie that the last bit decides, and the outputs
    are then of other tokens altogether: no fault of an artefact, and no check of it either. The gate of each method is
    `base`, or more where it rounds activations and is unstable. `rounded` is the program before its floats are cast.
    """
    unsettled = {layer.method for layer, scheme, _ in resolved.layers.values() if scheme.activations}
    mine = EagerRuntime(program)
    kept = Program({name: rounded.methods[name] for name in unsettled}, rounded.weights, rounded.constants)
    other = CastFloats(second_floats(resolved)).run(kept)
    step = max(LEAST, torch.finfo(getattr(torch, resolved.floats)).eps)
    same = None if program is rounded else EagerRuntime(kept)
    first: Trial | None = None
    for seed in range(SEEDS if unsettled else 1):
        expected = record(mine, seeded_inputs(program_signatures(program), seed))
        inputs = {method: calls for method, calls in inputs_of(expected).items() if method in unsettled}
        moved: dict[str, float] = dict.fromkeys(expected, 0.0)
        steady = record(same, inputs) if same else {method: expected[method] for method in inputs}
        for by in NUDGES if unsettled else ():
            nudged = Nudged(other.methods, other.weights, other.constants, 1 + step * by)
            found = compare(record(EagerRuntime(nudged), inputs), steady)
            moved |= {name: max(moved[name], SLACK * entry["relative_l2"]) for name, entry in found.items()}
        made = Trial(seed, expected, {method: min(MOST, max(base, moved[method])) for method in expected})
        if max(moved.values()) <= MOST:
            return made
        first = first or made
    assert first is not None
    return first
