"""Constant sizes of a traced graph that follow another number of tokens.

Tracing writes sizes into reshapes as numbers. Where a grid of G x G tokens becomes one of H x H, a reshape of G * G
tokens to the grid must say H, and every window that slides over the grid must still see all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphs.compress.place import side, value
from graphs.files import reason

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


class FollowError(Exception):
    """The graph cannot take that number of tokens; the text says why."""


@dataclass(frozen=True)
class Followed:
    """Shapes behind the change, and what reshapes must say; `apply` says it."""

    shapes: dict[fx.Node, torch.Size]
    sizes: dict[fx.Node, list[int]]

    def apply(self) -> None:
        """Write the sizes into the graph."""
        for node, size in self.sizes.items():
            node.update_arg(1, size)


def follow(start: fx.Node, shape: Sequence[int]) -> Followed:
    """What becomes of everything that `start` feeds where it computes `shape`. Raises FollowError."""
    nodes = list(start.graph.nodes)
    found: dict[fx.Node, Any] = {}
    sizes: dict[fx.Node, list[int]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        found[start] = blank(start, shape)
        for node in nodes[nodes.index(start) + 1 :]:
            if node.op != "call_function" or not any(arg in found for arg in node.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: found[n] if n in found else blank(n))
            if node.target in RESHAPES:
                source = node.args[0]
                assert isinstance(source, fx.Node)
                sizes[node] = regrouped(source.meta["val"].shape, node.meta["val"].shape, args[0].shape)
                args = (args[0], sizes[node])
            check_windows(node, args)
            try:
                found[node] = node.target(*args, **kwargs)
            except (RuntimeError, ValueError, TypeError) as error:
                raise FollowError(reason(error)) from error
    return Followed({node: out.shape for node, out in found.items() if isinstance(out, Tensor)}, sizes)


def blank(node: fx.Node, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor like the one that `node` computes, of its shape unless another is given."""
    known = value(node)
    assert known is not None
    return torch.empty(tuple(known.shape if shape is None else shape), dtype=known.dtype)


def regrouped(old_in: Sequence[int], old_out: Sequence[int], new_in: Sequence[int]) -> list[int]:
    """The sizes of a reshape that was old_in -> old_out, for an input of the shape `new_in`.

    Dimensions are matched in groups of equal products; a group that changed must be one dimension that stays one, a
    square grid that becomes tokens, or tokens that become a square grid. Raises FollowError.
    """
    out: list[int] = []
    i = j = 0
    while i < len(old_in) or j < len(old_out):
        a, b = i, j
        i, j = i + (i < len(old_in)), j + (j < len(old_out))
        while (left := math.prod(old_in[a:i])) != (right := math.prod(old_out[b:j])):
            i, j = i + (left < right), j + (left > right)
        before, after, now = list(old_in[a:i]), list(old_out[b:j]), list(new_in[a:i])
        if now == before:
            out += after
            continue
        count, wide = math.prod(now), [size for size in after if size != 1]
        root = side(count)
        if len(wide) == 1:
            out += [size if size == 1 else count for size in after]
        elif len(wide) == 2 and wide[0] == wide[1] and root is not None:
            out += [size if size == 1 else root for size in after]
        else:
            raise FollowError(f"a reshape of {before} to {after} does not tell what {now} becomes")
    return out


def check_windows(node: fx.Node, args: Sequence[Any]) -> None:
    """Raise FollowError where the windows of a convolution or of pooling would not reach the end of the grid.

    Those that never did may go on.
    """
    if node.target is aten.conv2d.default:
        kernel, rest = list(args[1].shape[2:]), [*args[3:6], [], [], []][:3]
        stride, padding, dilation = rest[0] or [1, 1], rest[1] or [0, 0], rest[2] or [1, 1]
    elif node.target is aten.avg_pool2d.default:
        kernel, rest = list(args[1]), [*args[2:4], [], []][:2]
        stride, padding, dilation = rest[0] or kernel, rest[1] or [0, 0], [1, 1]
    else:
        return
    before = node.all_input_nodes[0].meta["val"].shape
    for axis in (0, 1):
        window = dilation[axis] * (kernel[axis] - 1) + 1

        def unseen(size: int, axis: int = axis, window: int = window) -> int:
            steps = (size + 2 * padding[axis] - window) // stride[axis]
            return size if steps < 0 else size - (steps * stride[axis] + window - padding[axis])

        now = int(args[0].shape[axis - 2])
        if unseen(now) > max(0, unseen(before[axis - 2])):
            raise FollowError(f"windows of {window}, {stride[axis]} apart, do not cover a side of {now}")
