"""The calls of the CUDA driver, against prototypes of cuda.h played by Python over the host's memory."""

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes import cuda

DEVICE, CONTEXT, STREAM = 3, 0x7F12_3456_7890, 0x7FAB_CDEF_0123


class Driver:
    """Functions by name, typed as the manual has them; each fails for a device, context or stream it never gave."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.released = 0
        self.current: int | None = None
        self.message = ctypes.create_string_buffer(b"out of memory")
        self.functions: dict[str, Any] = {}
        pointer, stream = c_uint64, c_void_p
        self.define("cuInit", self.accept, c_uint)
        self.define("cuDeviceGetCount", lambda out: self.put(out, 1), POINTER(c_int))
        self.define("cuDeviceGet", lambda out, index: self.put(out, DEVICE + index), POINTER(c_int), c_int)
        self.define("cuDeviceGetName", self.name, POINTER(ctypes.c_char), c_int, c_int)
        self.define("cuDeviceGetAttribute", self.attribute, POINTER(c_int), c_int, c_int)
        self.define("cuDeviceTotalMem_v2", lambda out, d: self.put(out, 150 * 10**9), POINTER(c_size_t), c_int)
        self.define("cuDriverGetVersion", lambda out: self.put(out, 12080), POINTER(c_int))
        self.define("cuDevicePrimaryCtxRetain", lambda out, d: self.put(out, CONTEXT), POINTER(c_void_p), c_int)
        self.define("cuCtxSetCurrent", self.set_current, c_void_p)
        self.define("cuStreamCreate", lambda out, flags: self.put(out, STREAM), POINTER(c_void_p), c_uint)
        self.define("cuStreamSynchronize", lambda s: s != STREAM, stream)
        self.define("cuStreamDestroy_v2", lambda s: s != STREAM, stream)
        self.define("cuDevicePrimaryCtxRelease_v2", self.release, c_int)
        self.define("cuMemGetInfo_v2", self.info, POINTER(c_size_t), POINTER(c_size_t))
        self.define("cuMemAlloc_v2", self.allocate, POINTER(pointer), c_size_t)
        self.define("cuMemFree_v2", lambda address: self.blocks.pop(address) is None, pointer)
        self.define("cuMemsetD8Async", self.fill, pointer, c_ubyte, c_size_t, stream)
        self.define("cuMemcpyHtoDAsync_v2", self.copy, pointer, c_void_p, c_size_t, stream)
        self.define("cuMemcpyDtoHAsync_v2", self.copy, c_void_p, pointer, c_size_t, stream)
        self.define("cuGetErrorString", self.error, c_int, POINTER(c_char_p))

    def define(self, name: str, function: Any, *arguments: Any) -> None:
        self.functions[name] = CFUNCTYPE(c_int, *arguments)(function)

    def set_current(self, context: int | None) -> int:
        self.current = context
        return int(context not in (None, CONTEXT))

    def release(self, device: int) -> int:
        self.released += 1
        return int(device != DEVICE)

    def accept(self, *arguments: object) -> int:
        return 0

    def put(self, out: Any, value: int) -> int:
        out[0] = value
        return 0

    def name(self, out: Any, length: int, device: int) -> int:
        for index, byte in enumerate(b"A GPU\0"[:length]):
            out[index] = byte
        return int(device != DEVICE)

    def attribute(self, out: Any, which: int, device: int) -> int:
        out[0] = {75: 9, 76: 0}[which]
        return int(device != DEVICE)

    def info(self, free: Any, total: Any) -> int:
        free[0], total[0] = 123 * 10**9, 150 * 10**9
        return 0

    def allocate(self, out: Any, size: int) -> int:
        if size > 1 << 20:
            return 2
        block = (ctypes.c_uint8 * size)()
        out[0] = ctypes.addressof(block)
        self.blocks[out[0]] = block
        return 0

    def fill(self, address: int, value: int, size: int, stream: int) -> int:
        ctypes.memset(address, value, size)
        return int(stream != STREAM)

    def copy(self, to: int, source: int, size: int, stream: int) -> int:
        ctypes.memmove(to, source, size)
        return int(stream != STREAM)

    def error(self, code: int, out: Any) -> int:
        out[0] = ctypes.cast(self.message, c_char_p)
        return 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> tuple[cuda.Cuda, Driver]:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(**driver.functions))
    return cuda.Cuda(), driver


def test_facts(device: tuple[cuda.Cuda, Driver]) -> None:
    found, _ = device
    expected = {"name": "A GPU", "compute_capability": "9.0", "memory_bytes": 150 * 10**9, "cuda": "12.8"}
    assert found.facts() == expected
    assert (found.device, found.stream, found.free_bytes()) == ("A GPU", STREAM, 123 * 10**9)


def test_a_closed_device_is_left_and_no_longer_current(device: tuple[cuda.Cuda, Driver]) -> None:
    found, driver = device
    assert driver.current == CONTEXT
    found.close()
    assert (driver.current, driver.released) == (None, 1)


def test_memory_there_and_back(device: tuple[cuda.Cuda, Driver]) -> None:
    found, driver = device
    given, back = np.arange(100, dtype=np.float32), np.empty(100, np.float32)
    address = found.allocate(given.nbytes)
    found.upload(address, given)
    found.zero(address, 40)
    found.download(address, back)
    found.synchronize()
    assert list(back[8:12]) == [0, 0, 10, 11]
    found.free(address)
    assert driver.blocks == {}


def test_errors_are_in_the_drivers_words(device: tuple[cuda.Cuda, Driver]) -> None:
    found, _ = device
    with pytest.raises(RuntimeError, match=r"cuMemAlloc_v2: out of memory \(2\)"):
        found.allocate(1 << 30)
