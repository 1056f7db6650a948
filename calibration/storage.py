"""Statistics as one safetensors file: tensors, and in its metadata a JSON record of what they are and a checksum.

Tensors are named `inputs.N.MODALITY.FIELD` (N counts groups of layers that read the same value) and `outputs.N.FIELD`
(N counts layers). A file is checked in full before it is believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from calibration.moments import MODALITIES, Key, LayerStatistics, Moments, Outputs
from calibration.origin import Origin
from graphs.errors import UserError
from graphs.files import reason
from graphs.safetensors_io import SafetensorsFile, SafetensorsWriter, growing_safetensors, tensor_digest

FORMAT = "vlmx.statistics.2"
VECTORS = tuple(field.name for field in fields(Moments) if field.name not in {"count", "hessian"})

#: bytes of a file's header: for the record's own fields, for each layer besides its name, and for its inputs' tensors
RECORD_ROOM, LAYER_ROOM = 1 << 17, 1 << 12


@dataclass
class Writer:
    """Statistics on their way into a file, layer by layer; `origin` may be given until the end."""

    file: SafetensorsWriter
    origin: Origin | None = None
    record: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    counts: list[dict[str, int]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, method: str, layers: Mapping[str, LayerStatistics]) -> None:
        """Write layers that share `inputs`."""
        group = len(self.counts)
        inputs = next(iter(layers.values())).inputs
        self.counts.append({name: moments.count for name, moments in inputs.items()})
        for name, moments in inputs.items():
            for key in (*VECTORS, "hessian"):
                if (tensor := getattr(moments, key)) is not None:
                    self.tensor(f"inputs.{group}.{name}.{key}", tensor)
        for entry, layer in layers.items():
            number = sum(map(len, self.record.values()))
            self.record.setdefault(method, {})[entry] = [group, number]
            for each in fields(Outputs):
                self.tensor(f"outputs.{number}.{each.name}", getattr(layer.outputs, each.name))

    def keys(self) -> list[Key]:
        """The layers written so far."""
        return [(method, entry) for method, entries in self.record.items() for entry in entries]

    def tensor(self, name: str, tensor: Tensor) -> None:
        self.digests[name] = tensor_digest(tensor)
        self.file.add(name, tensor)

    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        assert self.origin is not None
        record = {"layers": self.record, "counts": self.counts, "sha256": checksum(self.digests)}
        return {"vlmx": FORMAT, "statistics": json.dumps({"origin": self.origin.to_json(), **record})}


@contextmanager
def writing(path: Path, layers: int) -> Iterator[Writer]:
    """A file of at most that many layers, which appears at the end, whole. Raises UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error
    with growing_safetensors(path, RECORD_ROOM + layers * LAYER_ROOM) as file:
        writer = Writer(file)
        yield writer
        file.metadata = writer.metadata()


def save(layers: Mapping[Key, LayerStatistics], origin: Origin, path: Path) -> None:
    """Write whole or not at all. Raises UserError where it cannot be written."""
    groups: dict[tuple[str, int], dict[str, LayerStatistics]] = {}  # by method and identity of what layers read
    for (method, entry), layer in layers.items():
        groups.setdefault((method, id(layer.inputs)), {})[entry] = layer
    with writing(path, len(layers)) as writer:
        for (method, _), group in groups.items():
            writer.add(method, group)
        writer.origin = origin


def checksum(digests: Mapping[str, str]) -> str:
    """Of all tensors' digests, by name."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


Loaded = tuple[dict[Key, LayerStatistics], Origin, Callable[[Key], None]]


def load(path: Path) -> Loaded:
    """What `save` wrote, in tensors of the mapped file, and what lets go of the pages of a layer's.

    Raises UserError where the file is no statistics, or is damaged.
    """
    file = SafetensorsFile(path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("vlmx") != FORMAT:
        raise UserError(f"{path}: not statistics of this version ({FORMAT}): make them by `vlmx calibrate`")
    try:
        record = json.loads(metadata["statistics"])
        if checksum({name: file.digest(name) for name in file.entries}) != record["sha256"]:
            raise ValueError("its checksum is another")
        return restore(record, file), Origin.from_json(record["origin"]), releasing(record, file)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged statistics: {reason(error)}; make them again by `vlmx calibrate`") from error


def releasing(record: Mapping[str, Any], file: SafetensorsFile) -> Callable[[Key], None]:
    """What drops the pages of what a layer read."""
    groups = {(method, entry): row[0] for method, rows in record["layers"].items() for entry, row in rows.items()}
    names: dict[int, list[str]] = {}
    for name in file.entries:
        kind, number, _ = name.split(".", 2)
        if kind == "inputs":
            names.setdefault(int(number), []).append(name)

    def release(key: Key) -> None:
        for name in names.get(groups[key], ()):
            file.release(name)

    return release


def restore(record: Mapping[str, Any], file: SafetensorsFile) -> dict[Key, LayerStatistics]:
    """The layers that a file's record describes. Raises ValueError, KeyError and the like where it is damaged."""
    groups = [
        {name: moments(f"inputs.{number}.{name}", count, file) for name, count in counts.items()}
        for number, counts in enumerate(record["counts"])
    ]
    layers = {}
    for method, entries in record["layers"].items():
        for entry, (group, number) in entries.items():
            outputs = Outputs(*(file.tensor(f"outputs.{number}.{each.name}") for each in fields(Outputs)))
            check(f"{method} {entry}", len(outputs.minimum), vars(outputs))
            layers[method, entry] = LayerStatistics(groups[group], outputs)
    if not layers:
        raise ValueError("no layers")
    return layers


def moments(prefix: str, count: int, file: SafetensorsFile) -> Moments:
    """One modality's moments. Raises ValueError where they do not fit each other, KeyError where one is missing."""
    found = {key: file.tensor(f"{prefix}.{key}") for key in VECTORS}
    hessian = file.tensor(f"{prefix}.hessian") if f"{prefix}.hessian" in file.entries else None
    if not isinstance(count, int) or count < 1 or prefix.rpartition(".")[2] not in MODALITIES:
        raise ValueError(f"{prefix} has {count} positions")
    width = len(found["minimum"])
    check(prefix, width, found)
    file.release(f"{prefix}.rows")  # which the check has read
    if hessian is not None and (hessian.shape != (width, width) or hessian.dtype != torch.float32):
        raise ValueError(f"{prefix} has a hessian of {tuple(hessian.shape)} for {width} inputs")
    return Moments(count=count, hessian=hessian, **found)


def check(what: str, width: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all are finite float32 vectors of `width`, `rows` a matrix of such."""
    for key, tensor in tensors.items():
        shape = (len(tensor), width) if key == "rows" else (width,)
        if tensor.shape != shape or tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{what} has a {key} that is no finite float32 tensor of width {width}")
