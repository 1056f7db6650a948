"""What a compression pass is, and its text form: `pool{factor=2};prune{keep=18,method=divprune,seed=0}`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from graphs import discovery
from graphs.compress import passes
from graphs.errors import UserError, nearest
from graphs.files import sha256, shown
from graphs.program import Program

#: passes in one text; recorded texts are read from bundles that nobody vouches for
MOST = 16

#: the type of an option that names a file
PATH = str | None

FORM = re.compile(r"\s*([^{}\s]+)\s*(?:\{([^{}]*)\})?\s*")


@dataclass(frozen=True)
class Pass:
    """One change of a Program; subclasses are frozen dataclasses, one a file in `graphs.compress.passes`.

    Its fields are its options: integers, strings of a Literal, or the path of a file (`str | None`). `str()` names all
    of them but paths that are not given, so that a recorded pass keeps its meaning when a default changes; `parse` is
    the inverse.
    """

    name: ClassVar[str]
    about: ClassVar[str]

    def run(self, program: Program) -> Program:
        """The changed program. Raises UserError where the graph has no place for this pass or an option does not fit.

        Token counts are fixed here; the method's declared outputs follow.
        """
        raise TypeError(f"{type(self).__name__} must change a program")

    def __str__(self) -> str:
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return f"{self.name}{{{','.join(f'{key}={value}' for key, value in options.items() if value is not None)}}}"


def names() -> list[str]:
    """Every pass's name, without importing any."""
    return discovery.names(passes)


def find(name: str) -> type[Pass]:
    """The pass called `name`. Raises UserError naming the nearest one."""
    found: type[Pass] = discovery.find(passes, name, "pass", "PASS")
    return found


def parse(text: str) -> tuple[Pass, ...]:
    """The passes that `text` writes, in order; none for an empty text. Raises UserError naming the part at fault."""
    parts = [part for part in text.split(";") if part.strip()]
    if len(parts) > MOST:
        raise UserError(f"{len(parts)} passes are more than the {MOST} that one program may go through")
    return tuple(map(parse_one, parts))


def parse_one(text: str) -> Pass:
    """One pass: `name` or `name{option=value,...}`. Raises UserError."""
    match = FORM.fullmatch(text)
    if match is None:
        raise UserError(
            f"'{shown(text.strip())}' is not a pass: write name{{option=value,...}}, as in pool{{factor=2}}"
        )
    kind = find(match[1])
    options = {field.name: field for field in fields(kind)}
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for item in filter(str.strip, (match[2] or "").split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in options:
            raise UserError(f"{kind.name} has no option '{shown(key)}': {nearest(key, options)}")
        if not equals or key in values:
            raise UserError(f"{kind.name}: '{shown(item.strip())}' must be {key}=value, once")
        values[key] = read(f"{kind.name}: {key}", value, hints[key])
    missing = [key for key, field in options.items() if field.default is MISSING and key not in values]
    if missing:
        raise UserError(f"{kind.name} needs {', '.join(missing)}: write {kind.name}{{{missing[0]}=...}}")
    return kind(**values)


def read(what: str, text: str, hint: Any) -> Any:
    """The value of an option. Raises UserError naming it and the nearest valid choice."""
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise UserError(f"{what}={shown(text)} is unknown: {nearest(text, get_args(hint))}")
        return text
    if hint == PATH:
        if not text or not text.isprintable():
            raise UserError(f"{what}={shown(text)} is not a path, as in {what.split(': ')[1]}=weights.safetensors")
        return text
    if not re.fullmatch(r"[+-]?\d{1,9}", text, re.ASCII):
        raise UserError(f"{what}={shown(text)} is not a whole number, as in {what.split(': ')[1]}=2")
    return int(text)


def closest(wanted: int, choices: Iterable[int]) -> int:
    """The number nearest to `wanted`, the smaller of two."""
    return min(sorted(choices), key=lambda choice: abs(choice - wanted))


def write(chosen: Iterable[Pass]) -> str:
    """The canonical text of passes; `parse` gives them back."""
    return ";".join(map(str, chosen))


def digests(chosen: Iterable[Pass]) -> dict[str, str]:
    """SHA-256 of every file that passes read, by the path that names it in their text."""
    found = {}
    for one in chosen:
        hints = get_type_hints(type(one))
        for field in fields(one):
            path = getattr(one, field.name)
            if hints[field.name] == PATH and path is not None:
                found[path] = sha256(Path(path).expanduser())
    return found


def apply(chosen: Iterable[Pass], program: Program) -> Program:
    """`program` after each of the passes in turn, checked after each."""
    for one in chosen:
        program = one.run(program)
        program.check()
    return program
