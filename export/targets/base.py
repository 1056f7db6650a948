"""What every target is: a capability table and the way from a Program to files."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from export.gate import Limit
from graphs.errors import UserError, nearest
from graphs.program import Program

#: relative L2 error of a lowered method above which an export fails: by its floats, or for any quantized program
LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "quantized": 1e-2}


@dataclass(frozen=True)
class Capabilities:
    """What a target takes, as data."""

    runs_on: str  # in words, for tables
    floats: tuple[str, ...]  # what unquantized numbers may be kept in, the native one first
    schemes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # kind of layer -> schemes it has kernels for
    kv_cache: tuple[str, ...] = ("float",)  # what keys and values may be kept in
    default_recipe: str = "reference-fp32"
    symmetric: bool = False  # whether static ranges of activations must lie around zero
    native: frozenset[str] = frozenset()  # floats that the target's own converter casts a float32 program to
    gates: Mapping[str, float] = field(default_factory=dict)  # of its own for some floats, where above `LIMITS`
    base_bytes: int = 600 << 20  # resident memory of an export of next to nothing
    values: float = 13.0  # what running a method takes, in its largest value: blocks that were used are kept
    scores: float = 3.3  # what attention takes, in its float32 scores; and where nothing is masked
    unmasked: float = 3.3
    sliced: bool = False  # whether scores are those of slices (`attention_slices`)
    evaluated: float = 0.0  # bytes for each byte of a method's float32 weights, where it is not run but evaluated
    held: float = 0.0  # bytes of memory that lowering takes for each byte of packed weights
    held_floats: float = 0.0  # the same where none is quantized, if it is more

    def limit(self, floats: str, quantized: bool) -> float:
        """The gate for a program kept in `floats`."""
        kind = "quantized" if quantized else floats
        return max(self.gates.get(floats, 0.0), LIMITS[kind])


#: of some methods, and what writes their files and gives their `details`, in JSON values: those details. It need not be
#: called: files made of the same inputs before may do
Piecewise = Callable[[Sequence[str], Callable[[], dict[str, Any]]], dict[str, Any]]


def anew(methods: Sequence[str], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Whatever was made before."""
    return make()


@dataclass(frozen=True)
class LowerOptions:
    """What the pipeline tells a target; `progress` takes one line at a time, `extra` the target's own options."""

    floats: str  # what the recipe keeps unquantized numbers in
    limits: Mapping[str, Limit]  # of each method's `lower` error
    seed: int = 0  # of inputs to check with
    metadata: Mapping[str, Any] = field(default_factory=dict)  # context, eos ids, visual tokens, ... for stock clients
    extra: Mapping[str, str] = field(default_factory=dict)
    loads: bool = True  # whether what was written may be loaded whole, to be run or counted
    progress: Callable[[str], None] = lambda line: None
    piece: Piecewise = anew
    memo: dict[str, Any] = field(default_factory=dict)  # what a target found out about a program, for a part of it


@dataclass(frozen=True)
class Lowered:
    """What `lower` wrote: for each method its file relative to the directory, and `details` for its runtime.

    `checked` says of each method, in one line, what was proven while lowering (for targets that cannot run here).
    """

    files: Mapping[str, str]
    details: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    checked: Mapping[str, str] = field(default_factory=dict)


class Target(Protocol):
    """Lowers Programs for one kind of runtime."""

    name: str
    capabilities: Capabilities

    def legalize(self, program: Program) -> Program:
        """`program` in the operators and signatures that this target's converter takes; computes the same."""
        ...

    def lower(self, program: Program, directory: Path, options: LowerOptions) -> Lowered:
        """Write a legalized program's methods into `directory`, which exists and is empty."""
        ...


#: target name -> module and attribute; imported only when asked for
TARGETS: dict[str, tuple[str, str]] = {
    name: (f"export.targets.{name}", "TARGET") for name in ("coreml", "executorch", "onnxruntime", "tensorrt")
}


def load_target(name: str) -> Target:
    """The target called `name`. Raises UserError naming the nearest one."""
    if name not in TARGETS:
        raise UserError(f"unknown target '{name}': {nearest(name, TARGETS)}")
    module, attribute = TARGETS[name]
    target: Target = getattr(importlib.import_module(module), attribute)
    return target
