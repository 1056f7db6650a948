"""What an additive mask in a translated graph hides, by the operators that make it.

Rows are queries at `cache_position`, columns keys of the cache; `MASKED` added to a score leaves nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import onnx_ir as ir

from graphs.components.text.cache import MASKED

#: operators that hand on what they are given
THROUGH = frozenset({"Cast", "Unsqueeze", "Identity"})


class Hidden(IntEnum):
    """The keys that a query surely does not see, each including those of the one before."""

    NOTHING = 0
    UNWRITTEN = 1  # keys behind the last position of the call
    FUTURE = 2  # keys behind the query's own position


@dataclass(frozen=True)
class Mask:
    """`exact`: nothing is hidden, and nothing added, but `hidden` and what lies before the `window` (0: all seen)."""

    hidden: Hidden = Hidden.NOTHING
    window: int = 0
    exact: bool = False


def constant(value: ir.Value | None) -> np.ndarray | None:
    """What an initializer that is at hand holds."""
    if value is None or value.const_value is None or isinstance(value.const_value, ir.LazyTensor):
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """A constant of one element."""
    found = constant(value)
    return float(found.item()) if found is not None and found.size == 1 else None


def made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of that kind whose output a value is."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def mask_of(value: ir.Value | None, position: ir.Value) -> Mask:
    """What a mask [.., S, C] does to queries at `position` [S], consecutive."""
    node = None if value is None else value.producer()
    if node is None:
        return Mask()
    if node.op_type in THROUGH:
        return mask_of(node.inputs[0], position)
    if node.op_type == "Where":
        seen, zero, low = node.inputs
        hides = scalar(zero) == 0 and (scalar(low) or 0) <= MASKED
        return condition(seen, position) if hides else Mask()
    if node.op_type in ("Add", "Min"):  # of finite parts: what one hides stays hidden
        return Mask(max(mask_of(part, position).hidden for part in node.inputs))
    return Mask()


def condition(value: ir.Value | None, position: ir.Value) -> Mask:
    """What a condition under which keys are seen hides."""
    node = None if value is None else value.producer()
    if node is None:
        return Mask()
    first, second = (*node.inputs, None)[:2]
    if node.op_type in ("And", "Or"):
        one, other = condition(first, position), condition(second, position)
        if node.op_type == "Or":
            return Mask(min(one.hidden, other.hidden))
        both = Mask(max(one.hidden, other.hidden), one.window or other.window, one.exact and other.exact)
        return both if not (one.window and other.window) else Mask(both.hidden)
    if node.op_type == "LessOrEqual" and counts(first):
        if is_column(second, position):
            return Mask(Hidden.FUTURE, exact=True)
        return Mask(Hidden.UNWRITTEN if is_last(second, position) else Hidden.NOTHING)
    if node.op_type == "Greater" and counts(first):
        difference = made_by(second, "Sub")
        if difference is not None and is_column(difference.inputs[0], position):
            window = scalar(difference.inputs[1])
            if window is not None and window >= 1:
                return Mask(window=int(window), exact=True)
    return Mask()


def counts(value: ir.Value | None) -> bool:
    """Whether a value is the keys' indices: 0, 1, 2, .."""
    found = constant(value)
    return found is not None and found.ndim == 1 and bool((found == np.arange(len(found))).all())


def is_column(value: ir.Value | None, position: ir.Value) -> bool:
    """Whether a value is `position` as [S, 1]."""
    node = made_by(value, "Unsqueeze")
    axes = None if node is None else constant(node.inputs[1])
    return (
        node is not None and node.inputs[0] is position and axes is not None and axes.flatten().tolist() in ([1], [-1])
    )


def is_last(value: ir.Value | None, position: ir.Value) -> bool:
    """Whether a value is the last element of `position`, as [1]."""
    node = made_by(value, "Slice")
    if node is None or node.inputs[0] is not position:
        return False
    start, end = scalar(node.inputs[1]), scalar(node.inputs[2])
    return start == -1 and end is not None and end >= 2**31 - 1
