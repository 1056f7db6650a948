"""How far a program's own outputs move when they are computed in other floats: what its artefacts may be off by.

Where activations are rounded to integers, a last-bit difference before the rounding turns into a whole step behind it,
and steps turn others over, layer after layer: two right computations of the same quantized graph then differ by far
more than their arithmetic does. So the gate of such a method is set by an experiment: the graph run by torch in a
second float type, float64 beside float32 or float16, whichever a target's floats call for.
"""

from __future__ import annotations

import torch

from export.verify import Vectors, compare, inputs_of, record
from graphs.program import Program
from quant.precision import CastFloats
from quant.resolve import Resolved
from runtimes.eager import EagerRuntime

#: an artefact may be this many times as far from the graph as the graph is from itself in other floats
SLACK = 2.0

#: and no farther than this, whatever the experiment says
MOST = 0.1


def second_floats(resolved: Resolved) -> torch.dtype:
    """The type to compute in besides the program's own: the target's, or one with more digits where that is its own."""
    return torch.float64 if resolved.floats == "float32" else getattr(torch, resolved.floats)


def limits(resolved: Resolved, base: float, rounded: Program, expected: Vectors) -> dict[str, float]:
    """For each method the gate on its `lower` error: `base`, or more where it rounds activations and is unstable.

    `rounded` is the program before its floats are cast; `expected` what the program as deployed makes of its inputs.
    """
    unsettled = {layer.method for layer, scheme, _ in resolved.layers.values() if scheme.activations}
    again = {method: calls for method, calls in expected.items() if method in unsettled}
    found = dict.fromkeys(expected, base)
    if again:
        kept = {name: traced for name, traced in rounded.methods.items() if name in unsettled}
        other = CastFloats(second_floats(resolved)).run(Program(kept, rounded.weights, rounded.constants))
        reference = EagerRuntime(rounded) if resolved.floats != "float32" else None
        mine = record(reference, inputs_of(again)) if reference else again
        moved = compare(record(EagerRuntime(other), inputs_of(again)), mine)
        found |= {method: min(MOST, max(base, SLACK * entry["relative_l2"])) for method, entry in moved.items()}
    return found
