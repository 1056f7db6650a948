"""TensorRT's Python interface over ONNX Runtime, and a host's memory as a device's.

Drives the runtime's own logic (profiles, shapes, addresses, exchange of caches) with real numbers without a GPU.
An engine file is an ONNX file; an address is a real one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
import onnxruntime

from runtimes.base import Array

__version__ = "0.0"

PROFILES = ((1, 7, 64), (1, 1, 1))
DTYPES: dict[str, Any] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(uint8)": np.dtype(np.uint8),
}


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING = range(3)


def nptype(dtype: Any) -> Any:
    return dtype


class HostMemory:
    """Allocations filled with a pattern, so that what nobody zeroed or wrote shows."""

    def __init__(self) -> None:
        self.stream, self.device = 17, "a host"
        self.live: dict[int, Array] = {}

    def activate(self) -> None: ...

    def synchronize(self) -> None: ...

    def allocate(self, size: int) -> int:
        block = np.full(size, 0x77, np.uint8)
        self.live[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        del self.live[address]

    def zero(self, address: int, size: int) -> None:
        ctypes.memset(address, 0, size)

    def upload(self, address: int, array: Array) -> None:
        assert array.flags.c_contiguous
        assert array.nbytes <= self.live[address].nbytes
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: Array) -> None:
        assert array.nbytes <= self.live[address].nbytes
        ctypes.memmove(array.ctypes.data, address, array.nbytes)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == 17
        assert index not in self.engine.profiles_in_use, "two contexts may not share a profile"
        self.engine.profiles_in_use.append(index)
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        for size, fixed in zip(shape, self.engine.get_tensor_shape(name), strict=True):
            least, _, most = PROFILES[self.profile or 0]
            if not (least <= size <= most if fixed == -1 else size == fixed):
                return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes: dict[str, int] = {}
        for given, shape in self.shapes.items():
            sizes |= dict(zip(self.engine.nodes[given].shape, shape, strict=True))
        return tuple(sizes.get(size, size) for size in self.engine.nodes[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 17
        assert self.profile is not None
        assert set(self.addresses) == set(self.engine.nodes), "every tensor needs an address"
        assert len(set(self.addresses.values())) == len(self.addresses), "no two tensors may share memory"
        feeds = {i.name: self.view(i.name).copy() for i in self.engine.session.get_inputs()}
        outputs = self.engine.session.run(None, feeds)
        for node, array in zip(self.engine.session.get_outputs(), outputs, strict=True):
            self.view(node.name)[...] = array
        self.engine.runs.append((self.profile, dict(self.addresses)))
        return True

    def view(self, name: str) -> Array:
        shape, dtype = self.get_tensor_shape(name), np.dtype(self.engine.get_tensor_dtype(name))
        raw = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(memoryview(raw), dtype).reshape(shape)


class Engine:
    def __init__(self, data: bytes) -> None:
        self.session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        self.nodes = {node.name: node for node in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.num_io_tensors = len(self.nodes)
        dynamic = any(isinstance(size, str) for node in self.session.get_inputs() for size in node.shape)
        self.num_optimization_profiles = len(PROFILES) if dynamic else 1
        self.profiles_in_use: list[int] = []
        self.runs: list[tuple[int, dict[str, int]]] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.nodes)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = {node.name for node in self.session.get_inputs()}
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return DTYPES[self.nodes[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self.nodes[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        fixed = self.get_tensor_shape(name)
        return [tuple(bound if size == -1 else size for size in fixed) for bound in PROFILES[index]]

    def create_execution_context(self) -> Context:
        return Context(self)


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self.engines: list[Engine] = []

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        if data.startswith(b"ftrt"):
            self.logger.log(ILogger.ERROR, "built for\nanother GPU")
            return None
        self.engines.append(Engine(data))
        return self.engines[-1]
