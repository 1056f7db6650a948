"""TensorRT engines on an NVIDIA GPU: a context for each optimisation profile, the KV cache kept on the device.

Written after the TensorRT Python API reference (ICudaEngine, IExecutionContext), which TensorRT-RTX shares.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np

from graphs.errors import UserError, nearest
from graphs.files import contained, reason
from runtimes.base import Array, Artifact, Unavailable
from runtimes.cuda import Cuda, Memory
from runtimes.tensorrt_api import LIBRARIES, collecting_logger

Shape = tuple[int, ...]


def read_engine(directory: Path, name: str, recorded: Mapping[str, Any]) -> bytes:
    """The bytes of an engine file, whose length and header must be those recorded when it was built.

    Raises UserError: the library trusts an engine's offsets, so a file cut short must not reach it.
    """
    path = contained(directory, name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    if len(data) != recorded["bytes"]:
        raise UserError(f"{path}: {len(data)} bytes instead of {recorded['bytes']}: the file is cut short or damaged")
    header = bytes.fromhex(recorded["header"])
    if data[: len(header)] != header:
        raise UserError(f"{path}: not the engine that was built: its header differs")
    return data


def fits(shape: Shape, least: Shape, most: Shape) -> bool:
    """Whether every size of `shape` lies between those of `least` and `most`."""
    return len(shape) == len(least) and all(a <= s <= b for a, s, b in zip(least, shape, most, strict=True))


class Buffer:
    """Device memory that grows to what was asked for, and goes when it is forgotten."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._size = 0
        self._address = 0
        self._release: Callable[[], object] = lambda: None

    def of(self, size: int) -> int:
        """The address of at least `size` bytes; what it held is lost where it grows."""
        if size > self._size or not self._address:
            self._release()
            self._address, self._size = self._memory.allocate(max(size, 1)), size
            release = weakref.finalize(self, self._memory.free, self._address)
            release.atexit = False  # the driver may be gone by then, and frees everything itself
            self._release = release
        return self._address


@dataclass(frozen=True)
class Bound:
    """One call, ready to run: `inputs` live until it has run, since their copies are only queued."""

    context: Any
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


class MethodEngine:
    """One method on the device; `state` maps each input that carries state to the output that carries it on.

    A state has two buffers, read and written in turn, since an engine may write an output before it has read an input.
    """

    def __init__(self, trt: Any, engine: Any, memory: Memory, state: Mapping[str, str]) -> None:
        self._engine, self._memory, self._state = engine, memory, state
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        carried = {*state, *state.values()}
        self._inputs = [name for name in inputs if name not in carried]
        self._outputs = [name for name in names if name not in inputs and name not in carried]
        given = (*self._inputs, *self._outputs)  # state may be in types that numpy lacks (bfloat16)
        self._dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in given}
        self._contexts: dict[int, Any] = {}
        self._buffers = {name: Buffer(memory) for name in given}
        self._caches = {name: [Buffer(memory), Buffer(memory)] for name in state}
        self.reset()

    def _size(self, name: str) -> int:
        """The bytes of a state."""
        return prod(self._engine.get_tensor_shape(name)) * int(self._engine.get_tensor_dtype(name).itemsize)

    def reset(self) -> None:
        self._memory.activate()
        for past, buffers in self._caches.items():
            size = self._size(past)
            for buffer in buffers:
                buffer.of(size)
            self._memory.zero(buffers[0].of(size), size)
        self._memory.synchronize()

    def profile(self, shapes: Mapping[str, Shape]) -> int:
        """The tightest optimisation profile that takes inputs of these shapes. Raises ValueError where none does."""
        room: dict[int, int] = {}
        for index in range(self._engine.num_optimization_profiles):
            bounds = {name: self._bounds(name, index) for name in shapes}
            if all(fits(shape, *bounds[name]) for name, shape in shapes.items()):
                room[index] = sum(prod(most) for _, most in bounds.values())
        if not room:
            raise ValueError(f"no optimisation profile of the engine takes inputs of shapes {dict(shapes)}")
        return min(room, key=lambda index: room[index])

    def _bounds(self, name: str, profile: int) -> tuple[Shape, Shape]:
        """The least and the largest shape of an input."""
        shape = tuple(self._engine.get_tensor_shape(name))
        if -1 not in shape:
            return shape, shape
        least, _, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(most)

    def context(self, profile: int) -> Any:
        """The execution context of a profile, made when it is first needed."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None:
                raise RuntimeError("TensorRT could not make an execution context: is there enough memory on the GPU?")
            if not context.set_optimization_profile_async(profile, self._memory.stream):
                raise RuntimeError(f"TensorRT refused optimisation profile {profile}")
            self._memory.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def bind(self, inputs: Sequence[Array]) -> Bound:
        """Upload inputs, and give a context the shapes and addresses of one call."""
        self._memory.activate()
        arrays = {
            name: np.ascontiguousarray(array, self._dtypes[name])
            for name, array in zip(self._inputs, inputs, strict=True)
        }
        context = self.context(self.profile({name: array.shape for name, array in arrays.items()}))
        for name, array in arrays.items():
            address = self._buffers[name].of(array.nbytes)
            self._memory.upload(address, array)
            if not context.set_input_shape(name, array.shape):
                raise ValueError(f"TensorRT refused the shape {array.shape} for '{name}'")
            context.set_tensor_address(name, address)
        for past, present in self._state.items():
            size = self._size(past)
            reading, writing = self._caches[past]
            context.set_tensor_address(past, reading.of(size))
            context.set_tensor_address(present, writing.of(size))
        outputs = {name: np.empty(tuple(context.get_tensor_shape(name)), self._dtypes[name]) for name in self._outputs}
        for name, array in outputs.items():
            context.set_tensor_address(name, self._buffers[name].of(array.nbytes))
        return Bound(context, arrays, outputs)

    def enqueue(self, bound: Bound) -> None:
        """Queue one run of what was bound last; running it again computes the same from the same state."""
        if not bound.context.execute_async_v3(self._memory.stream):
            raise RuntimeError("TensorRT could not run the engine")

    def synchronize(self) -> None:
        """Wait for everything queued."""
        self._memory.synchronize()

    def call(self, inputs: Sequence[Array]) -> list[Array]:
        bound = self.bind(inputs)
        self.enqueue(bound)
        for name, array in bound.outputs.items():
            self._memory.download(self._buffers[name].of(array.nbytes), array)
        self.synchronize()
        for buffers in self._caches.values():
            buffers.reverse()
        return list(bound.outputs.values())


class TensorRTRuntime:
    """Runs on the first NVIDIA GPU, with the library that built the engines."""

    def __init__(self, trt: Any, memory: Memory, artifact: Artifact) -> None:
        library = LIBRARIES[artifact.details["builder"]["name"]]
        self.version = f"{library.title} {trt.__version__} on {memory.device}"
        self.signatures = artifact.signatures
        self._logger = collecting_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self.engines: dict[str, MethodEngine] = {}
        for method, name in artifact.files.items():
            recorded = artifact.details["methods"][method]
            engine = self._runtime.deserialize_cuda_engine(read_engine(artifact.directory, name, recorded))
            if engine is None:
                why = self._logger.errors[-1] if self._logger.errors else "no reason given"
                raise UserError(f"{artifact.directory / name}: {self.version} cannot load it: {why}")
            self.engines[method] = MethodEngine(trt, engine, memory, recorded["state"])

    @classmethod
    def load(cls, artifact: Artifact) -> Self:
        memory = Cuda()
        name = artifact.details["builder"]["name"]
        if name not in LIBRARIES:
            raise UserError(f"{artifact.directory}: engines of an unknown builder '{name}': {nearest(name, LIBRARIES)}")
        trt = LIBRARIES[name].load()
        if trt is None:
            raise Unavailable(f"{LIBRARIES[name].title} is not installed: {LIBRARIES[name].install}")
        return cls(trt, memory, artifact)

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        return self.engines[method].call(inputs)

    def reset(self) -> None:
        for engine in self.engines.values():
            engine.reset()
