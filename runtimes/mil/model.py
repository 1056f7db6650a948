"""An ML program loaded from a saved .mlpackage, with its states: call it with numpy arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphs.errors import UserError, nearest
from runtimes.base import Array
from runtimes.mil.dtypes import DType, round_fp16
from runtimes.mil.ops.states import State
from runtimes.mil.package import Package
from runtimes.mil.program import Block, compile_block
from runtimes.mil.registry import MilError
from runtimes.mil.values import TensorType, tensor_type


@dataclass(frozen=True)
class Port:
    """An input: its tensor type, the sizes that each flexible dimension may have, and whether it is an image.

    `bounds` holds (least, most) for each dimension, most -1 where there is no limit; it is empty where the
    specification gives none.
    """

    name: str
    type: TensorType
    bounds: tuple[tuple[int, int], ...] = ()
    image: bool = False

    def take(self, array: Array) -> Array:
        """`array` as the program holds it. Raises MilError where its shape, type or values are not admitted."""
        dtype = self.type.dtype
        if dtype is None or not self.type.admits(array.shape):
            raise MilError(f"input '{self.name}' takes shape {list(self.type.shape)}, got {list(array.shape)}")
        for size, (least, most) in zip(array.shape, self.bounds, strict=False):
            if size < least or 0 <= most < size:
                raise MilError(f"input '{self.name}' takes sizes {list(self.bounds)}, got {list(array.shape)}")
        if self.image and array.dtype != np.uint8:
            raise MilError(f"input '{self.name}' is an image of bytes, got {array.dtype}")
        held = array.astype(dtype.held)
        if np.dtype(dtype.held).kind in "iu" and not np.array_equal(held, array):
            raise MilError(f"input '{self.name}' has values that {dtype.name} cannot hold")
        return round_fp16(held) if dtype.name == "FLOAT16" else held


class MilModel:
    """One function of a package; states begin as zeros and live until `reset`.

    Arrays go in and come out by name. Outputs have the declared element type (float16 where it is FLOAT16).
    """

    def __init__(self, path: Path, function: str = "") -> None:
        """Raises UserError where the package is missing or damaged, has no such function, or needs an operator that the
        reference evaluator lacks."""
        package = Package(path)
        program = package.spec.mlProgram
        name = function or package.spec.description.defaultFunctionName or "main"
        if name not in program.functions:
            raise UserError(f"{path}: no function '{name}': {nearest(name, program.functions)}")
        message = program.functions[name]
        if message.opset not in message.block_specializations:
            raise UserError(f"{path}: function '{name}' has no body for its operator set '{message.opset}'")
        body = message.block_specializations[message.opset]
        try:
            self.states = {i.name: self._state(i) for i in message.inputs if i.type.WhichOneof("type") == "stateType"}
            self.inputs = tuple(self._port(i, package.spec) for i in message.inputs if i.name not in self.states)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        names = [port.name for port in self.inputs] + list(self.states)
        try:
            self.block: Block = compile_block(body, package, names, frozenset())
        except MilError as error:  # from weights that are computed when a package is loaded
            raise UserError(f"{path}: {error}") from error
        self.operators = Counter(operation.type for operation in body.operations)
        declared = {output.name: output.type for operation in body.operations for output in operation.outputs}
        self.outputs: dict[str, DType | None] = {
            name: tensor_type(declared[name]).dtype for name in body.outputs if name in declared
        }
        if len(self.outputs) != len(body.outputs):
            raise UserError(f"{path}: an output is named twice, or is an input or a state")

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the function once; states keep what it writes. Raises MilError."""
        if set(inputs) != {port.name for port in self.inputs}:
            raise MilError(f"takes {sorted(port.name for port in self.inputs)}, got {sorted(inputs)}")
        arguments: list[Any] = [port.take(np.asarray(inputs[port.name])) for port in self.inputs]
        with np.errstate(all="ignore"):  # infinities and NaN are results, not accidents
            results = self.block.run({}, *arguments, *self.states.values())
        return {
            name: value.astype(np.float16) if dtype and dtype.name == "FLOAT16" else value
            for (name, dtype), value in zip(self.outputs.items(), results, strict=True)
        }

    def reset(self) -> None:
        """Set every state to zeros."""
        for state in self.states.values():
            state.value = np.zeros_like(state.value)

    @staticmethod
    def _state(message: Any) -> State:
        kind = tensor_type(message.type)
        if kind.dtype is None:
            raise ValueError(f"state '{message.name}' holds no numbers")
        return State(np.zeros(kind.fixed, kind.dtype.held))

    @staticmethod
    def _port(message: Any, spec: Any) -> Port:
        features = {feature.name: feature.type for feature in spec.description.input}
        feature = features.get(message.name)
        ranges = feature.multiArrayType.shapeRange.sizeRanges if feature is not None else ()
        return Port(
            message.name,
            tensor_type(message.type),
            tuple((int(r.lowerBound), int(r.upperBound)) for r in ranges),
            feature is not None and feature.WhichOneof("Type") == "imageType",
        )
