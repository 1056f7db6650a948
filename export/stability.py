"""How far a program's own outputs move when they are computed in other floats: what its artefacts may be off by.

Where activations are rounded to integers, a last-bit difference before the rounding turns into a whole step behind it,
and steps turn others over, layer after layer: two right computations of the same quantized graph then differ by far
more than their arithmetic does. So the gate of such a method is set by an experiment: the graph run by torch in a
second float type, float64 beside float32 or float16, whichever a target's floats call for, and again with all its
weights a few last bits larger or smaller.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from export.verify import Vectors, compare, program_signatures, record, seeded_inputs
from graphs.program import Program
from quant.precision import CastFloats
from quant.resolve import Resolved
from runtimes.base import Array
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
SEEDS = 24


#: operators that choose by value: where two candidates are near a tie, noise decides what is computed behind them
CHOOSING = (torch.ops.aten.topk.default, torch.ops.aten.argmax.default)

#: relative noise on all floating weights, about what eight bits and half precision add up to; less where no inputs are
#: steady under so much; and how often it is drawn
NOISES, DRAWS = (2.0**-7, 2.0**-8, 2.0**-9), 12


@dataclass(frozen=True)
class Nudged(Program):
    """A program whose floating weights are changed by `relative`: all alike, or normally distributed, by `draw`.

    What is kept as quantized integers stays.
    """

    relative: float = 0.0
    draw: int | None = None

    def tensor(self, method: str, entry: str) -> Tensor:
        value = super().tensor(method, entry)
        if not value.is_floating_point() or value.dtype.itemsize == 1:
            return value
        if self.draw is None:
            return value * (1 + self.relative)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.draw}:{method}:{entry}".encode()))
        return value * (1 + self.relative * torch.randn(value.shape, generator=generator).to(value.dtype))


def second_floats(resolved: Resolved) -> torch.dtype:
    """The type to compute in besides the program's own: the target's, or one with more digits where that is its own."""
    return torch.float64 if resolved.floats == "float32" else getattr(torch, resolved.floats)


@dataclass(frozen=True)
class Trial:
    """What artefacts are checked on: inputs drawn by `seed`, the outputs expected, and the gate of each method."""

    seed: int
    expected: Vectors
    limits: Mapping[str, float]


def part(program: Program, methods: Iterable[str]) -> Program:
    """Some methods of a program."""
    return Program({name: program.methods[name] for name in methods}, program.weights, program.constants)


def movement(
    programs: Iterable[Program], inputs: Mapping[str, list[list[Array]]], expected: Vectors
) -> dict[str, float]:
    """How far the farthest of some programs is from what is expected of the given inputs: relative L2 by method.

    The programs after one that is farther than `MOST` are not asked.
    """
    moved: dict[str, float] = dict.fromkeys(inputs, 0.0)
    for program in programs if inputs else ():
        found = compare(record(EagerRuntime(program), inputs), {name: expected[name] for name in inputs})
        moved |= {name: max(moved[name], entry["relative_l2"]) for name, entry in found.items()}
        if max(moved.values()) > MOST:
            break
    return moved


def trial(resolved: Resolved, base: float, rounded: Program, program: Program) -> Trial:
    """The first of some seeds at whose inputs the program as deployed is steady enough to be checked against.

    Where tokens are chosen by content, inputs may put two of them near a tie that rounding decides, and the outputs are
    then of other tokens altogether: no fault of an artefact, and no check of it either. Such inputs are passed over, by
    an experiment with noise as large as a target's. The gate of each method is `base`, or more where it rounds
    activations and is unstable. `rounded` is the program before its floats are cast.
    """
    unsettled = {layer.method for layer, scheme, _ in resolved.layers.values() if scheme.activations}
    choosing = {
        name
        for name, traced in program.methods.items()
        if any(node.target in CHOOSING for node in traced.exported.graph.nodes)
    }
    mine, kept, chosen = EagerRuntime(program), part(rounded, unsettled), part(program, choosing)
    other = CastFloats(second_floats(resolved)).run(kept)
    step = max(LEAST, torch.finfo(getattr(torch, resolved.floats)).eps)
    nudged = [Nudged(other.methods, other.weights, other.constants, step * by) for by in NUDGES]
    same = None if program is rounded else EagerRuntime(kept)
    best: tuple[float, Trial] | None = None
    for noise, seed in product(NOISES if choosing else NOISES[:1], range(SEEDS if unsettled or choosing else 1)):
        given = seeded_inputs(program_signatures(program), seed)
        shown = {name: given[name] for name in choosing}
        noisy = (Nudged(chosen.methods, chosen.weights, chosen.constants, noise, draw) for draw in range(DRAWS))
        worst = max(movement(noisy, shown, record(mine, shown)).values(), default=0.0)
        if best and worst > MOST:
            continue
        expected = record(mine, given)
        inputs = {name: given[name] for name in unsettled}
        moved = movement(nudged, inputs, record(same, inputs) if same else expected)
        limits = {name: min(MOST, max(base, SLACK * moved.get(name, 0.0))) for name in expected}
        worst = max(worst, SLACK * max(moved.values(), default=0.0))
        if best is None or worst < best[0]:
            best = worst, Trial(seed, expected, limits)
        if worst <= MOST:
            break
    assert best is not None
    return best[1]
