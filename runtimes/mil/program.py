"""Compiles one block of an ML program into a list of steps, and runs it.

Names, operators and constants are resolved once, when the block is compiled; a run looks values up and computes.

fp16 is evaluated as fp16: every value of a tensor that the program declares FLOAT16 is rounded to it, operands and
results alike, while each operator accumulates in fp32 and rounds once, as the hardware does. What overflows becomes
infinite and stays visible. Subnormal fp16 values are kept, as CPU and GPU keep them; the Neural Engine may flush them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from graphs.errors import UserError, nearest
from graphs.files import reason, shown
from runtimes.base import Array
from runtimes.mil.dtypes import round_fp16
from runtimes.mil.ops import OPERATORS
from runtimes.mil.package import Package
from runtimes.mil.registry import MilError, Operator
from runtimes.mil.values import TensorType, constant, tensor_type

#: parameters that take several values, even where a program gives one
VARIADIC = {"values", "loop_vars"}

#: what numpy, torch and Python raise at operands that an operator does not take
FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, MilError, RuntimeError, TypeError, ValueError)

Name = str | tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One declared output of an operator."""

    name: str
    type: TensorType

    def settle(self, value: Any, moves: bool) -> Array:
        """`value` as the program declares it: rounded where it is fp16, refused where type or shape disagree."""
        array = np.asarray(value)
        dtype = self.type.dtype
        if dtype is None or np.dtype(dtype.held).kind not in _KINDS[array.dtype.kind]:
            raise MilError(f"'{self.name}' is declared {dtype and dtype.name}, computed as {array.dtype}")
        if not self.type.admits(array.shape):
            raise MilError(f"'{self.name}' is declared {list(self.type.shape)}, computed as {list(array.shape)}")
        if dtype.name == "FLOAT16" and not moves:
            return round_fp16(array)
        return array if array.dtype == dtype.held else array.astype(dtype.held)


_KINDS = {"f": "f", "i": "iu", "u": "iu", "b": "b"}


@dataclass
class Step:
    """One operator of a block; `dead` are the values that nothing reads after it."""

    label: str
    operator: Operator
    arguments: tuple[tuple[str, Name], ...]
    results: tuple[Result, ...]
    blocks: tuple[Block, ...] = ()
    dead: tuple[str, ...] = ()

    def reads(self) -> Iterable[str]:
        for _, name in self.arguments:
            yield from (name,) if isinstance(name, str) else name
        for block in self.blocks:
            yield from block.free

    def __call__(self, values: dict[str, Any]) -> None:
        """Compute the results into `values`."""
        try:
            given: dict[str, Any] = {
                key: values[name] if isinstance(name, str) else tuple(values[n] for n in name)
                for key, name in self.arguments
            }
            if self.blocks:
                given["blocks"] = tuple(partial(block.run, values) for block in self.blocks)
            if self.operator.rounds:
                given["rounded"] = round_fp16 if _is_fp16(self.results[0]) else _unchanged
            computed = self.operator.run(**given)
            outputs = computed if isinstance(computed, tuple | list) else (computed,)
            if self.results:
                for result, value in zip(self.results, outputs, strict=True):
                    values[result.name] = result.settle(value, self.operator.moves)
        except FAULTS as error:
            raise MilError(f"{self.label}: {reason(error)}") from error
        for name in self.dead:
            values.pop(name, None)


@dataclass
class Block:
    """Steps with their constants; `free` are the values that a nested block reads from the one around it."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Any]
    steps: list[Step]
    free: set[str] = field(default_factory=set)

    def run(self, outer: Mapping[str, Any], *arguments: Any) -> tuple[Any, ...]:
        """The block's outputs; `outer` holds what is visible around it, `arguments` go to its inputs by order."""
        values = {**outer, **self.constants, **dict(zip(self.inputs, arguments, strict=True))}
        for step in self.steps:
            step(values)
        return tuple(values[name] for name in self.outputs)


def compile_block(message: Any, package: Package, inputs: Sequence[str], visible: frozenset[str]) -> Block:
    """Compile a `Block` message whose own inputs are `inputs`; `visible` are the names defined around it.

    Raises UserError where it names an unknown operator or value, or is damaged.
    """
    block = Block(tuple(inputs), tuple(message.outputs), {}, [])
    known = set(visible) | set(inputs)
    for operation in message.operations:
        try:
            step = _compile_step(operation, package, block.constants, frozenset(known))
        except ValueError as error:
            raise UserError(f"{package.path}: {_label(operation)}: {error}") from error
        names = {output.name for output in operation.outputs}
        known |= names
        if step is None:
            continue
        if operation.type.startswith("constexpr_"):
            step(block.constants)  # compile-time operators: their values are weights
            continue
        block.steps.append(step)
    lost = set(block.outputs) - known
    if lost:
        raise UserError(f"{package.path}: gives '{shown(min(lost))}', which nothing computes")
    _find_dead(block)
    return block


def _compile_step(operation: Any, package: Package, constants: dict[str, Any], known: frozenset[str]) -> Step | None:
    """A step, or None for a constant, whose value is added to `constants`. Raises ValueError, UserError."""
    if operation.type == "const":
        constants[operation.outputs[0].name] = constant(operation.attributes["val"], package)
        return None
    if operation.type not in OPERATORS:
        raise ValueError(
            f"the reference evaluator has no operator '{shown(operation.type)}': {nearest(operation.type, OPERATORS)}"
        )
    arguments: list[tuple[str, Name]] = []
    for key, argument in operation.inputs.items():
        names = []
        for index, binding in enumerate(argument.arguments):
            if binding.WhichOneof("binding") == "value":
                name = f"{operation.outputs[0].name}.{key}.{index}"
                constants[name] = constant(binding.value, package)
            else:
                name = binding.name
                if name not in known:
                    raise ValueError(f"reads '{shown(name)}', which nothing before it computes")
            names.append(name)
        arguments.append((key, tuple(names) if key in VARIADIC or len(names) != 1 else names[0]))
    for key, attribute in operation.attributes.items():
        if key != "name":  # compile-time operators before iOS 18 keep their operands as attributes
            constants[f"{operation.outputs[0].name}.{key}"] = constant(attribute, package)
            arguments.append((key, f"{operation.outputs[0].name}.{key}"))
    results = tuple(Result(output.name, tensor_type(output.type)) for output in operation.outputs)
    blocks = tuple(
        compile_block(inner, package, [value.name for value in inner.inputs], known) for inner in operation.blocks
    )
    return Step(_label(operation), OPERATORS[operation.type], tuple(arguments), results, blocks)


def _find_dead(block: Block) -> None:
    """Note for each step what it reads last, and for the block what it reads from outside."""
    mine = set(block.inputs) | {result.name for step in block.steps for result in step.results}
    needed = set(block.outputs)
    for step in reversed(block.steps):
        reads = set(step.reads())
        step.dead = tuple((reads & mine) - needed)
        needed |= reads
    block.free = needed - mine - set(block.constants)


def _label(operation: Any) -> str:
    """The operator and the name it carries, for messages."""
    name = operation.attributes["name"].immediateValue.tensor.strings.values if "name" in operation.attributes else ()
    return f"{shown(operation.type)} '{shown(name[0])}'" if name else shown(operation.type)


def _is_fp16(result: Result) -> bool:
    return result.type.dtype is not None and result.type.dtype.name == "FLOAT16"


_unchanged: Callable[[Array], Array] = np.asarray
