"""A model's weights by its own parameter names, read lazily: from a checkpoint, from a seed, or from a live module.

All three are mappings from name to tensor, and none keeps what it hands out: a model larger than the memory can be
written one tensor at a time, and its names and shapes can be checked without reading any.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from graphs.checkpoint import Checkpoint
from graphs.errors import UserError
from graphs.files import reason, shown
from graphs.hub import resolve_checkpoint
from graphs.safetensors_io import tensor_digest, write_safetensors
from graphs.sources import Permute, Plus, Reshape, Rows, Source, Transpose, by_prefix

__all__ = [
    "Checkpoint",
    "ModuleWeights",
    "NamedWeights",
    "Permute",
    "Plus",
    "RandomWeights",
    "Reshape",
    "Rows",
    "Source",
    "Transpose",
    "Weights",
    "by_prefix",
    "resolve_checkpoint",
    "write_safetensors",
]


#: elements of a weight from which on it is looked through in parts
PART = 1 << 24


class NamedWeights(Mapping[str, Tensor], ABC):
    """Tensors by parameter name, made when asked for; `origin` says where they come from, for the manifest."""

    origin: str

    @abstractmethod
    def names(self) -> list[str]:
        """Every name, in a fixed order."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, without its data."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def stored(self, name: str, rows: int | None = None) -> Tensor:
        """A tensor, or its first rows, in the dtype it is kept in, where possible no copy: to be read, and released."""
        return self[name] if rows is None else self[name][:rows]

    def release(self, name: str) -> None:
        """The caller is done with a tensor: memory that backs it may go. Reading it again is allowed."""
        return

    @abstractmethod
    def digest(self, name: str) -> str:
        """Tells the content of a tensor apart from others: hexadecimal, 64 digits."""

    def check(self, expected: Mapping[str, torch.Size], ignored: Iterable[str] = ()) -> None:
        """Compare names and shapes with the parameters `expected`.

        Names that a regular expression of `ignored` matches in full are never unexpected. Raises: UserError, one line
        that lists missing, unexpected and misshapen tensors by name.
        """
        unexpected = _unmatched((name for name in self.names() if name not in expected), ignored)
        misshapen = [
            f"{name} {list(self.shape(name))} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in self and self.shape(name) != shape
        ]
        _refuse(self.origin, [name for name in expected if name not in self], unexpected, misshapen)


def _unmatched(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    compiled = [re.compile(pattern) for pattern in patterns]
    return [name for name in names if not any(pattern.fullmatch(name) for pattern in compiled)]


def _refuse(origin: str, missing: list[str], unexpected: list[str], misshapen: list[str], limit: int = 8) -> None:
    def some(what: str, items: list[str]) -> str:
        more = f" and {len(items) - limit} more" if len(items) > limit else ""
        return f"{len(items)} {what}: {', '.join(shown(item, 200) for item in items[:limit])}{more}"

    found = [("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)]
    faults = [some(what, items) for what, items in found if items]
    if faults:
        raise UserError(f"{origin}: the weights do not fit the model: {'; '.join(faults)}")


class Weights(NamedWeights):
    """A model's parameters, read from a checkpoint as `mapping` (parameter name -> `Source`) says.

    Floating-point values come contiguous in `dtype` (None keeps the stored one). A value that needs neither cast nor
    copy is a view of the mapped file, to be treated as read-only. NaN and Inf are refused on reading unless the
    checkpoint was opened with `allow_nan`.
    """

    def __init__(
        self, checkpoint: Checkpoint, mapping: Mapping[str, Source], dtype: torch.dtype | None = torch.float32
    ) -> None:
        self.checkpoint = checkpoint
        self.mapping = dict(mapping)
        self.dtype = dtype
        self.origin = str(checkpoint.directory)

    def names(self) -> list[str]:
        return list(self.mapping)

    def __contains__(self, name: object) -> bool:
        return name in self.mapping

    def shape(self, name: str) -> torch.Size:
        return self._blank(name).shape

    def _blank(self, name: str) -> Tensor:
        """The tensor without data: its source's operations on the meta device."""

        def fetch(key: str) -> Tensor:
            return torch.empty(self.checkpoint.shape(key), dtype=self.checkpoint.dtype(key), device="meta")

        return self.mapping[name].read(fetch)

    def check(self, expected: Mapping[str, torch.Size], ignored: Iterable[str] = ()) -> None:
        """As `NamedWeights.check`, but missing and unexpected tensors go by their names in the checkpoint."""
        keys = dict.fromkeys(key for source in self.mapping.values() for key in source.keys)
        unmapped = [name for name in expected if name not in self.mapping]
        missing = unmapped + [key for key in keys if key not in self.checkpoint]
        extra = _unmatched((key for key in self.checkpoint.names() if key not in keys), ignored)
        unexpected = [self.checkpoint.stored(key) for key in extra]
        faults = (self._fault(name, shape) for name, shape in expected.items() if name in self.mapping)
        _refuse(self.origin, missing, unexpected, [fault for fault in faults if fault])

    def _fault(self, name: str, wanted: torch.Size) -> str | None:
        """What is wrong with a tensor that is there, in words; None where nothing is."""
        keys = self.mapping[name].keys
        if not all(key in self.checkpoint for key in keys):
            return None
        stored = " + ".join(f"{self.checkpoint.stored(key)} {list(self.checkpoint.shape(key))}" for key in keys)
        try:
            blank = self._blank(name)
        except (RuntimeError, IndexError, ValueError) as error:
            return f"{stored} ({reason(error)})"
        if blank.shape != wanted:
            became = f", as {list(blank.shape)}," if self.mapping[name].operations or len(keys) > 1 else ""
            return f"{stored}{became} instead of {list(wanted)}"
        if self.dtype is not None and not blank.dtype.is_floating_point:
            return f"{stored} is of {_plain(blank.dtype)}, not of floating-point numbers"
        return None

    def __getitem__(self, name: str) -> Tensor:
        """The value of a parameter. Raises: UserError naming a tensor that holds NaN or Inf or overflows the cast."""
        stored = self.mapping[name].read(self.checkpoint.tensor)
        value = stored.to(self.dtype) if self.dtype is not None and stored.is_floating_point() else stored
        value = value.contiguous()
        self._check_finite(name, stored, value)
        if value.data_ptr() != stored.data_ptr():
            self.release(name)  # a copy was made, so the file's pages need not stay resident
        return value

    def stored(self, name: str, rows: int | None = None) -> Tensor:
        """As `[name]`, but not cast; of its first `rows` no more are read. Raises: UserError as that does."""
        whole = self.mapping[name].read(self.checkpoint.tensor)
        stored = whole if rows is None else whole[:rows]
        self._check_finite(name, stored, stored)
        return stored

    def _check_finite(self, name: str, stored: Tensor, value: Tensor) -> None:
        """Raise UserError where `value`, the parameter `name`, holds NaN or Inf, as `stored` or since it was cast.

        Of a large one that is mapped a part is in memory at a time.
        """
        if self.checkpoint.allow_nan:
            return
        parts = [value] if value.numel() <= PART else value.split(max(1, PART // value[0].numel()))
        for part in parts:
            if not _finite(part):
                keys = self.mapping[name].keys
                where = f"{self.origin}: tensor '{shown(' + '.join(map(self.checkpoint.stored, keys)))}'"
                if _finite(stored.float()):
                    raise UserError(f"{where} has values beyond the range of {_plain(value.dtype)}")
                raise UserError(f"{where} holds NaN or Inf; --allow-nan reads it all the same")
            if len(parts) > 1 and value.data_ptr() == stored.data_ptr():
                self.release(name)

    def release(self, name: str) -> None:
        for key in self.mapping[name].keys:
            self.checkpoint.release(key)

    def digest(self, name: str) -> str:
        """Of what the parameter is read from, and how."""
        parts = [self.checkpoint.digest(key) for key in self.mapping[name].keys]
        return hashlib.sha256(repr((parts, self.mapping[name], self.dtype)).encode()).hexdigest()


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(tensor: Tensor) -> bool:
    """Whether every element is finite, in one pass and without a mask as large as the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    narrow = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no reductions of its own
    low, high = torch.aminmax(narrow)  # both are NaN where any element is
    return math.isfinite(low) and math.isfinite(high)


class RandomWeights(NamedWeights):
    """Weights drawn from a seed, each from a generator of its own (seed and name): any one can be drawn alone.

    Matrices and convolutions are normal with variance 1 / fan-in, which keeps signals of unit size through any depth
    and width (LeCun et al. 1998, "Efficient BackProp"); norm weights and running variances are one, biases and running
    means zero; embeddings and everything else are normal with a standard deviation of 0.02.
    """

    def __init__(self, seed: int, shapes: Mapping[str, torch.Size], dtype: torch.dtype = torch.float32) -> None:
        self.seed = seed
        self.shapes = dict(shapes)
        self.dtype = dtype
        self.origin = f"random (seed {seed})"

    def digest(self, name: str) -> str:
        """Of what it is drawn by."""
        drawn = (self.seed, name, tuple(self.shapes[name]), self.dtype)
        return hashlib.sha256(repr(drawn).encode()).hexdigest()

    def names(self) -> list[str]:
        return list(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.shapes[name])

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shape(name)
        module, _, last = name.lower().rpartition(".")
        if last.endswith("bias") or last == "running_mean":
            return torch.zeros(shape, dtype=self.dtype)
        is_weight = last.endswith("weight")
        if last == "running_var" or (is_weight and (len(shape) < 2 or "norm" in module.rpartition(".")[2])):
            return torch.ones(shape, dtype=self.dtype)
        is_table = len(shape) == 2 and "embed" in module
        spread = 0.02 if is_table or not is_weight else max(1, math.prod(shape[1:])) ** -0.5
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator).mul_(spread).to(self.dtype)


class ModuleWeights(NamedWeights):
    """The parameters and buffers of a live module, under the module's own names; floating-point ones in `dtype`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = torch.float32) -> None:
        self.tensors: dict[str, Tensor] = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        self.dtype = dtype
        self.origin = f"a live {type(module).__name__}"

    def digest(self, name: str) -> str:
        """Of its bytes."""
        return tensor_digest(self[name])

    def names(self) -> list[str]:
        return list(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].shape

    def __getitem__(self, name: str) -> Tensor:
        value = self.tensors[name].detach()
        if self.dtype is not None and value.is_floating_point():
            value = value.to(self.dtype)
        return value.contiguous()
