"""What ExecuTorch's passes compute again of graphs that have it recorded, left out while `spared` lasts.

Each of some thirty passes of an export runs the whole graph on fake tensors to find what every operator gives, whether
it changed that operator or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from executorch.exir.dialects.edge._ops import EdgeOpOverload
from executorch.exir.pass_base import ProxyValue, _ExportPassBase
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

Interpreter = _ExportPassBase.ExportInterpreter
#: of a node's `meta`: the operator and the forms of its arguments that its recorded value was computed of. A pass may
#: have changed the node since, in place
MADE_OF = "vlmx_made_of"

RUN, COMPUTE = Interpreter.run_node, _ExportPassBase._fx


@contextmanager
def spared() -> Iterator[None]:
    """While this lasts, a node that a pass passes on, of arguments like those that its value was computed of, gives
    that value."""
    with patch.object(Interpreter, "run_node", run_node), patch.object(_ExportPassBase, "_fx", compute):
        yield


class Recorded:
    """Stands in for the interpreter of a pass, where what it would compute is known."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.value


def run_node(self: Any, node: Node) -> Any:
    """`ExportInterpreter.run_node`; its pass knows which node it is at."""
    before, self.callback.at = getattr(self.callback, "at", None), node
    try:
        return RUN(self, node)
    finally:
        self.callback.at = before


def compute(self: Any, kind: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Any:
    """`_ExportPassBase._fx`: a node of the new graph, its value, and what that was computed of."""
    node: Node | None = getattr(self, "at", None)
    made_of = (operator(target), *forms((args, kwargs))) if kind == "call_function" else None
    own = self.interpreter
    if made_of is not None and node is not None and "val" in node.meta and node.meta.get(MADE_OF) == made_of:
        self.interpreter = Recorded(node.meta["val"])
    try:
        made = COMPUTE(self, kind, target, args, kwargs, meta)
    finally:
        self.interpreter = own
    made.node.meta[MADE_OF] = made_of
    return made


def operator(target: Any) -> Any:
    """What an operator is compared by: an edge operator is its ATen operator."""
    return target._op if isinstance(target, EdgeOpOverload) else target


def forms(value: Any) -> Iterator[Any]:
    """What an operator may read of its arguments, one after the other, with the brackets between them.

    Constants have a type, too: 1 and 1.0 and True are equal.
    """
    if isinstance(value, ProxyValue):
        yield from forms(value.data)
    elif isinstance(value, Tensor):
        plain = isinstance(value, FakeTensor) and value.constant is None
        yield form(value) if plain else object()  # equal to nothing: its numbers may be read
    elif isinstance(value, list | tuple):
        yield list, len(value)
        for each in value:
            yield from forms(each)
    elif isinstance(value, Mapping):
        yield tuple(value)
        for each in value.values():
            yield from forms(each)
    elif isinstance(value, SymInt):
        yield expression(value)
    else:
        yield type(value), value


def form(tensor: Tensor) -> tuple[Any, ...]:
    """What operators may read of a fake tensor. Symbols are compared as expressions: no guard comes of it."""
    sizes = [expression(size) for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset())]
    return (tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, *sizes)


def expression(size: int | SymInt) -> Any:
    """A size that can be compared."""
    return size.node.expr if isinstance(size, SymInt) else size
