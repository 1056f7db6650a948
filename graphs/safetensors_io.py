"""The safetensors format, read from files that nobody vouches for and written whole or not at all.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes of header length N, little endian; N bytes of a
JSON object {name: {dtype, shape, data_offsets}}; the tensors' bytes, back to back. The header is checked here in full
before a byte of it sizes anything, so that a lying file ends as one line. Tensors are views of the mapped file.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from graphs.errors import UserError
from graphs.files import reason, shown

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 16

#: bytes that are read at a time to be hashed
CHUNK = 1 << 20

#: Linux else refuses a private writable map of a file larger than the memory; Python names this flag from 3.12 on
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype, shape and bytes [begin, end), counted from the start of the file."""

    dtype: torch.dtype
    shape: torch.Size
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors that a safetensors file declares, each checked against the file's true size.

    Raises: UserError, one line naming the file and the cause, for anything that the format does not allow.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _header_json(path, file, size)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, start) for name, value in header.items()}
    _check_extents(path, entries, start, size)
    return entries


def _header_json(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    prefix = file.read(64)
    if prefix.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-lfs pointer, not the weights; fetch them with `git lfs pull`")
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 9 or (prefix[8:9] != b"{" and length + 8 > size):
        raise UserError(f"{path}: not a safetensors file ({size} bytes)")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise UserError(
            f"{path}: its header claims {length} bytes, of a file of {size} and at most {MAX_HEADER_BYTES} allowed"
        )
    file.seek(8)
    try:
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file, its header is not valid JSON: {reason(error)}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: not a safetensors file, its header is not a JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _entry(path: Path, name: str, value: object, start: int) -> Entry:
    def refuse(cause: str) -> UserError:
        return UserError(f"{path}: tensor '{shown(name)}' {cause}")

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise refuse("lacks dtype, shape or data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise refuse(f"has the dtype {shown(value['dtype'], 30)}; known are {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_RANK or math.prod(max(d, 1) for d in shape) >= 1 << 60:
        raise refuse(f"has the impossible shape {shown(shape, 60)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"has impossible data_offsets {shown(offsets, 60)}")
    needed = math.prod(shape) * dtype.itemsize
    if needed != offsets[1] - offsets[0]:
        raise refuse(f"of shape {shape} needs {needed} bytes and is given {offsets[1] - offsets[0]}")
    return Entry(dtype, torch.Size(shape), start + offsets[0], start + offsets[1])


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _check_extents(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Tensors lie back to back from the header to the end of the file: no overlap, no hole, nothing missing or over."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.end > size:
            raise UserError(f"{path}: truncated, tensor '{shown(name)}' ends at byte {entry.end} of a file of {size}")
        if entry.begin != position:
            word = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise UserError(f"{path}: tensor '{shown(name)}' {word}")
        position = entry.end
    if position != size:
        raise UserError(f"{path}: {size - position} bytes follow the last tensor")


def _described(dtype: torch.dtype, shape: Sequence[int]) -> hashlib._Hash:
    """What a tensor's digest begins with, in whatever file it is."""
    return hashlib.sha256(f"{dtype}{tuple(shape)}".encode())


def tensor_digest(tensor: torch.Tensor) -> str:
    """Of a tensor's dtype, shape and bytes, as `SafetensorsFile.digest` has it."""
    found = _described(tensor.dtype, tensor.shape)
    found.update(_raw(tensor))
    return found.hexdigest()


def _raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, in the order of its elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class SafetensorsFile:
    """One safetensors file, mapped; tensors are made on demand as views of the map."""

    def __init__(self, path: Path) -> None:
        """Raises: UserError where the file is not a whole, well-formed safetensors file."""
        self.path = path
        self.entries: Mapping[str, Entry] = read_header(path)
        # A private map is copy-on-write: code that edits a view in place can neither change the file nor crash.
        flags = mmap.MAP_PRIVATE | NORESERVE
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise UserError(f"{path}: cannot be mapped: {reason(error)}") from error

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name`, a view of the mapped file; treat it as read-only."""
        entry = self.entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = entry.end - entry.begin
        if entry.begin % entry.dtype.itemsize == 0:
            flat = torch.frombuffer(
                self._map, dtype=entry.dtype, count=count // entry.dtype.itemsize, offset=entry.begin
            )
        else:  # a header of odd length: kernels may assume aligned elements, so this one tensor is copied
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=entry.begin)
            flat = raw.clone().view(entry.dtype)
        return flat.view(entry.shape)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from this process; a later read fetches them from the file again.

        Mapped pages count as resident memory until then, so a reader that streams a checkpoint releases as it goes.
        """
        entry = self.entries[name]
        begin = -(-entry.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def digest(self, name: str) -> str:
        """Of a tensor's dtype, shape and bytes, which are read, not mapped: they take no memory."""
        entry = self.entries[name]
        found = _described(entry.dtype, entry.shape)
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            left = entry.end - entry.begin
            while left and (part := file.read(min(left, CHUNK))):
                found.update(part)
                left -= len(part)
        return found.hexdigest()

    def close(self) -> None:
        """Let go of the map: it goes with the last tensor that views it; unmapped at once, those would dangle."""
        del self._map


def write_safetensors(
    path: Path | str,
    tensors: Mapping[str, torch.Tensor],
    max_shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    blank: Callable[[str], torch.Tensor] | None = None,
) -> list[Path]:
    """Write tensors in the public layout and return the files written.

    One file at `path` (`DIR/model.safetensors`); or, where `max_shard_bytes` is given and they need more than that,
    `DIR/model-00001-of-0000N.safetensors` and so on beside it, with `model.safetensors.index.json`. A tensor is never
    split. `tensors` may read lazily: each is asked for twice, first for its shape, and one is held at a time; where
    `blank` gives a tensor's dtype and shape without data (on the meta device), once.

    Files appear complete, after the last byte of all of them has been written, the index last; on an error nothing new
    is left. Raises: UserError where the place cannot be written or the disk is full.
    """
    path = Path(path)
    entries = {name: _spec(blank(name) if blank else tensors[name]) for name in tensors}
    shards = _split(entries, max_shard_bytes)
    index_path = path.with_name(f"{path.name}.index.json")
    names = [path.name]
    if len(shards) > 1:
        names = [f"{path.stem}-{i + 1:05d}-of-{len(shards):05d}{path.suffix}" for i in range(len(shards))]
    with _published() as stage:
        for name, shard in zip(names, shards, strict=True):
            _write_one(stage(path.with_name(name)), tensors, {key: entries[key] for key in shard}, metadata or {})
        if len(shards) > 1:
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(entry.end for entry in entries.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _write_bytes(stage(index_path), [json.dumps(index, indent=1).encode()])
    stale = path if len(shards) > 1 else index_path
    stale.unlink(missing_ok=True)  # left from an earlier layout, it would shadow what was just written
    return [path.with_name(name) for name in names] + ([index_path] if len(shards) > 1 else [])


def _spec(tensor: torch.Tensor) -> Entry:
    if tensor.dtype not in DTYPE_NAMES:
        raise ValueError(f"safetensors has no dtype {tensor.dtype}")
    return Entry(tensor.dtype, tensor.shape, 0, tensor.numel() * tensor.dtype.itemsize)


def _declared(entry: Entry, position: int) -> dict[str, Any]:
    """What a header says of a tensor that lies at `position` behind it."""
    offsets = [position, position + entry.end]
    return {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}


def _split(entries: Mapping[str, Entry], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, entry in entries.items():
        if limit is not None and shards[-1] and filled + entry.end > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += entry.end
    return shards


@contextmanager
def _published() -> Iterator[Callable[[Path], Path]]:
    """Hands out temporary names for final ones; renames them all on success, removes them all on failure."""
    staged: list[tuple[Path, Path]] = []

    def stage(final: Path) -> Path:
        staged.append((final.with_name(f".{final.name}.{os.getpid()}.tmp"), final))
        return staged[-1][0]

    try:
        yield stage
        for temporary, final in staged:
            os.replace(temporary, final)
    except OSError as error:
        raise UserError(f"{error.filename or 'the weights'}: cannot be written: {reason(error)}") from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


class SafetensorsWriter:
    """A safetensors file that grows by tensors as they come, back to back; its header is written at the end.

    `metadata` may be given until then. `room`: bytes kept for the header.
    """

    def __init__(self, file: BinaryIO, room: int) -> None:
        self.file, self.room, self.position = file, -(-room // 8) * 8, 0
        self.header: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}
        file.seek(8 + self.room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor under a name that is new. Aligned to its elements where all have elements of one size."""
        if name in self.header:
            raise ValueError(f"'{name}' was written before")
        entry = _spec(tensor)
        self.file.write(_raw(tensor))
        self.header[name] = _declared(entry, self.position)
        self.position += entry.end

    def finish(self) -> None:
        """Write the header. Raises ValueError where the room does not suffice."""
        whole = {"__metadata__": {"format": "pt", **self.metadata}, **self.header}
        text = json.dumps(whole, separators=(",", ":")).encode()
        if len(text) > self.room:
            raise ValueError(f"a header of {len(text)} bytes does not fit into {self.room}")
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + text.ljust(self.room))
        self.file.flush()
        os.fsync(self.file.fileno())


@contextmanager
def growing_safetensors(path: Path, room: int) -> Iterator[SafetensorsWriter]:
    """A file at `path` that appears, whole, at the end, and not at all on an error.

    Raises: UserError where the place cannot be written or the disk is full.
    """
    with _published() as stage, stage(path).open("wb") as file:
        writer = SafetensorsWriter(file, room)
        yield writer
        writer.finish()


def _write_one(
    path: Path, tensors: Mapping[str, torch.Tensor], entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> None:
    # Widest elements first, after a header padded to 8 bytes: every tensor is then aligned to its own elements.
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name in order:
        entry = entries[name]
        header[name] = _declared(entry, position)
        position += entry.end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            tensor = tensors[name]
            if (tensor.dtype, tensor.shape) != (entries[name].dtype, entries[name].shape):
                raise ValueError(f"'{name}' changed its dtype or shape while it was written")
            if tensor.numel():
                yield _raw(tensor)

    _write_bytes(path, chunks())


def _write_bytes(path: Path, chunks: Iterable[Any]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
