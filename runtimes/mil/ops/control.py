"""Branches and loops: operators over nested blocks, which arrive as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtimes.base import Array
from runtimes.mil.registry import op

Run = Callable[..., tuple[Any, ...]]


@op("cond", moves=True)
def cond(pred: Array, blocks: tuple[Run, Run]) -> tuple[Any, ...]:
    """The results of the first block where `pred` holds, else of the second."""
    return blocks[0]() if bool(pred) else blocks[1]()


@op("while_loop", moves=True)
def while_loop(loop_vars: tuple[Any, ...], blocks: tuple[Run, Run]) -> tuple[Any, ...]:
    """`loop_vars` carried through the second block for as long as the first says so."""
    values = loop_vars
    while bool(blocks[0](*values)[0]):
        values = blocks[1](*values)
    return tuple(values)
