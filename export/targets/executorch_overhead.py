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
from torch import SymInt
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

Interpreter = _ExportPassBase.ExportInterpreter
RUN, COMPUTE = Interpreter.run_node, _ExportPassBase._fx


@contextmanager
def spared() -> Iterator[None]:
    """While this lasts, a node that a pass passes on as it was, of arguments like those that it had, gives the value
    that is recorded of it."""
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
    before, self.callback.at = getattr(self.callback, "at", None), (self, node)
    try:
        return RUN(self, node)
    finally:
        self.callback.at = before


def compute(self: Any, kind: str, target: Any, args: Any, kwargs: Any, meta: Any) -> Any:
    """`_ExportPassBase._fx`: a node of the new graph, and its value."""
    at: tuple[Any, Any] = getattr(self, "at", None) or (None, None)
    interpreter, node = at
    known = (
        kind == "call_function"
        and node is not None
        and "val" in node.meta
        and same_operator(target, node.target)
        and same(interpreter, (args, kwargs), (node.args, node.kwargs))
    )
    if not known:
        return COMPUTE(self, kind, target, args, kwargs, meta)
    own, self.interpreter = self.interpreter, Recorded(node.meta["val"])
    try:
        return COMPUTE(self, kind, target, args, kwargs, meta)
    finally:
        self.interpreter = own


def same_operator(made: Any, given: Any) -> bool:
    """Whether two operators compute the same: an edge operator is its ATen operator."""
    made, given = (op._op if isinstance(op, EdgeOpOverload) else op for op in (made, given))
    return made is given


def same(interpreter: Any, made: Any, given: Any) -> bool:
    """Whether arguments that a pass gives are like those of the node: values like those recorded, equal constants."""
    if isinstance(given, Node):
        if given.op == "get_attr":
            return made is interpreter.fetch_attr(given.target)
        return isinstance(made, ProxyValue) and "val" in given.meta and alike(made.data, given.meta["val"])
    if isinstance(given, list | tuple):
        return (
            isinstance(made, list | tuple)
            and len(made) == len(given)
            and all(same(interpreter, *pair) for pair in zip(made, given, strict=True))
        )
    if isinstance(given, Mapping):
        return made.keys() == given.keys() and all(same(interpreter, made[key], given[key]) for key in given)
    return type(made) is type(given) and bool(made == given)


def alike(made: Any, given: Any) -> bool:
    """Whether an operator makes the same of two values: fake tensors of one form, tuples of them, or equal numbers."""
    if made is given:
        return True
    if type(made) is not type(given):
        return False
    if isinstance(made, FakeTensor):
        return made.constant is None and given.constant is None and form(made) == form(given)
    if isinstance(made, list | tuple):
        return len(made) == len(given) and all(alike(*pair) for pair in zip(made, given, strict=True))
    if isinstance(made, SymInt):
        return bool(expression(made) == expression(given))
    return isinstance(made, bool | int | float | str) and bool(made == given)


def form(tensor: FakeTensor) -> tuple[Any, ...]:
    """What operators may read of a fake tensor. Symbols are compared as expressions: no guard comes of it."""
    sizes = [expression(size) for size in (*tensor.shape, *tensor.stride(), tensor.storage_offset())]
    return (tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad, *sizes)


def expression(size: int | SymInt) -> Any:
    """A size that can be compared."""
    return size.node.expr if isinstance(size, SymInt) else size
