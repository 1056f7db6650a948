"""Reads the weights file of an .mlpackage (MILBlob storage, version 2).

The layout is that of mlmodel/src/MILBlob/Blob/StorageFormat.hpp in apple/coremltools: a header of 64 bytes (count,
version), then for each tensor 64 bytes of metadata (sentinel, element type, size, offset of the data) and its data, all
aligned to 64 bytes. A program names a tensor by the offset of its metadata.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from graphs.errors import UserError
from graphs.files import reason
from runtimes.base import Array
from runtimes.mil.dtypes import DType

ALIGNMENT = 64
SENTINEL = 0xDEADBEEF
HEADER = struct.Struct("<II")  # count, version
METADATA = struct.Struct("<IIQQ")  # sentinel, element type, bytes of data, offset of data


class BlobFile:
    """A weights file, memory-mapped; every access is checked against what the file holds.

    Raises UserError where the file is missing, truncated or not of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size < ALIGNMENT:
                raise UserError(f"{path}: {path.stat().st_size} bytes, too short for a Core ML weights file")
            self.data: Array = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {reason(error)}") from error
        self.count, version = HEADER.unpack_from(self.data.data)
        if version != 2:
            raise UserError(f"{path}: storage version {version}, not 2; not a Core ML weights file, or a damaged one")

    def read(self, offset: int, dtype: DType, shape: Sequence[int]) -> Array:
        """The tensor whose metadata is at `offset`, as held; `dtype` and `shape` are what the program declares."""
        size = self.data.size
        if offset % ALIGNMENT or not ALIGNMENT <= offset <= size - ALIGNMENT:
            raise self._damaged(offset, f"no metadata can be there, the file has {size} bytes")
        sentinel, kind, length, start = METADATA.unpack_from(self.data.data, offset)
        if sentinel != SENTINEL:
            raise self._damaged(offset, f"the metadata begins with {sentinel:#x}, not {SENTINEL:#x}")
        if kind != dtype.blob:
            raise self._damaged(offset, f"element type {kind}, but the program declares {dtype.name} ({dtype.blob})")
        if length != dtype.size(shape):
            raise self._damaged(offset, f"{length} bytes, but {dtype.name} {list(shape)} takes {dtype.size(shape)}")
        if start % ALIGNMENT or start < offset + ALIGNMENT or start + length > size:
            raise self._damaged(offset, f"its data would be at {start}..{start + length} of {size} bytes")
        return dtype.decode(self.data[start : start + length], shape)

    def _damaged(self, offset: int, what: str) -> UserError:
        return UserError(f"{self.path}: damaged at offset {offset}: {what}")
