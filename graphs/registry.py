"""Architectures by name: each file in `graphs/architectures` is one, found by its file name and imported on demand."""

from __future__ import annotations

from graphs import architectures, discovery
from graphs.errors import UserError, nearest
from graphs.spec import Architecture, Variant


def names() -> list[str]:
    """Every architecture's name, without importing any."""
    return discovery.names(architectures)


def architecture(name: str) -> type[Architecture]:
    """The architecture called `name`, the `ARCHITECTURE` of its file. Raises UserError naming the nearest one."""
    found: type[Architecture] = discovery.find(architectures, name, "model", "ARCHITECTURE")
    return found


def variant(model: str, name: str) -> Variant:
    """The variant of `model` called `name`. Raises UserError naming the nearest one."""
    variants = {variant.name: variant for variant in architecture(model).variants()}
    if name not in variants:
        raise UserError(f"unknown variant '{name}' of {model}: {nearest(name, variants)}")
    return variants[name]
