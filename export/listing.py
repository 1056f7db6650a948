"""`vlmx list`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable

from export.targets.base import TARGETS, Capabilities, load_target
from graphs import registry
from graphs.compress import base as compress
from graphs.model import zoo_checkpoints
from quant.recipe import names, recipe


def models() -> dict[str, str]:
    """Each model with its variants, those that ship with trained weights named first."""
    rows = {}
    for name in registry.names():
        trained = [f"{zoo} (trained, ships with vlmx)" for zoo in zoo_checkpoints() if zoo.split("-")[0] == name]
        variants = [variant.name for variant in registry.architecture(name).variants()]
        rows[name] = ", ".join([*trained, *variants])
    return rows


def targets() -> dict[str, str]:
    """Each target with where it runs and what numbers it takes."""
    found = {name: load_target(name).capabilities for name in TARGETS}
    return {
        name: "; ".join([table.runs_on, *(f"{kind}: {' '.join(takes)}" for kind, takes in kinds(table).items())])
        for name, table in found.items()
    }


def kinds(table: Capabilities) -> dict[str, tuple[str, ...]]:
    """What a target takes, by kind: floats, schemes of each kind of layer, the KV cache."""
    return {"floats": table.floats, **table.schemes, "KV cache": table.kv_cache}


def passes() -> dict[str, str]:
    """Each compression pass: how it is written and what it does."""
    return {name: compress.find(name).about for name in compress.names()}


def recipes() -> dict[str, str]:
    """Each quantization recipe."""
    return {name: recipe(name).about for name in names()}


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "models": models,
    "targets": targets,
    "passes": passes,
    "recipes": recipes,
}
