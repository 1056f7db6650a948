"""What torch does again and again to graphs without changing what comes of it, left out while `spared` lasts.

An export copies, reads and changes each graph some hundred times and calls few of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from torch import fx
from torch._export import utils
from torch.fx.traceback import NodeSource

#: what makes a graph's code
COMPILE = fx.GraphModule.recompile


@contextmanager
def spared() -> Iterator[None]:
    """While this lasts:

    - a graph's Python code is written and compiled when it is asked for, not at each change; what was put off stays
      right behind it.
    - Nodes share the records of which nodes they came from, whole chains that each copy of a graph copied; nothing
      writes to a record once it is made.
    - Composite operators are listed once; each decomposition lists them sixty times.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(fx.GraphModule, "recompile", defer))
        stack.enter_context(patch.object(NodeSource, "__deepcopy__", itself, create=True))
        stack.enter_context(patch.object(utils, "_materialize_cpp_cia_ops", cache(utils._materialize_cpp_cia_ops)))
        yield


class Deferred:
    """`forward` of a graph module whose class is its own, as fx makes them: compiled when it is looked up."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = weakref.ref(module)

    def __get__(self, instance: object, owner: type) -> Any:
        module = self.module()
        assert module is not None
        COMPILE(module)
        return getattr(owner if instance is None else instance, "forward")  # noqa: B009  (the name is now another)


def defer(module: fx.GraphModule) -> None:
    """`fx.GraphModule.recompile`, until the code is asked for."""
    codegen: Any = module._graph._codegen
    if hasattr(codegen, "pytree_info"):
        module._in_spec, module._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
    module._code = "not compiled yet"
    type(module).forward = Deferred(module)  # type: ignore[assignment]


def itself(record: NodeSource, memo: object) -> NodeSource:
    """A record's copy."""
    return record
