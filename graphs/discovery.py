"""Things found by file name: each module of a package is one, imported only when it is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from graphs.errors import UserError, nearest
from graphs.files import shown


def names(package: ModuleType) -> list[str]:
    """The names of a package's modules, sorted, none of them imported."""
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(package: ModuleType, name: str, kind: str, attribute: str) -> Any:
    """`attribute` of the module called `name`. Raises UserError naming the nearest `kind` of thing there is."""
    known = names(package)
    if name not in known:
        raise UserError(f"unknown {kind} '{shown(name)}': {nearest(name, known)}")
    return getattr(importlib.import_module(f"{package.__name__}.{name}"), attribute)
