"""A target that has kernels for whatever a test asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LINEAR = ("w8", "w4g32", "w4g64", "w4g128", "w3g32", "w8a8", "w8a8o", "w8a8t", "w8g32a8b", "w4g32za8t", "f8af8", "p8")


@dataclass(frozen=True)
class Everything:
    floats: tuple[str, ...] = ("float32", "float16")
    schemes: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"linear": LINEAR, "conv": ("w8", "w8a8"), "embedding": ("w8", "w4g32")}
    )
    kv_cache: tuple[str, ...] = ("float", "int8")
    native: frozenset[str] = frozenset()
    symmetric: bool = False
