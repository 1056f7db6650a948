"""MIL operators by name. Modules under `runtimes.mil.ops` fill the table; each function takes MIL's parameter names.

Floating point arrives and leaves as float32; the interpreter rounds every result that the program declares fp16, so an
operator written in fp32 accumulates in fp32 and rounds once, as Apple's hardware does. An operator made of several
steps whose intermediate results are fp16 tensors on the hardware registers with `rounds=True` and is handed `rounded`,
which rounds where the result is fp16 and does nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Function = Callable[..., Any]


class MilError(Exception):
    """An operator that cannot be computed as the program states it: a wrong shape, type or index."""


@dataclass(frozen=True)
class Operator:
    """`run` computes it; `moves`: results hold values of the operands, so that there is nothing to round."""

    run: Function
    moves: bool = False
    rounds: bool = False


OPERATORS: dict[str, Operator] = {}


def register(table: Mapping[str, Function], moves: bool = False) -> None:
    """Add operators by name."""
    OPERATORS.update({name: Operator(function, moves) for name, function in table.items()})


def op(name: str, moves: bool = False, rounds: bool = False) -> Callable[[Function], Function]:
    """Add the decorated function as operator `name`."""

    def add(function: Function) -> Function:
        OPERATORS[name] = Operator(function, moves, rounds)
        return function

    return add


def ints(value: Any) -> tuple[int, ...]:
    """A vector parameter as Python integers."""
    return tuple(int(v) for v in value)
