"""Runs a function in a process of its own, so that its peak memory is its own and nobody's leftovers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

from export.quiet import quiet_libraries

P = ParamSpec("P")
R = TypeVar("R")


def alone(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What `function` returns or raises, from a fresh interpreter; all of it must be picklable."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=quiet_libraries) as pool:
        return pool.submit(function, *args, **kwargs).result()
