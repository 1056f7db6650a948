"""MIL's element types: how they lie on disk, and what the evaluator holds them as.

Floating point of every width is held as float32, integers and booleans as they are, integers narrower than a byte in a
byte each. An fp16 tensor is thus a float32 array whose every value fp16 can represent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.base import Array


@dataclass(frozen=True)
class DType:
    """One element type: `stored` where an element fills whole bytes, `blob` its number in a weights file (0: none)."""

    name: str
    bits: int
    stored: str
    held: type[np.generic]
    blob: int = 0

    def size(self, shape: Sequence[int]) -> int:
        """Bytes that a tensor takes; elements narrower than a byte are packed."""
        return (math.prod(shape) * self.bits + 7) // 8

    def decode(self, raw: bytes | memoryview | Array, shape: Sequence[int]) -> Array:
        """The tensor in little-endian `raw`, as held. Raises ValueError where `raw` has another length."""
        data = np.frombuffer(raw, np.uint8)
        if data.size != self.size(shape):
            raise ValueError(f"{data.size} bytes for {self.name} {list(shape)}, which takes {self.size(shape)}")
        if self.bits < 8:
            return self._unpack(data, math.prod(shape)).reshape(shape)
        if self.name == "BFLOAT16":  # the upper half of a float32
            return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
        return data.view(self.stored).astype(self.held).reshape(shape)

    def _unpack(self, data: Array, count: int) -> Array:
        bits = np.unpackbits(data, count=count * self.bits, bitorder="little").reshape(count, self.bits)
        values: Array = (bits @ (1 << np.arange(self.bits)).astype(np.uint8)).astype(np.int16)
        if self.held is np.int8:  # two's complement
            values -= (values >> (self.bits - 1)) << self.bits
        return values.astype(self.held)


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("FLOAT16", 16, "<f2", np.float32, blob=1),
        DType("FLOAT32", 32, "<f4", np.float32, blob=2),
        DType("FLOAT64", 64, "<f8", np.float32),
        DType("BFLOAT16", 16, "", np.float32, blob=5),
        DType("BOOL", 8, "|b1", np.bool_),
        DType("INT8", 8, "|i1", np.int8, blob=4),
        DType("INT16", 16, "<i2", np.int16, blob=6),
        DType("INT32", 32, "<i4", np.int32, blob=14),
        DType("INT64", 64, "<i8", np.int64),
        DType("UINT8", 8, "|u1", np.uint8, blob=3),
        DType("UINT16", 16, "<u2", np.uint16, blob=7),
        DType("UINT32", 32, "<u4", np.uint32, blob=15),
        DType("UINT64", 64, "<u8", np.uint64),
        DType("INT4", 4, "", np.int8, blob=8),
        DType("UINT1", 1, "", np.uint8, blob=9),
        DType("UINT2", 2, "", np.uint8, blob=10),
        DType("UINT3", 3, "", np.uint8, blob=12),
        DType("UINT4", 4, "", np.uint8, blob=11),
        DType("UINT6", 6, "", np.uint8, blob=13),
    )
}

#: names that `cast` and its relatives use -> the type's name in the file
BY_WORD = {
    "bool": "BOOL",
    "fp16": "FLOAT16",
    "fp32": "FLOAT32",
    **{name.lower(): name for name in DTYPES if "INT" in name},
}


def round_fp16(x: Any) -> Array:
    """`x` rounded to the nearest fp16, ties to even, held as float32; what is out of range becomes infinite."""
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)
