"""Recipes: what each number of a deployed program is kept in, as data. One TOML file each, ours or the user's own.

    about = "int8 vision, int4 decoder"
    floats = "native"            # unquantized numbers: the target's own type, or "float32", "float16", "bfloat16"
    kv_cache = ["int8", "float"] # in order of preference, as all lists here

    [[layers]]                   # the first rule that matches a layer decides
    match = "text_decoder/*"     # a pattern for METHOD/PATH; `kind` narrows it: linear, conv or embedding
    kind = "linear"
    schemes = ["w4g32a8b", "w4g32a8t", "w4g32", "float"]   # the first that the target takes and the layer fits
    scales = "gptq"              # rtn, mse or gptq
    rescale = "awq"              # awq or smoothquant, or nothing

Without a rule, or where a rule says "float", a layer stays as it is.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from calibration.moments import WEIGHTINGS
from graphs.errors import UserError, nearest
from graphs.files import reason, shown
from quant.layers import KINDS, Weighed
from quant.scheme import Scheme

SHIPPED = Path(__file__).parent / "recipes"
FLOATS = ("native", "float32", "float16", "bfloat16")
CACHES = ("float", "int8")
SCALES = ("rtn", "mse", "gptq")
RESCALES = ("", "awq", "smoothquant")
MAX_BYTES = 1 << 20
KEEP = "float"


@dataclass(frozen=True)
class Rule:
    """What layers of some path and kind get: schemes in order of preference, and how their numbers are found."""

    match: str
    schemes: tuple[str, ...]
    kind: str = ""
    scales: str = "rtn"
    rescale: str = ""

    def fits(self, layer: Weighed) -> bool:
        return self.kind in ("", layer.kind) and fnmatchcase(layer.path, self.match)

    def uncalibrated(self) -> Rule:
        """The same, its numbers found from weights alone."""
        return replace(self, scales="mse" if self.scales == "gptq" else self.scales, rescale="")


@dataclass(frozen=True)
class Recipe:
    """A named choice. `modality` says how image and text positions weigh in calibration."""

    name: str
    about: str
    floats: str = "native"
    kv_cache: tuple[str, ...] = ("float",)
    modality: str = "balanced"
    layers: tuple[Rule, ...] = ()

    def rule(self, layer: Weighed) -> Rule | None:
        """The first rule for a layer."""
        return next((rule for rule in self.layers if rule.fits(layer)), None)


def names() -> list[str]:
    """The recipes that ship."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def recipe(name: str) -> Recipe:
    """The recipe called `name`, or that in the file of that name (.toml). Raises UserError naming the nearest one."""
    if name.endswith(".toml"):
        return read(Path(name))
    if name not in names():
        raise UserError(f"unknown recipe '{shown(name)}': {nearest(name, names())}, or a file of your own, my.toml")
    return read(SHIPPED / f"{name}.toml")


@cache
def read(path: Path) -> Recipe:
    """The recipe in a file. Raises UserError naming the file and the entry at fault."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is too large for a recipe")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no recipe can be read: {reason(error)}") from error
    return parse(table, path.stem, str(path))


def parse(table: Mapping[str, Any], name: str, where: str) -> Recipe:
    """A recipe from its table. Raises UserError."""
    values = checked(table, Recipe, where, {"floats": FLOATS, "modality": WEIGHTINGS})
    values.pop("name", None)
    values.setdefault("about", "")
    for cache_kind in values.get("kv_cache", ()):
        known(cache_kind, CACHES, f"{where}: kv_cache")
    rules = []
    for number, row in enumerate(values.pop("layers", ()), 1):
        at = f"{where}: layers {number}"
        if not isinstance(row, Mapping) or not {"match", "schemes"} <= row.keys():
            raise UserError(f"{at}: needs match and schemes")
        rule = Rule(**checked(row, Rule, at, {"kind": ("", *KINDS), "scales": SCALES, "rescale": RESCALES}))
        for scheme in rule.schemes:
            if scheme != KEEP and str(Scheme.parse(scheme)) != scheme:
                raise UserError(f"{at}: scheme '{shown(scheme)}' is written {Scheme.parse(scheme)}")
        rules.append(rule)
    return Recipe(name, layers=tuple(rules), **values)


def checked(
    table: Mapping[str, Any], kind: type[Recipe] | type[Rule], where: str, choices: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """The entries of a table as fields of `kind`: strings and lists of strings. Raises UserError."""
    hints = {field.name: str(field.type) for field in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        known(key, tuple(hints), where)
        if key == "layers":
            values[key] = value
        elif hints[key] == "str" and isinstance(value, str):
            values[key] = known(value, choices[key], f"{where}: {key}") if key in choices else value
        elif hints[key] != "str" and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            values[key] = tuple(value)
        else:
            raise UserError(f"{where}: {key} must be {'a string' if hints[key] == 'str' else 'a list of strings'}")
    return values


def known(value: str, choices: tuple[str, ...], what: str) -> str:
    """`value` if it is one of `choices`. Raises UserError naming the nearest."""
    if value not in choices:
        raise UserError(f"{what}: '{shown(value)}' is unknown: {nearest(value, choices)}")
    return value
