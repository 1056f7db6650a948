"""An opened graph as an ExportedProgram again without tracing it: for changes in operators that need no decomposition.

Tracing runs every operator several times through torch's dispatcher; where a few were added to thousands, only their
values are missing. What an ExportedProgram is made of is said in https://docs.pytorch.org/docs/stable/export/ir_spec.html
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils._pytree import tree_leaves, tree_structure

#: what writes state at the end of an opened graph
WRITES = torch.ops.aten.copy_.default

#: prefixes of placeholders, in the order in which a graph takes them
PREFIXES = {InputKind.PARAMETER: "p_", InputKind.BUFFER: "b_", InputKind.CONSTANT_TENSOR: "c_"}


def copied(exported: ExportedProgram) -> tuple[fx.GraphModule, ExportGraphSignature]:
    """A copy of the graph, and the signature by the names that nodes have there: fx renames some, as `input`."""
    graph, signature = copy.deepcopy(exported.graph_module.graph), copy.deepcopy(exported.graph_signature)
    nodes = zip(exported.graph_module.graph.nodes, graph.nodes, strict=True)
    names = {old.name: new.name for old, new in nodes}
    for spec in (*signature.input_specs, *signature.output_specs):
        if isinstance(spec.arg, TensorArgument):
            spec.arg.name = names[spec.arg.name]
    return fx.GraphModule(exported.graph_module, graph), signature


def rebuilt(
    exported: ExportedProgram,
    module: fx.GraphModule,
    signature: ExportGraphSignature,
    state_dict: Mapping[str, Tensor],
    made: type[ExportedProgram] = ExportedProgram,
) -> ExportedProgram:
    """`exported` around another graph, signature and state dict; where it takes or gives more, it gives a tuple."""
    values: Mapping[str, Any] = {n.name: n.meta["val"] for n in module.graph.find_nodes(op="placeholder")}
    examples = tuple(values[name] for name in signature.user_inputs if isinstance(name, str))
    calls = copy.deepcopy(exported.module_call_graph[:1])
    root = calls[0].signature
    old = exported.graph_signature
    taken = len(old.user_inputs), len(old.user_outputs)
    if root is not None and taken != (len(signature.user_inputs), len(signature.user_outputs)):
        root.in_spec = tree_structure((examples, {}))
        root.out_spec = tree_structure((0,) * len(signature.user_outputs))
        root.inputs, root.outputs, root.forward_arg_names = [], [], [str(name) for name in signature.user_inputs]
    return made(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=dict(state_dict),
        range_constraints=exported.range_constraints,
        module_call_graph=calls,
        example_inputs=(examples, {}),
        constants=exported.constants,
        verifiers=[exported.verifier],
    )


def as_traced(node: fx.Node, known: frozenset[Any]) -> bool:
    """Whether tracing would leave a node as it is: a pure operator that is known or not composite."""
    if node.op != "call_function":
        return node.op in ("get_attr", "placeholder", "output")
    if node.target in known or node.target in (WRITES, operator.getitem):
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")


def mode_of(exported: ExportedProgram) -> FakeTensorMode:
    """The fake mode of a program's weights, or of its values where it has none."""
    return first_mode(chain(exported.state_dict.values(), (node.meta.get("val") for node in exported.graph.nodes)))


def first_mode(values: Iterable[object]) -> FakeTensorMode:
    """The fake mode of the first value that has one."""
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def forget(graph: fx.Graph) -> None:
    """Drop the values of all that is not an input, for `infer` to find anew: a change made others of some."""
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr"):
            node.meta.pop("val", None)


def infer(module: fx.GraphModule) -> None:
    """Give nodes that have none a fake value, in the fake mode of those that have one."""
    mode = first_mode(node.meta.get("val") for node in module.graph.nodes)
    # as in tracing: composite operators, such as `pad`, would else read symbolic sizes as the numbers of an example
    with mode, torch.no_grad(), enable_python_dispatcher():
        for node in module.graph.nodes:
            if "val" in node.meta or node.op == "output" or node.target is WRITES:
                continue
            if node.op == "get_attr":
                held = _attribute(module, str(node.target))
                assert isinstance(held, Tensor)
                node.meta["val"] = torch.empty(held.shape, dtype=held.dtype)
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)


def place(graph: fx.Graph) -> None:
    """Say of nodes that do not come from a module that they come from where they are first read."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.meta.get("nn_module_stack"):
            stacks = (user.meta.get("nn_module_stack") for user in node.users)
            node.meta["nn_module_stack"] = next((stack for stack in stacks if stack), {})


def lift(exported: ExportedProgram, module: fx.GraphModule) -> ExportedProgram | None:
    """`module`, a changed copy of `exported.module()`, as an ExportedProgram; None where it has to be traced.

    Nodes without a value are new, or were made to `forget` it: a change may not alter the value (shape, dtype) of one
    that has it.
    """
    old = exported.graph_signature
    known = frozenset(node.target for node in exported.graph.nodes if node.op == "call_function")
    if not all(as_traced(node, known) for node in module.graph.nodes):
        return None
    kinds = {str(spec.target): spec for spec in old.input_specs if spec.target is not None}
    read = dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr"))
    held = {target: value for target in read if isinstance(value := _attribute(module, target), Tensor)}
    if len(held) < len(read):
        return None
    infer(module)
    place(module.graph)
    values = {str(node.target): node.meta["val"] for node in module.graph.find_nodes(op="get_attr")}

    graph = fx.Graph()
    inputs: list[InputSpec] = []
    made: dict[fx.Node, fx.Node] = {}
    placed: dict[str, fx.Node] = {}
    for kind, prefix in PREFIXES.items():
        for target, value in held.items():
            spec = kinds.get(target)
            own = spec.kind if spec else InputKind.PARAMETER if isinstance(value, nn.Parameter) else InputKind.BUFFER
            if own is kind:
                placed[target] = node = graph.placeholder(prefix + target.replace(".", "_"))
                node.meta["val"] = values[target]
                persistent = (spec.persistent if spec else True) if kind is InputKind.BUFFER else None
                inputs.append(InputSpec(kind, TensorArgument(node.name), target, persistent))
    written: dict[str, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            made[node] = placed[str(node.target)]
        elif node.target is WRITES:
            written[str(node.args[0].target)] = made[node.args[1]]
        elif node.op == "output":
            leaving = [made[n.args[1] if n.target is WRITES else n] for n in tree_leaves(node.args)]
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
            if node.op == "placeholder":
                inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(made[node].name), None))
    graph.output((*written.values(), *leaving))
    outputs = [OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(n.name), t) for t, n in written.items()]
    outputs += [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in leaving]
    state = {
        spec.target: held[spec.target] for spec in inputs if spec.target and spec.kind is not InputKind.CONSTANT_TENSOR
    }
    return rebuilt(exported, fx.GraphModule({}, graph), ExportGraphSignature(inputs, outputs), state)


def _attribute(module: nn.Module, target: str) -> object:
    owner, _, last = target.rpartition(".")
    return getattr(module.get_submodule(owner), last, None)
