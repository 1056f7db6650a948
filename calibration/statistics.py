"""What a float program's layers read and wrote on calibration data: all that quantization algorithms need, in one file.

Layers are the linear layers and convolutions of each method's graph, by (method, name of the weight in that method's
state dict). Those that read the same value share their moments, in memory and in the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from calibration import storage
from calibration.moments import Combined, Key, LayerStatistics, Moments, Outputs, Weighting
from calibration.origin import Origin
from graphs.errors import UserError
from graphs.program import Program

__all__ = ["Combined", "Key", "LayerStatistics", "Moments", "Origin", "Outputs", "Statistics", "Weighting"]


@dataclass(frozen=True)
class Statistics(Mapping[Key, LayerStatistics]):
    """Statistics by (method, weight entry), and where they came from.

    Those of a file are read as they are asked for; whoever is done with a layer's calls `release`.
    """

    layers: Mapping[Key, LayerStatistics]
    origin: Origin
    drop: Callable[[Key], None] = field(default=lambda key: None, compare=False)

    def release(self, key: Key) -> None:
        """The caller has read what it needs of a layer: pages of a mapped file, which count as memory, may go."""
        self.drop(key)

    def __getitem__(self, key: Key) -> LayerStatistics:
        """Raises UserError for a layer that was not seen."""
        if key not in self.layers:
            raise UserError(self._absence(*key))
        return self.layers[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __contains__(self, key: object) -> bool:
        return key in self.layers

    def _absence(self, method: str, entry: str) -> str:
        if not any(seen == method for seen, _ in self.layers):
            why = ", which has no pictures" if not self.origin.images else ""
            return f"no statistics of {method} in calibration data '{self.origin.data}'{why}: calibrate with other data"
        return f"no statistics of {method}'s {entry}: calibrate again with this model and these passes"

    def check(self, program: Program) -> None:
        """Raise UserError where these are not of `program`: another layer, another width, or other weights.

        `program` is the float program with the passes applied, before anything is quantized.
        """
        again = "run `vlmx calibrate` again with this model and these passes"
        for (method, entry), layer in self.layers.items():
            traced = program.methods.get(method)
            weight = traced.exported.state_dict.get(entry) if traced else None
            if weight is None:
                raise UserError(f"the statistics are of another graph, this one has no {method} {entry}: {again}")
            if len(weight) != len(layer.outputs.minimum):
                raise UserError(
                    f"the statistics are of another graph, {method} {entry} has {len(weight)} outputs there "
                    f"and {len(layer.outputs.minimum)} here: {again}"
                )
            for moments in layer.inputs.values():
                if weight.ndim == 2 and weight.shape[1] != len(moments.minimum):
                    raise UserError(
                        f"the statistics are of another graph, {method} {entry} reads {weight.shape[1]} values "
                        f"and {len(moments.minimum)} there: {again}"
                    )
        if fingerprint(program, self.layers) != self.origin.fingerprint:
            raise UserError(f"the statistics are of other weights, {self.origin.weights}: {again}")

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all. Raises UserError where it cannot be written."""
        storage.save(self.layers, self.origin, path)

    @classmethod
    def load(cls, path: Path, program: Program | None = None) -> Statistics:
        """What `save` wrote, checked against `program` where one is given. Raises UserError naming the fault."""
        statistics = cls(*storage.load(path))
        if program is not None:
            statistics.check(program)
        return statistics


def fingerprint(program: Program, layers: Iterable[Key]) -> str:
    """Tells weights apart: a hash of each method's first and last layer's weight. Hexadecimal, 64 digits."""
    digest = hashlib.sha256()
    keys = sorted(layers)
    for method in sorted({method for method, _ in keys}):
        entries = [entry for of, entry in keys if of == method]
        for entry in {entries[0]: None, entries[-1]: None}:
            weight = program.tensor(method, entry).detach().float().contiguous()
            digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
