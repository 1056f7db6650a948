"""How operators of torch become ONNX, listed once a process: `torch.onnx` takes a second to list it for each graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

from torch.onnx._internal.exporter._registration import ONNXRegistry

LIST = ONNXRegistry.from_torchlib


@cache
def listed(opset_version: int) -> ONNXRegistry:
    """The registry of an opset, as torch makes it."""
    return LIST(opset_version)


def from_torchlib(opset_version: int) -> ONNXRegistry:
    """A copy of it, to which translations may be added."""
    registry = copy.copy(listed(opset_version))
    registry.functions = {target: [*found] for target, found in registry.functions.items()}
    return registry


@contextmanager
def listed_once() -> Iterator[None]:
    """While this lasts, `torch.onnx` asks here."""
    with patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)):
        yield
