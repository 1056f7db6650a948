"""What `torch.onnx` does for each graph without changing what it makes of it, left out while `spared` lasts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from torch import fx
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter as Promotion

LIST = ONNXRegistry.from_torchlib


@contextmanager
def spared() -> Iterator[None]:
    """While this lasts, the translations of operators, which take a second to list, are listed once a process; and
    where casts are put in, values that the graph has recorded are not computed again."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib)))
        stack.enter_context(patch.object(Promotion, "run_node", run_node))
        yield


@cache
def listed(opset_version: int) -> ONNXRegistry:
    """The registry of an opset, as torch makes it."""
    return LIST(opset_version)


def from_torchlib(opset_version: int) -> ONNXRegistry:
    """A copy of it, to which translations may be added."""
    registry = copy.copy(listed(opset_version))
    registry.functions = {target: [*found] for target, found in registry.functions.items()}
    return registry


def run_node(self: Promotion, n: fx.Node) -> Any:
    """A node's value, after casts of what it reads are put in where its operator promotes types.

    One that got casts has its value recorded anew by then; it is of the dtype that it was.
    """
    rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
    if rule:
        with self._set_current_node(n):
            self._maybe_promote_node(n, rule)
    if n.op == "call_function" and "val" in n.meta:
        return n.meta["val"]
    return fx.Interpreter.run_node(self, n)
