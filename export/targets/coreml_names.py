"""Values of an ML program by short names, equal constants once: what a package says besides its weights.

coremltools writes every operand of every operator as a constant of its own, named after the operator and the operand.
On a small model all that is as large as a layer's 4-bit weights, and tells nothing that types and order do not. An
operator's own name, by which Xcode's reports list it, becomes its first value's. Inputs, outputs and states stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any


def shorten(spec: Any) -> None:
    """Rename values and merge equal constants in each function of `spec`, a `Model` message, in place.

    The program computes the same: only names of values and which of several equal constants is read are changed.
    """
    for function in spec.mlProgram.functions.values():
        fixed = {given.name for given in function.inputs}
        for block in function.block_specializations.values():
            taken = fixed | set(block.outputs)
            names = (name for name in map(_name, count()) if name not in taken)
            _shorten(block, taken, names, {}, {})


def _shorten(
    block: Any, fixed: set[str], names: Iterator[str], renamed: Mapping[str, str], known: Mapping[bytes, str]
) -> None:
    """One block; `renamed` (old name -> new) and `known` (constant -> name) are what the blocks around it hold."""
    renamed, known = dict(renamed), dict(known)
    merged = []
    for index, operation in enumerate(block.operations):
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = renamed.get(binding.name, binding.name)
        for inner in operation.blocks:
            _shorten(inner, fixed | {given.name for given in inner.inputs}, names, renamed, known)
        value = operation.attributes["val"].SerializeToString(deterministic=True) if operation.type == "const" else None
        if value in known and operation.outputs[0].name not in fixed:
            renamed[operation.outputs[0].name] = known[value]
            merged.append(index)
            continue
        for output in operation.outputs:
            if output.name not in fixed:
                renamed[output.name] = output.name = next(names)
        if value is not None:
            known[value] = operation.outputs[0].name
        if operation.outputs and "name" in operation.attributes:
            operation.attributes["name"].immediateValue.tensor.strings.values[0] = operation.outputs[0].name
    for index in reversed(merged):
        del block.operations[index]
    block.outputs[:] = [renamed.get(name, name) for name in block.outputs]


def _name(number: int) -> str:
    """v, then the number in base 36."""
    digits = ""
    while number or not digits:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return f"v{digits}"
