"""Stacks of alike layers traced once: two layers go through the tracer, the others become copies of the second.

Tracing is most of what an export of a large model does in Python, and costs the same for each of its alike layers. A
module that only runs its layers one after the other says so by a method `repeated`, which returns them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from graphs.lift import WRITES, lift
from graphs.stack import owners, stacked

#: layers of a stack that are traced: the second reads what a layer gave, as all behind it do
TRACED = 2


@dataclass(frozen=True)
class Stack:
    """Layers that are alike, each with the entries of its state dict."""

    layers: nn.ModuleList
    held: dict[str, nn.Module]

    @property
    def left_out(self) -> list[str]:
        """The names of the layers that are not traced."""
        return list(self.held)[TRACED:]


def stacks(root: nn.Module) -> list[Stack]:
    """The stacks of `root` of which layers can be left out."""
    found = []
    for module in root.modules():
        repeated: Callable[[], nn.ModuleList | None] | None = getattr(module, "repeated", None)
        layers = repeated() if repeated is not None else None
        if layers is not None and len(layers) > TRACED + 1 and len({shape(layer) for layer in layers}) == 1:
            found.append(Stack(layers, dict(layers.named_children())))
    return found


def shape(layer: nn.Module) -> str:
    """What a layer is made of: modules, and names and shapes of what they hold."""
    return f"{layer!r} {[(name, tuple(t.shape)) for name, t in layer.state_dict(keep_vars=True).items()]}"


@contextmanager
def shortened(found: list[Stack]) -> Iterator[None]:
    """The stacks without the layers that are not traced; all layers keep their names."""
    for stack in found:
        for name in stack.left_out:
            del stack.layers._modules[name]
    try:
        yield
    finally:
        for stack in found:
            stack.layers._modules.clear()
            stack.layers._modules.update(stack.held)


def grown(exported: ExportedProgram, root: nn.Module, found: list[Stack]) -> ExportedProgram | None:
    """`exported`, of `root` traced inside `shortened(found)`, with all layers; None where a layer is more than that.

    `root` is whole again. Stacks that `root` does not hold are none of its concern.
    """
    places = {id(module): name for name, module in root.named_modules()}
    mine = [(places[id(stack.layers)], stack) for stack in found if id(stack.layers) in places]
    if not mine:
        return exported
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for place, stack in mine:
        if not grow(module, place, stack):
            return None
    return lift(exported, module)


def grow(module: fx.GraphModule, place: str, stack: Stack) -> bool:
    """Put copies of the stack's second layer behind it; whether it could be: it alone reads what the first one gave."""
    graph = module.graph
    before, template = (f"{place}.{name}" for name in list(stack.held)[TRACED - 2 : TRACED])
    layers = {layer.path: layer for layer in stacked(graph)}
    owner = owners(graph)
    if not {before, template} <= layers.keys() or layers[template].given is not layers[before].made:
        return False
    if any(owner.get(user) != template for user in layers[before].made.users):
        return False
    layer = layers[template]
    nodes = [node for node in graph.nodes if owner.get(node) == template]
    writes = [node for node in graph.nodes if node.target is WRITES and owner.get(node.args[1]) == template]
    read = dict.fromkeys(n for node in (*nodes, *writes) for n in node.all_input_nodes if n.op == "get_attr")
    weights = [node for node in read if str(node.target).startswith(f"{template}.")]
    users = [user for user in layer.made.users if user not in nodes and user not in writes]
    behind, last = nodes[-1].next, layer.made
    container = module.get_submodule(place)
    for name in stack.left_out:
        container.add_module(name, stack.held[name])
        copies: dict[fx.Node, fx.Node] = {layer.given: last}
        with graph.inserting_before(behind):
            for node in (*weights, *nodes):
                copies[node] = copied(graph, node, copies, template, f"{place}.{name}")
        with graph.inserting_before(graph.output_node()):
            for node in writes:
                copied(graph, node, copies, template, f"{place}.{name}")
        last = copies[layer.made]
    for user in users:
        user.replace_input_with(layer.made, last)
    return True


def copied(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], old: str, new: str) -> fx.Node:
    """A node of the layer `old` as one of the layer `new`."""
    made = graph.node_copy(node, lambda read: copies.get(read, read))
    made.meta = dict(node.meta)
    if node.op == "get_attr":
        made.target = new + str(node.target).removeprefix(old)
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    if stack:
        made.meta["nn_module_stack"] = {key: (moved(path, old, new), kind) for key, (path, kind) in stack.items()}
    return made


def moved(path: str, old: str, new: str) -> str:
    """A module's path in another layer."""
    return new + path.removeprefix(old) if path == old or path.startswith(f"{old}.") else path
