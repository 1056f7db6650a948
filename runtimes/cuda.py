"""The few calls of the CUDA driver that running an engine takes, through the library that every NVIDIA driver brings.

Reference: CUDA Driver API manual. No CUDA toolkit and no Python package are needed.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint8, c_uint64, c_void_p
from typing import Any, Protocol

from runtimes.base import Array, Unavailable

LIBRARY = {"win32": "nvcuda.dll"}.get(sys.platform, "libcuda.so.1")

#: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76


class Memory(Protocol):
    """Device memory and the stream that its copies are queued on; addresses are plain integers."""

    stream: int
    device: str  # the device's name

    def activate(self) -> None:
        """Make the device current in the calling thread."""
        ...

    def allocate(self, size: int) -> int: ...

    def free(self, address: int) -> None: ...

    def zero(self, address: int, size: int) -> None: ...

    def upload(self, address: int, array: Array) -> None:
        """Queue a copy from a contiguous array, which must live until `synchronize`."""
        ...

    def download(self, address: int, array: Array) -> None:
        """Queue a copy into a contiguous array."""
        ...

    def synchronize(self) -> None:
        """Wait for everything queued."""
        ...


class Cuda:
    """The first CUDA device, its primary context and one stream. Raises Unavailable where there is none."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise Unavailable("no NVIDIA GPU here") from error
        count, self._device, self._context, stream = c_int(), c_int(), c_void_p(), c_void_p()
        if self._library.cuInit(0) or self._library.cuDeviceGetCount(byref(count)) or not count.value:
            raise Unavailable("no NVIDIA GPU here")
        self._call("cuDeviceGet", byref(self._device), 0)
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, len(name), self._device)
        self.device = name.value.decode(errors="replace")
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self.activate()
        self._call("cuStreamCreate", byref(stream), 0)
        self.stream = stream.value or 0

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            text = c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            raise RuntimeError(f"{function}: {(text.value or b'unknown error').decode()} ({code})")

    def activate(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        address = c_uint64()
        self._call("cuMemAlloc_v2", byref(address), c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self.activate()  # a finalizer may run in any thread
        self._call("cuMemFree_v2", c_uint64(address))

    def zero(self, address: int, size: int) -> None:
        self._call("cuMemsetD8Async", c_uint64(address), c_uint8(0), c_size_t(size), c_void_p(self.stream))

    def upload(self, address: int, array: Array) -> None:
        host, size = c_void_p(array.ctypes.data), c_size_t(array.nbytes)
        self._call("cuMemcpyHtoDAsync_v2", c_uint64(address), host, size, c_void_p(self.stream))

    def download(self, address: int, array: Array) -> None:
        host, size = c_void_p(array.ctypes.data), c_size_t(array.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", host, c_uint64(address), size, c_void_p(self.stream))

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", c_void_p(self.stream))

    def close(self) -> None:
        """Leave the device to others: with the last who does, its context and the memory that this takes go."""
        self.activate()
        self._call("cuStreamDestroy_v2", c_void_p(self.stream))
        self._call("cuCtxSetCurrent", c_void_p())  # the next library in this thread must not find what is gone
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def free_bytes(self) -> int:
        """Device memory that nobody has, of this process or another."""
        free, total = c_size_t(), c_size_t()
        self.activate()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def facts(self) -> dict[str, Any]:
        """Name, compute capability, memory in bytes, and the newest CUDA version that the driver knows."""
        major, minor, version, total = c_int(), c_int(), c_int(), c_size_t()
        self._call("cuDeviceGetAttribute", byref(major), CAPABILITY_MAJOR, self._device)
        self._call("cuDeviceGetAttribute", byref(minor), CAPABILITY_MINOR, self._device)
        self._call("cuDeviceTotalMem_v2", byref(total), self._device)
        self._call("cuDriverGetVersion", byref(version))
        return {
            "name": self.device,
            "compute_capability": f"{major.value}.{minor.value}",
            "memory_bytes": total.value,
            "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
        }


def gpu_name() -> str | None:
    """The first NVIDIA GPU's name, or None where there is none."""
    try:
        return Cuda().device
    except Unavailable:
        return None
