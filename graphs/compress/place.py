"""Where in a traced vision encoder visual tokens can be changed, found by module path and operator, not by model class.

Tracing records for each node the path of the module that it came from; paths survive decomposition and retracing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphs.errors import UserError

#: path of the module between tower and decoder
PROJECTOR = "projector"
#: paths of spliced modules: this, a number, and whether tokens are still a grid (`GRID`) or any list (`LIST`)
COMPRESSION, GRID, LIST = "compression", "grid", "list"
#: paths of modules spliced between tower and projector: this and a number
ENTRANCE = "entrance"

LINEAR = torch.ops.aten.linear.default
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Tokens:
    """The value of `node` [1, count, width]; `grid` is its side where the tokens are a square in raster order."""

    node: fx.Node
    count: int
    width: int
    grid: int | None


@dataclass(frozen=True)
class Attention:
    """Queries and keys [1, heads, prefix + grid * grid, K] of one layer; `prefix` tokens (class, registers) lead."""

    query: fx.Node
    key: fx.Node
    scale: float
    prefix: int
    grid: int


def value(node: object) -> Tensor | None:
    """The fake tensor that a node computes; None for anything else."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def path(node: fx.Node) -> str:
    """The path of the innermost module that a node came from."""
    stack = node.meta.get("nn_module_stack") or {}
    return str([*stack.values()][-1][0]) if stack else ""


def first(node: fx.Node) -> str:
    """The outermost part of that path: a child of the method's root module."""
    return path(node).split(".")[0]


def within(graph: fx.Graph, child: str) -> list[fx.Node]:
    """The operators of one child of the method's root module, in order."""
    return [node for node in graph.nodes if node.op == "call_function" and first(node) == child]


def compressions(graph: fx.Graph) -> list[str]:
    """The children of the root module that passes have spliced in, in the order of their computation."""
    return list(dict.fromkeys(name for node in graph.nodes if (name := first(node)).startswith(f"{COMPRESSION}_")))


def entrances(graph: fx.Graph) -> list[str]:
    """The children of the root module that passes have spliced in before the projector, in order."""
    return list(dict.fromkeys(name for node in graph.nodes if (name := first(node)).startswith(f"{ENTRANCE}_")))


def projector(graph: fx.Graph) -> list[fx.Node]:
    """The operators of the projector. Raises UserError where there is none."""
    found = within(graph, PROJECTOR)
    if not found:
        children = sorted({first(node) for node in graph.nodes if node.op == "call_function"} - {""})
        raise UserError(
            f"the graph has no place for this pass: no operators of a module '{PROJECTOR}', only of {children}"
        )
    return found


def tokens_out(graph: fx.Graph) -> Tokens:
    """What leaves the projector, or the last pass behind it: the image embeddings. Raises UserError.

    What an encoder without a projector gives has no grid: several pictures may be in it, one behind the other.
    """
    added = compressions(graph)
    inside = within(graph, PROJECTOR)
    last = within(graph, added[-1]) if added else inside
    leaving = [node for node in last if any(user not in last for user in node.users)]
    leaving = leaving if last else graph.output_node().all_input_nodes
    shape = () if len(leaving) != 1 or (found := value(leaving[0])) is None else tuple(found.shape)
    if not all(isinstance(size, int) for size in shape):
        raise UserError(
            "the graph has no place for this pass: how many visual tokens there are changes from picture to picture, "
            "and this pass keeps a number that is fixed when it is compiled: use thin{factor=2}"
        )
    if len(shape) != 3 or shape[0] != 1:
        where = f"'{PROJECTOR}'" if inside else "the encoder"
        raise UserError(f"the graph has no place for this pass: looked for one [1, N, D] that leaves {where}")
    is_list = not inside or any(name.endswith(LIST) for name in added)
    # Attention in a projector mixes tokens by content (a resampler): its outputs lie at no place in the picture.
    mixed = any(node.target is ATTENTION or node.target is torch.ops.aten.softmax.int for node in inside)
    return Tokens(leaving[0], shape[1], shape[2], None if is_list or mixed else side(shape[1]))


def tokens_in(graph: fx.Graph) -> tuple[fx.Node, Tokens]:
    """The one linear layer of the projector that reads the tower's tokens, and those. Raises UserError."""
    inside = projector(graph)
    readers = [n for n in inside if any(a not in inside and a.op != "get_attr" for a in n.all_input_nodes)]
    found = value(readers[0].args[0]) if len(readers) == 1 else None
    if found is None or found.dim() != 3 or found.shape[0] != 1 or readers[0].target is not LINEAR:
        raise UserError(
            f"the graph has no place for this pass: looked for one linear layer of '{PROJECTOR}' that reads the "
            f"tokens [1, N, D], found {', '.join(str(node.target) for node in readers)}"
        )
    tokens = readers[0].args[0]
    assert isinstance(tokens, fx.Node)
    return readers[0], Tokens(tokens, int(found.shape[1]), int(found.shape[2]), side(int(found.shape[1])))


def side(count: int) -> int | None:
    """The side of a square of `count`; None where it is none."""
    root = math.isqrt(count)
    return root if root * root == count else None


def tower_attention(graph: fx.Graph) -> Attention:
    """The last attention before the projector, that of the layer whose features are used. Raises UserError."""
    begin = (within(graph, added[0]) if (added := entrances(graph)) else projector(graph))[0]
    order = list(graph.nodes)
    before = [node for node in order[: order.index(begin)] if node.target is ATTENTION]
    entering = next((v for arg in begin.all_input_nodes if (v := value(arg)) is not None and v.dim() == 3), None)
    if not before or entering is None:
        raise UserError(
            "the graph has no place for this pass: looked for scaled_dot_product_attention before "
            f"'{PROJECTOR}' and the tokens [1, N, D] that enter it"
        )
    query, key = before[-1].args[:2]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    shape = key.meta["val"].shape
    prefix, grid = int(shape[2]) - int(entering.shape[1]), side(int(entering.shape[1]))
    if prefix < 0 or grid is None or query.meta["val"].shape[2] != shape[2]:
        raise UserError(
            f"the graph has no place for this pass: the tower attends over {int(shape[2])} tokens and "
            f"{int(entering.shape[1])} enter '{PROJECTOR}': looked for a square grid behind leading tokens"
        )
    scale = before[-1].kwargs.get("scale")
    return Attention(query, key, float(scale) if isinstance(scale, float) else float(shape[3]) ** -0.5, prefix, grid)
