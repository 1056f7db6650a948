"""MIL's types and constant values, from protobuf messages to numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.base import Array
from runtimes.mil.dtypes import DTYPES, DType
from runtimes.mil.package import Package
from runtimes.mil.proto import message_module


@dataclass(frozen=True)
class TensorType:
    """Element type (None: strings) and shape; None for a size that is known only when running."""

    dtype: DType | None
    shape: tuple[int | None, ...]

    @property
    def fixed(self) -> tuple[int, ...]:
        """The shape of a constant. Raises ValueError where a size is not fixed."""
        if any(size is None or size < 0 for size in self.shape):
            raise ValueError(f"a constant of shape {list(self.shape)}")
        return tuple(size for size in self.shape if size is not None)

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this type may have `shape`."""
        return len(shape) == len(self.shape) and all(
            mine is None or mine == theirs for mine, theirs in zip(self.shape, shape, strict=True)
        )


def tensor_type(message: Any) -> TensorType:
    """A `ValueType` that is a tensor, or the state or list of one. Raises ValueError for anything else."""
    kind = message.WhichOneof("type")
    if kind == "stateType":
        return tensor_type(message.stateType.wrappedType)
    if kind != "tensorType":
        raise ValueError(f"a value of type {kind}, where a tensor is wanted")
    tensor = message.tensorType
    if len(tensor.dimensions) != tensor.rank:
        raise ValueError(f"a tensor of rank {tensor.rank} with {len(tensor.dimensions)} dimensions")
    shape = tuple(int(d.constant.size) if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
    name = message_module("MIL_pb2").DataType.Name(tensor.dataType)
    if name not in DTYPES and name != "STRING":
        raise ValueError(f"elements of type {name}, which the reference evaluator does not know")
    return TensorType(DTYPES.get(name), shape)


def constant(message: Any, package: Package) -> Any:
    """A `Value`: a numpy array as held, a string, or a list of either. Raises ValueError, UserError."""
    if message.WhichOneof("value") == "blobFileValue":
        kind = tensor_type(message.type)
        if kind.dtype is None:
            raise ValueError("strings in a weights file")
        return package.blob(message.blobFileValue.fileName).read(message.blobFileValue.offset, kind.dtype, kind.fixed)
    immediate = message.immediateValue
    if immediate.WhichOneof("value") in {"list", "tuple"}:
        return [constant(v, package) for v in getattr(immediate, immediate.WhichOneof("value")).values]
    return immediate_tensor(immediate.tensor, tensor_type(message.type))


def immediate_tensor(tensor: Any, kind: TensorType) -> Array | str | list[str]:
    """The elements that a `TensorValue` spells out; a scalar is an array of rank 0."""
    field = tensor.WhichOneof("value")
    values: Any = getattr(tensor, field).values if field else ()
    if field == "bytes" and kind.dtype is not None:
        return kind.dtype.decode(values, kind.fixed)
    if len(values) != math.prod(kind.fixed):
        raise ValueError(f"{len(values)} values for a tensor of shape {list(kind.shape)}")
    if kind.dtype is None:
        words = [str(word) for word in values]
        return words if kind.shape else words[0]
    return np.array(values, kind.dtype.held).reshape(kind.fixed)
