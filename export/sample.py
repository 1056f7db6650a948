"""What of a program is run to check what it was lowered to: all of it, or, of a large one, one layer of each kind.

Running the whole takes several times its weights in memory and a forward pass in torch; that is what makes exports of
large models slow elsewhere. A sample has the same methods, passes, numbers and converters, and real weights:
projector, the first rows of embeddings and heads, and of each stack one layer of every kind that is in it (kinds differ
in operators, shapes and schemes). It is lowered and run besides: what the whole has in common with it was put there by
the same code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export.targets.base import Lowered, LowerOptions, Target, anew
from export.verify import program_signatures
from graphs.errors import UserError, nearest
from graphs.narrow import narrow
from graphs.program import Program
from graphs.shorten import shorten, superfluous
from runtimes.base import Artifact

#: bytes of float32 weights up to which a program is run whole
WHOLE_BYTES = 1 << 30

#: what a user may ask for
VERIFY = ("auto", "whole", "sample")


def check_verify(word: str) -> None:
    """Raise UserError for a word that is none of `VERIFY`."""
    if word not in VERIFY:
        raise UserError(f"--verify {word} is unknown: {nearest(word, VERIFY)}")


def float32_bytes(program: Program) -> int:
    """What the weights of all methods come to in float32, those that several read once."""
    shapes = {
        traced.weight_names[entry]: fake.numel()
        for traced in program.methods.values()
        for entry, fake in traced.exported.state_dict.items()
        if entry in traced.weight_names
    }
    return 4 * sum(shapes.values())


@dataclass(frozen=True)
class Sample:
    """The layers `without` which a program is checked, by method; none where it is checked whole."""

    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def choose(cls, source: Program, program: Program, verify: str) -> Sample:
        """Of `program`, made of `source`, as `verify` says, one of `VERIFY`."""
        if verify == "whole" or (verify == "auto" and float32_bytes(source) <= WHOLE_BYTES):
            return cls()
        return cls({method: paths for method, paths in superfluous(program).items() if paths})

    def of(self, program: Program) -> Program:
        """The part of a program, not quantized yet, that is run: fewer layers, and the first words of vocabularies."""
        return narrow(shorten(program, self.without)) if self.without else program

    def to_json(self) -> dict[str, Any] | None:
        """For the manifest: None for the whole."""
        return {method: list(paths) for method, paths in self.without.items()} or None

    @classmethod
    def from_json(cls, value: Any) -> Sample:
        """Raises UserError for what `to_json` does not give."""
        rows = value if isinstance(value, dict) else {} if value is None else None
        if rows is None or not all(isinstance(p, list) and all(isinstance(x, str) for x in p) for p in rows.values()):
            raise UserError("the manifest's record of what was checked is damaged")
        return cls({str(method): tuple(paths) for method, paths in rows.items()})

    def __str__(self) -> str:
        left = ", ".join(f"{len(paths)} of {method}" for method, paths in self.without.items())
        return f"one layer of each kind ({left} are like those)" if left else "the whole program"


def lower_part(target: Target, part: Program, options: LowerOptions, scratch: Path) -> tuple[Artifact, Lowered]:
    """The part that is run, lowered into `scratch`."""
    made = target.lower(
        target.legalize(part), scratch, replace(options, progress=lambda line: None, loads=True, piece=anew)
    )
    return Artifact(scratch, program_signatures(part), made.files, made.details), made
