"""`vlmx list`: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable

from export.targets.base import TARGETS, load_target
from graphs import registry
from graphs.compress import base as compress
from graphs.model import zoo_checkpoints
from quant.recipes import RECIPES


def models() -> dict[str, str]:
    """Each model with its variants, those that ship with trained weights named first."""
    rows = {}
    for name in registry.names():
        trained = [f"{zoo} (trained, ships with vlmx)" for zoo in zoo_checkpoints() if zoo.split("-")[0] == name]
        variants = [variant.name for variant in registry.architecture(name).variants()]
        rows[name] = ", ".join([*trained, *variants])
    return rows


def targets() -> dict[str, str]:
    """Each target with where it runs and the recipes it takes."""
    found = {name: load_target(name).capabilities for name in TARGETS}
    return {name: f"{table.runs_on}; recipes {', '.join(table.recipes)}" for name, table in found.items()}


def passes() -> dict[str, str]:
    """Each compression pass: how it is written and what it does."""
    return {name: compress.find(name).about for name in compress.names()}


def recipes() -> dict[str, str]:
    """Each quantization recipe."""
    return {name: recipe.about for name, recipe in RECIPES.items()}


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "models": models,
    "targets": targets,
    "passes": passes,
    "recipes": recipes,
}
