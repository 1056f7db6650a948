"""Where a parameter's value is in a checkpoint, and the lazy operations that make it from what is stored there.

Everything here is frozen and hashable: an architecture's map from its parameters to a public layout is data. Operations
run on the meta device just as well, so shapes are known without reading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Fetch = Callable[[str], Tensor]
Operation = Callable[[Tensor], Tensor]  # one of those below, or an architecture's own frozen dataclass


@dataclass(frozen=True)
class Transpose:
    """Exchange two dimensions."""

    first: int = 0
    second: int = 1

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(self.first, self.second)


@dataclass(frozen=True)
class Permute:
    """Reorder the dimensions."""

    order: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.permute(self.order)


@dataclass(frozen=True)
class Reshape:
    """Give another shape with as many elements."""

    shape: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape)


@dataclass(frozen=True)
class Rows:
    """The slice [start, stop) of dimension `dim`: one part of a fused tensor."""

    start: int
    stop: int
    dim: int = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Plus:
    """Add a number: norms whose stored weights are counted from one."""

    value: float

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.float() + self.value


@dataclass(frozen=True)
class Source:
    """The tensor `key` of a checkpoint, or several joined along `dim`; then `operations` in turn."""

    key: str | tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    dim: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The names in the checkpoint that this reads."""
        return (self.key,) if isinstance(self.key, str) else self.key

    def read(self, fetch: Fetch) -> Tensor:
        """The value, from `fetch(key)` of each key; a view wherever the operations allow one."""
        parts = [fetch(key) for key in self.keys]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)
        for operation in self.operations:
            tensor = operation(tensor)
        return tensor


def by_prefix(parameter: str, prefixes: Mapping[str, str]) -> Source:
    """The tensor whose name is `parameter` with the first prefix of `prefixes` that it has exchanged."""
    ours = next(prefix for prefix in prefixes if parameter.startswith(prefix))
    return Source(prefixes[ours] + parameter.removeprefix(ours))
