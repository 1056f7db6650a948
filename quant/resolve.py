"""A recipe for one target: which scheme each layer of a program really gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from graphs.errors import UserError, nearest
from graphs.program import Program
from graphs.rewrite import Opened
from quant.layers import Layer, Weighed, layers
from quant.recipe import KEEP, Recipe, Rule
from quant.scheme import Scheme

Key = tuple[str, str]  # method, entry of the weight


class Takes(Protocol):
    """What a target has kernels for; `export.targets.base.Capabilities` is one."""

    @property
    def floats(self) -> tuple[str, ...]: ...
    @property
    def schemes(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def kv_cache(self) -> tuple[str, ...]: ...
    @property
    def native(self) -> frozenset[str]: ...
    @property
    def symmetric(self) -> bool: ...


@dataclass(frozen=True)
class Resolved:
    """A recipe as one target takes it: `layers` holds the quantized layers in order, with scheme and rule.

    `cast`: whether the program itself is to be cast to `floats`, or the target's converter does it. `symmetric`:
    whether static ranges of activations lie around zero.
    """

    recipe: Recipe
    floats: str
    cast: bool
    kv_cache: str
    symmetric: bool
    layers: Mapping[Key, tuple[Layer, Scheme, Rule]]

    def on(self, program: Program) -> Resolved:
        """The same for a part of the program that it was resolved for."""
        found = {(layer.method, layer.entry): layer for layer in all_layers(program)} if self.layers else {}
        kept = {key: (found[key], scheme, rule) for key, (_, scheme, rule) in self.layers.items() if key in found}
        return replace(self, layers=kept)

    def of(self, method: str) -> Resolved:
        """The same for one method."""
        return replace(self, layers={key: found for key, found in self.layers.items() if key[0] == method})

    @property
    def quantized(self) -> bool:
        """Whether anything but floats is in it."""
        return bool(self.layers) or self.kv_cache != "float"

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration data decides any number."""
        return any(s.needs_ranges or r.rescale or r.scales == "gptq" for _, s, r in self.layers.values())

    @property
    def needs_hessians(self) -> bool:
        return any(rule.scales == "gptq" for _, _, rule in self.layers.values())

    def weight_bytes(self, program: Program) -> int:
        """What the weights of a program come to: packed codes with their scales, and all others in `floats`."""
        width, total = getattr(torch, self.floats).itemsize, 0
        for method, traced in program.methods.items():
            state = {spec.name for spec in traced.signature.state}
            for entry in traced.weight_names.keys() - state:
                fake = traced.exported.state_dict[entry]
                if (method, entry) in self.layers:
                    total += self.layers[method, entry][1].bytes(fake.shape, width)
                else:
                    total += fake.numel() * (width if fake.is_floating_point() else fake.element_size())
        return total

    def to_json(self) -> dict[str, Any]:
        """For the manifest; `from_json` gives it back."""
        return {
            **{name: getattr(self, name) for name in ("floats", "cast", "kv_cache", "symmetric")},
            "modality": self.recipe.modality,
            "schemes": self.counts(),
            "layers": {
                f"{method}/{entry}": {"scheme": str(scheme), "scales": rule.scales}
                | ({"rescale": rule.rescale} if rule.rescale else {})
                for (method, entry), (_, scheme, rule) in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], program: Program) -> Resolved:
        """The recorded choice on the same program. Raises UserError where it is damaged or of another program."""
        try:
            recipe = Recipe("recorded", "", modality=str(value["modality"]))
            rows = value["layers"]
            found = {}
            for layer in all_layers(program) if rows else ():
                row = rows.get(f"{layer.method}/{layer.entry}")
                if row is not None:
                    scheme = Scheme.parse(row["scheme"])
                    rule = Rule(layer.path, (str(scheme),), layer.kind, str(row["scales"]), str(row.get("rescale", "")))
                    found[layer.method, layer.entry] = (layer, scheme, rule)
            if len(found) != len(rows):
                raise UserError("the recorded quantization is of another program")
            floats, cache = str(value["floats"]), str(value["kv_cache"])
            return cls(recipe, floats, bool(value["cast"]), cache, bool(value["symmetric"]), found)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the recorded quantization is damaged: {error!r}") from error

    def counts(self) -> dict[str, dict[str, int]]:
        """How many layers of each method have each scheme, for the manifest."""
        table: dict[str, Counter[str]] = {}
        for (method, _), (_, scheme, _) in self.layers.items():
            table.setdefault(method, Counter())[str(scheme)] += 1
        return {method: dict(sorted(counter.items())) for method, counter in table.items()}


def all_layers(program: Program) -> Iterator[Layer]:
    """The layers of every method that a scheme can be given to."""
    for method in program:
        yield from layers(Opened.open(program, method))


def fits(layer: Weighed, scheme: Scheme) -> bool:
    """Whether the groups of a scheme divide a layer's inputs."""
    group = scheme.weights.group
    return not group or (layer.kind != "conv" and layer.inputs % group == 0)


def choose(layer: Weighed, rule: Rule, target: str, takes: Takes, calibrated: bool = True) -> Scheme | None:
    """The first scheme of a rule that the target takes and the layer fits; None to keep floats. Raises UserError.

    Not `calibrated`: one whose activations are scaled as they come.
    """
    offered = takes.schemes.get(layer.kind, ())
    for text in rule.schemes:
        if text == KEEP:
            return None
        scheme = Scheme.parse(text)
        if text in offered and fits(layer, scheme) and (calibrated or not scheme.needs_ranges):
            return scheme
    fitting = [text for text in offered if fits(layer, Scheme.parse(text))]
    wanted = ", ".join(rule.schemes)
    if not calibrated and set(rule.schemes) & set(fitting):
        raise UserError(
            f"{wanted} in {layer.kind} layers as {layer.path}: ranges of activations are set by calibration, which "
            "takes a model that answers prompts: choose recipe mobile-balanced, or write one of your own"
        )
    other = nearest(rule.schemes[0], fitting) if fitting else "it takes none"
    raise UserError(f"{target} has no kernels for {wanted} in {layer.kind} layers as {layer.path}: {other}")


def resolve(recipe: Recipe, program: Program, target: str, takes: Takes, calibrated: bool = True) -> Resolved:
    """`recipe` on `program` for a target, by weights alone where it cannot be `calibrated`.

    Raises UserError naming what it does not take and the nearest it does.
    """
    floats = takes.floats[0] if recipe.floats == "native" else recipe.floats
    if floats not in takes.floats:
        raise UserError(
            f"{target} does not take recipe '{recipe.name}', its floats are {floats}: choose from "
            f"{', '.join(takes.floats)}"
        )
    cache = next((kind for kind in recipe.kv_cache if kind in takes.kv_cache), None)
    if cache is None:
        raise UserError(
            f"{target} keeps no {recipe.kv_cache[0]} KV cache: {nearest(recipe.kv_cache[0], takes.kv_cache)}"
        )
    chosen = {}
    for layer in all_layers(program) if recipe.layers else ():
        rule = recipe.rule(layer)
        scheme = choose(layer, rule, target, takes, calibrated) if rule else None
        if rule and scheme:
            chosen[layer.method, layer.entry] = (layer, scheme, rule if calibrated else rule.uncalibrated())
    has_state = any(traced.signature.state for traced in program.methods.values())
    return Resolved(
        recipe,
        floats,
        floats != "float32" and floats not in takes.native,
        cache if has_state else "float",
        takes.symmetric,
        chosen,
    )
