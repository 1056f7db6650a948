"""Statistics as one safetensors file: tensors, and in its metadata a JSON record of what they are and a checksum.

Tensors are named `inputs.N.MODALITY.FIELD` (N counts groups of layers that read the same value) and `outputs.N.FIELD`
(N counts layers). A file is checked in full before it is believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from calibration.moments import MODALITIES, Key, LayerStatistics, Moments, Outputs
from calibration.origin import Origin
from graphs.errors import UserError
from graphs.files import reason
from graphs.safetensors_io import SafetensorsFile, write_safetensors

FORMAT = "vlmx.statistics.1"
VECTORS = tuple(field.name for field in fields(Moments) if field.name not in {"count", "hessian"})


def save(layers: Mapping[Key, LayerStatistics], origin: Origin, path: Path) -> None:
    """Write whole or not at all. Raises UserError where it cannot be written."""
    tensors: dict[str, Tensor] = {}
    groups: dict[int, int] = {}  # identity of a layer's inputs -> number of the group
    counts: list[dict[str, int]] = []
    record: dict[str, dict[str, list[int]]] = {}
    for number, ((method, entry), layer) in enumerate(layers.items()):
        if id(layer.inputs) not in groups:
            groups[id(layer.inputs)] = len(groups)
            counts.append({name: moments.count for name, moments in layer.inputs.items()})
            for name, moments in layer.inputs.items():
                stored = {key: getattr(moments, key) for key in (*VECTORS, "hessian")}
                prefix = f"inputs.{groups[id(layer.inputs)]}.{name}"
                tensors |= {f"{prefix}.{key}": tensor for key, tensor in stored.items() if tensor is not None}
        record.setdefault(method, {})[entry] = [groups[id(layer.inputs)], number]
        tensors |= {f"outputs.{number}.{field.name}": getattr(layer.outputs, field.name) for field in fields(Outputs)}
    metadata = {"origin": origin.to_json(), "layers": record, "counts": counts, "sha256": checksum(tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error
    write_safetensors(path, tensors, metadata={"vlmx": FORMAT, "statistics": json.dumps(metadata)})


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over all tensors' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(path: Path) -> tuple[dict[Key, LayerStatistics], Origin]:
    """What `save` wrote. Raises UserError where the file is no statistics, or is damaged."""
    file = SafetensorsFile(path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("vlmx") != FORMAT:
        raise UserError(f"{path}: not statistics of this version ({FORMAT}): make them by `vlmx calibrate`")
    tensors = {name: file.tensor(name) for name in file.entries}
    try:
        record = json.loads(metadata["statistics"])
        if checksum(tensors) != record["sha256"]:
            raise ValueError("its checksum is another")
        return restore(record, tensors), Origin.from_json(record["origin"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged statistics: {reason(error)}; make them again by `vlmx calibrate`") from error


def restore(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[Key, LayerStatistics]:
    """The layers that a file's record describes. Raises ValueError, KeyError and the like where it is damaged."""
    groups = [
        {name: moments(f"inputs.{number}.{name}", count, tensors) for name, count in counts.items()}
        for number, counts in enumerate(record["counts"])
    ]
    layers = {}
    for method, entries in record["layers"].items():
        for entry, (group, number) in entries.items():
            outputs = Outputs(*(tensors[f"outputs.{number}.{field.name}"] for field in fields(Outputs)))
            check(f"{method} {entry}", len(outputs.minimum), vars(outputs))
            layers[method, entry] = LayerStatistics(groups[group], outputs)
    if not layers:
        raise ValueError("no layers")
    return layers


def moments(prefix: str, count: int, tensors: Mapping[str, Tensor]) -> Moments:
    """One modality's moments. Raises ValueError where they do not fit each other, KeyError where one is missing."""
    found = {key: tensors[f"{prefix}.{key}"] for key in VECTORS}
    hessian = tensors.get(f"{prefix}.hessian")
    if not isinstance(count, int) or count < 1 or prefix.rpartition(".")[2] not in MODALITIES:
        raise ValueError(f"{prefix} has {count} positions")
    width = len(found["minimum"])
    check(prefix, width, found)
    if hessian is not None and (hessian.shape != (width, width) or hessian.dtype != torch.float32):
        raise ValueError(f"{prefix} has a hessian of {tuple(hessian.shape)} for {width} inputs")
    return Moments(count=count, hessian=hessian, **found)


def check(what: str, width: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all are finite float32 vectors of `width`, `rows` a matrix of such."""
    for key, tensor in tensors.items():
        shape = (len(tensor), width) if key == "rows" else (width,)
        if tensor.shape != shape or tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{what} has a {key} that is no finite float32 tensor of width {width}")
