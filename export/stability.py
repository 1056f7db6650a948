"""How far a program's own outputs move when they are computed in other floats: what its artefacts may be off by.

Where activations are rounded to integers, a last-bit difference before the rounding turns into a whole step behind it,
and steps turn others over, layer after layer: two right computations of the same quantized graph then differ by far
more than their arithmetic does. So the gate of such a method is set by an experiment: the graph run by torch in the
target's floats, again and again, each time with the last bits of its floating weights changed at random.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from export.gate import SAME, Distance, Limit, are_tokens, distance
from export.verify import Call, Vectors, program_signatures, record, record_eager, seeded_inputs
from graphs.program import Program
from quant.precision import CastFloats
from quant.resolve import Resolved
from runtimes.base import Array
from runtimes.eager import EagerRuntime

#: an artefact may be this many times as far from the graph as the graph is from itself in other floats
SLACK = 2.0

#: and no farther than this, whatever the experiment says
MOST = 0.1

#: how often floating weights are changed by about a rounding: each change turns other steps over
NUDGES = 3

#: the least of such roundings, some of float32's
LEAST = 2.0**-20

#: operators that choose by value: where two candidates are near a tie, noise decides what is computed behind them
CHOOSING = (torch.ops.aten.topk.default, torch.ops.aten.argmax.default)

#: relative noise on the floating weights of methods that choose, about what eight bits add up to where activations are
#: rounded, or so many roundings of the floats where not; and how often it is drawn
NOISE, ROUNDINGS, DRAWS = 2.0**-7, 8, 8

#: inputs that are tried for one at which such methods are steady
SEEDS = 12


def rounding(resolved: Resolved) -> set[str]:
    """The methods that round activations."""
    return {layer.method for layer, scheme, _ in resolved.layers.values() if scheme.activations}


@dataclass(frozen=True)
class Change:
    """Floating weights changed by `relative`: all alike, or normally distributed, by `draw`.

    What is kept as quantized integers stays.
    """

    relative: float
    draw: int | None = None

    def of(self, name: str, value: Tensor) -> Tensor:
        """`value` changed."""
        if self.draw is None:
            return value * (1 + self.relative)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.draw}:{name}".encode()))
        return value * (1 + self.relative * torch.randn(value.shape, generator=generator).to(value.dtype))


class Shaken:
    """One method as `runtime` has it, run with its floating weights changed."""

    def __init__(self, runtime: EagerRuntime, method: str) -> None:
        self.runtime, self.method = runtime, method

    def calls(self, inputs: Sequence[list[Array]], change: Change) -> Sequence[Call]:
        """What becomes of the inputs. The weights are what they were again behind it."""
        state = {spec.name for spec in self.runtime.signatures[self.method].state}
        module = self.runtime.module(self.method)
        floats = {
            name: held
            for name, held in (*module.named_parameters(), *module.named_buffers())
            if held.is_floating_point() and held.dtype.itemsize > 1 and name not in state
        }
        kept = {name: held.data for name, held in floats.items()}
        try:
            for name, held in floats.items():
                held.data = change.of(f"{self.method}:{name}", kept[name])
            return record(self.runtime, {self.method: inputs})[self.method]
        finally:
            for name, held in floats.items():
                held.data = kept[name]


@dataclass(frozen=True)
class Trial:
    """What artefacts are checked on: inputs drawn by `seed`, the outputs expected, and the gate of each method."""

    seed: int
    expected: Vectors
    limits: Mapping[str, Limit]


def part(program: Program, methods: Iterable[str]) -> Program:
    """Some methods of a program."""
    return Program({name: program.methods[name] for name in methods}, program.weights, program.constants)


def unsteady(found: Distance) -> float:
    """How much of a check is lost on what moves so far, from 0: the error, or the share of tokens that may be others.

    Beyond `MOST` a better one is looked for.
    """
    return max(found.relative_l2 / SAME if found.tokens else found.relative_l2, SLACK * found.share)


def movement(
    shaken: Shaken, changes: Iterable[Change], inputs: Sequence[list[Array]], expected: Sequence[Call], limit: Limit
) -> Distance:
    """How far a method moves at most from what is expected of the given inputs, when changed in one way or another.

    Changes behind one at which it is unsteady are not tried.
    """
    moved = Distance(0.0)
    for change in changes:
        moved = moved.farthest(distance(shaken.calls(inputs, change), expected, limit))
        if unsteady(moved) > MOST:
            break
    return moved


def choosing(program: Program) -> set[str]:
    """The methods with an operator that chooses by value."""
    return {
        name
        for name, traced in program.methods.items()
        if any(node.target in CHOOSING for node in traced.exported.graph.nodes)
    }


class Experiment:
    """One method of a program that rounds activations (`rounds`), chooses by value (`chooses`), or both.

    `runtime` runs `program`, which is as deployed; `rounded` is the same in float32. They are one where the target's
    converter casts. `base` is the gate of a steady method.
    """

    def __init__(
        self, resolved: Resolved, base: float, rounded: Program, program: Program, runtime: EagerRuntime, method: str
    ) -> None:
        self.base, self.method, self.runtime = base, method, runtime
        self.rounds, self.chooses = method in rounding(resolved), method in choosing(program)
        self.picks = self.chooses and not program.methods[method].signature.state
        floats = getattr(torch, resolved.floats)
        step = max(LEAST, torch.finfo(floats).eps)
        self.nudges = [Change(step, draw) for draw in range(NUDGES)]
        self.noises = [Change(NOISE if self.rounds else ROUNDINGS * step, draw) for draw in range(DRAWS)]
        self.same = self.other = runtime
        if self.rounds and floats != torch.float32:
            kept = part(rounded, [method])
            self.nudges.insert(0, Change(0.0))
            if program is rounded:
                self.other = EagerRuntime(CastFloats(floats).run(kept))
            else:
                self.same = EagerRuntime(kept)

    def limit(self, calls: Sequence[Call]) -> tuple[Limit, float]:
        """The gate of the method at the inputs of `calls`, its own, and how unsteady it is there."""
        inputs = [call.inputs for call in calls]
        limit = Limit(MOST, 0 if self.picks and are_tokens(calls) else None)
        moved = shaken = Distance(0.0)
        if self.rounds:
            same = calls if self.same is self.runtime else record(self.same, {self.method: inputs})[self.method]
            moved = movement(Shaken(self.other, self.method), self.nudges, inputs, same, limit)
        limit = replace(limit, relative_l2=min(MOST, max(self.base, SLACK * moved.relative_l2)))
        if self.chooses:
            shaken = movement(Shaken(self.runtime, self.method), self.noises, inputs, calls, limit)
        if limit.others is not None:
            far = shaken.farthest(moved)
            limit = replace(limit, others=min(far.tokens // 2, math.ceil(SLACK * far.others)))
        return limit, max(SLACK * moved.relative_l2, unsteady(shaken), unsteady(moved))


def trial(resolved: Resolved, base: float, rounded: Program, program: Program) -> Trial:
    """The first of some seeds at whose inputs the program as deployed is steady enough to be checked against.

    Where tokens are chosen by content, inputs may put two of them near a tie that rounding decides, and the outputs are
    then of other tokens altogether: no fault of an artefact, and no check of it either. So inputs are looked for at
    which few are, by an experiment with noise as large as a target's, and the gate allows twice as many as that found.
    The error allowed is `base`, or more where a method rounds activations and is unstable. `rounded` is the program
    before its floats are cast.
    """
    runtime = EagerRuntime(program)
    doubtful = {
        name: Experiment(resolved, base, rounded, program, runtime, name)
        for name in program
        if name in rounding(resolved) | choosing(program)
    }
    steady = {name: Limit(base) for name in program}
    best: tuple[float, Trial] | None = None
    for seed in range(SEEDS if doubtful else 1):
        given = seeded_inputs(program_signatures(program), seed)
        expected = record(runtime, {name: given[name] for name in doubtful})
        plain = {name: calls for name, calls in given.items() if name not in doubtful}
        found = {name: doubtful[name].limit(calls) for name, calls in expected.items()}
        worst = max((worst for _, worst in found.values()), default=0.0)
        if best is None or worst < best[0]:
            limits = steady | {name: limit for name, (limit, _) in found.items()}
            made = {**expected, **record_eager(program, plain)}
            best = worst, Trial(seed, {name: made[name] for name in given}, limits)
        if worst <= MOST:
            break
    assert best is not None
    return best[1]
