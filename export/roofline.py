"""Devices, and how long a call takes on one at the least: a roofline (Williams, Waterman and Patterson 2009).

Operators of one kind that compute in one number format take the larger of operations over the device's peak in that
format and bytes over its bandwidth; a call takes the sum over its kinds. Layers with int8 activations compute in int8
whatever their weights are kept in; weights alone in integers are multiplied as floats, and widening them costs nothing
here; attention is in floats and reads the cache. What lies between (norms, activations, quantizing) costs nothing.

That is the bound. The expectation divides each peak by the share of it that well-kept kernels reach on the device,
where that was measured.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from export.targets.base import Capabilities, load_target
from export.work import Call
from graphs.errors import UserError, nearest
from graphs.spec import TensorSpec
from quant.layers import Weighed
from quant.recipe import KEEP, Recipe
from quant.resolve import choose, fits
from quant.scheme import Scheme

DEVICES = Path(__file__).with_name("devices.toml")

#: what floats are called in tables of peaks
FLOATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

#: activations of a scheme -> what its layers multiply in; floats where it is not here
ARITHMETIC = {"a8": "int8", "a8o": "int8", "a8t": "int8", "a8b": "int8", "af8": "fp8"}


@dataclass(frozen=True)
class Numbers:
    """What the numbers of a program are kept in: `scheme` gives a layer's, None where it stays in `floats`."""

    floats: str
    kv_cache: str
    scheme: Callable[[Weighed], Scheme | None]

    @property
    def width(self) -> int:
        return int(getattr(torch, self.floats).itemsize)

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Numbers:
        """As a recipe would have it: each layer the first scheme that fits it, half precision where it names none."""
        floats = "float16" if recipe.floats == "native" else recipe.floats

        def scheme(layer: Weighed) -> Scheme | None:
            rule = recipe.rule(layer)
            texts = rule.schemes if rule else ()
            wanted = next((text for text in texts if text == KEEP or fits(layer, Scheme.parse(text))), KEEP)
            return None if wanted == KEEP else Scheme.parse(wanted)

        return cls(floats, recipe.kv_cache[0], scheme)

    @classmethod
    def on_target(cls, recipe: Recipe, target: str) -> Numbers:
        """As an export to `target` has it, but that a target that lacks the recipe's floats has its own.

        Raises UserError where it takes none of the caches, `scheme` where it takes none of a rule's schemes.
        """
        takes: Capabilities = load_target(target).capabilities
        floats = recipe.floats if recipe.floats in takes.floats else takes.floats[0]
        kv_cache = next((kind for kind in recipe.kv_cache if kind in takes.kv_cache), None)
        if kv_cache is None:
            raise UserError(f"{target} keeps no {recipe.kv_cache[0]} KV cache")

        @cache
        def scheme(layer: Weighed) -> Scheme | None:
            rule = recipe.rule(layer)
            return choose(layer, rule, target, takes) if rule else None

        return cls(floats, kv_cache, scheme)

    @classmethod
    def of_bundle(cls, manifest: Mapping[str, Any]) -> Numbers:
        """As a bundle's manifest records them. Raises UserError where it is damaged."""
        try:
            recorded = manifest["quantization"]
            rows = {name: Scheme.parse(row["scheme"]) for name, row in recorded["layers"].items()}
            floats, kv_cache = str(recorded["floats"]), str(recorded["kv_cache"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the manifest's quantization is damaged: {error!r}") from error
        return cls(floats, kv_cache, lambda layer: rows.get(f"{layer.method}/{layer.entry}"))

    def weight_bytes(self, numel: int, layer: Weighed | None) -> int:
        """What a parameter takes."""
        scheme = self.scheme(layer) if layer else None
        return scheme.bytes(layer.shape, self.width) if layer and scheme else numel * self.width

    def state_bytes(self, state: tuple[TensorSpec, ...]) -> int:
        """What states take: int8 caches [1, G, C, K] have a scale a row."""
        total = 0
        for spec in state:
            shape = spec.size({})
            numbers = torch.Size(shape).numel()
            narrow = self.kv_cache == "int8" and len(shape) == 4 and spec.dtype.is_floating_point
            total += numbers + numbers // shape[-1] * self.width if narrow else numbers * self.width
        return total

    def arithmetic(self, layer: Weighed) -> str:
        """The number format that a layer multiplies in."""
        scheme = self.scheme(layer)
        return ARITHMETIC.get(scheme.activations if scheme else "", FLOATS[self.floats])


@dataclass(frozen=True)
class Part:
    """The operators of a call that are of one kind and compute in one number format."""

    kind: str
    numbers: str
    flops: int
    bytes: int


def parts(call: Call, numbers: Numbers) -> list[Part]:
    """What a call computes and reads. An embedding reads the rows that it needs and not its table: nothing here."""
    flops: dict[tuple[str, str], int] = defaultdict(int)
    read: dict[tuple[str, str], int] = defaultdict(int)
    for weight in call.weights:
        kind = weight.layer.kind if weight.layer else "other"
        if kind != "embedding":
            key = kind, numbers.arithmetic(weight.layer) if weight.layer else FLOATS[numbers.floats]
            flops[key] += weight.flops
            read[key] += numbers.weight_bytes(weight.numel, weight.layer)
    attention = "attention", FLOATS[numbers.floats]
    flops[attention] += call.attention
    read[attention] += numbers.state_bytes(call.state)
    return [Part(*key, flops[key], read[key]) for key in flops if flops[key] or read[key]]


@dataclass(frozen=True)
class Device:
    """Peaks of a device: TFLOP/s by number format, GB/s, GB; `efficiency` is the share of each that kernels reach."""

    about: str
    target: str
    memory: float
    bandwidth: float
    compute: Mapping[str, float]
    source: str
    efficiency: Mapping[str, float] = field(default_factory=dict)
    measured: str = ""

    def bound(self, found: list[Part]) -> float:
        """Seconds that a call takes at the least. Raises UserError for numbers that the device cannot compute in."""
        return self._seconds(found, {})

    def expected(self, found: list[Part]) -> float | None:
        """Seconds that a call takes by well-kept kernels; None where that was not measured. Raises UserError."""
        known = {"bandwidth", *(part.numbers for part in found)} <= set(self.efficiency)
        return self._seconds(found, self.efficiency) if known else None

    def _seconds(self, found: list[Part], shares: Mapping[str, float]) -> float:
        bandwidth = self.bandwidth * 1e9 * shares.get("bandwidth", 1.0)
        total = 0.0
        for part in found:
            if part.numbers not in self.compute:
                raise UserError(f"does not compute in {part.numbers}, only in {', '.join(self.compute)}")
            peak = self.compute[part.numbers] * 1e12 * shares.get(part.numbers, 1.0)
            total += max(part.flops / peak, part.bytes / bandwidth)
        return total


@cache
def devices() -> dict[str, Device]:
    """The devices that are known, by name."""
    with DEVICES.open("rb") as file:
        return {name: Device(**table) for name, table in tomllib.load(file).items()}


def device(name: str) -> Device:
    """The device called `name`. Raises UserError naming the nearest one."""
    if name not in devices():
        raise UserError(f"unknown device '{name}': {nearest(name, devices())}")
    return devices()[name]
