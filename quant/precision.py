"""A pass that keeps a program's floating point numbers in another dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphs.lift import WRITES, forget, infer, lift, mode_of
from graphs.program import Program, TracedMethod
from graphs.spec import TensorSpec
from graphs.trace import trace_module


@dataclass(frozen=True)
class CastFloats:
    """Weights, activations and state in `dtype`; inputs are cast on entry and outputs on leaving, so signatures stay.

    Of a quantized program, scales and palettes are cast; integers and float8 numbers, state among them, stay what they
    are. Every operator is run again on fake tensors, so that it is valid for its new operands.
    """

    dtype: torch.dtype

    def run(self, program: Program) -> Program:
        for name, traced in program.methods.items():
            program = program.replace(name, self.cast(traced))
        return program

    def cast(self, traced: TracedMethod) -> TracedMethod:
        state = tuple(
            replace(spec, dtype=self.dtype) if spec.dtype == torch.float32 else spec for spec in traced.signature.state
        )
        return replace(
            traced,
            signature=replace(traced.signature, state=state),
            exported=recast(traced.exported, traced.signature.inputs, self.dtype),
        )


def recast(exported: ExportedProgram, inputs: tuple[TensorSpec, ...], dtype: torch.dtype) -> ExportedProgram:
    """`exported` (on fake tensors) with float32 replaced by `dtype` inside; traced anew only where it has to be."""
    mode = mode_of(exported)
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    with mode:
        cast_tensors(module, dtype)
    casts = cast_nodes(module.graph, dtype)
    forget(module.graph)
    infer(module)
    drop_idle(casts)
    module.recompile()
    written = (node.args for node in module.graph.find_nodes(op="call_function", target=WRITES))
    alike = all(state.meta["val"].dtype == value.meta["val"].dtype for state, value in written)
    return (lift(exported, module) if alike else None) or trace_module(module, inputs, mode)


def drop_idle(casts: Sequence[fx.Node]) -> None:
    """Erase those of the casts that turned out to change nothing."""
    for cast in casts:
        read = cast.all_input_nodes[0]
        if read.meta["val"].dtype == cast.meta["val"].dtype:
            cast.replace_all_uses_with(read)
            cast.graph.erase_node(cast)


def cast_tensors(module: nn.Module, dtype: torch.dtype, source: torch.dtype = torch.float32) -> None:
    """Exchange every parameter and buffer of `module` that is of the dtype `source` for one of `dtype`."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.dtype == source:
                setattr(owner, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.dtype == source:
                setattr(owner, name, buffer.to(dtype))


def is_float32(node: object) -> bool:
    """Whether a node's value is a float32 tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def cast_to(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """`node` in `dtype`, inserted where `graph` stands; it belongs to the module that `node` belongs to."""
    cast = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": dtype})
    cast.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
    return cast


def insert_cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Have all users of `node` read it in `dtype`."""
    with graph.inserting_after(node):
        cast = cast_to(graph, node, dtype)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    return cast


def cast_nodes(graph: fx.Graph, dtype: torch.dtype) -> list[fx.Node]:
    """Casts behind float inputs and before float outputs, which it gives; operators that name float32 name `dtype`.

    An operator that makes floats of other things without naming their dtype (a mask from comparisons) is cast, too.
    """
    casts = []
    for node in list(graph.nodes):
        if node.op == "placeholder" and is_float32(node):
            casts.append(insert_cast(graph, node, dtype))
        elif node.op == "call_function":
            named = torch.float32 in [*node.args, *node.kwargs.values()]
            node.args = tuple(dtype if arg is torch.float32 else arg for arg in node.args)
            node.kwargs = {key: dtype if arg is torch.float32 else arg for key, arg in node.kwargs.items()}
            if is_float32(node) and not named and not any(map(is_float, node.all_input_nodes)):
                casts.append(insert_cast(graph, node, dtype))
    output = graph.output_node()
    with graph.inserting_before(output):
        again = {n: cast_to(graph, value_of(n), torch.float32) for n in output.all_input_nodes if is_float(value_of(n))}
    output.args = fx.map_arg(output.args, lambda n: again.get(n, n))
    return [*casts, *again.values()]


def value_of(node: fx.Node) -> fx.Node:
    """What an output gives: of a write of state, what is written."""
    written = node.args[1] if node.target is WRITES else node
    assert isinstance(written, fx.Node)
    return written


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a float tensor, or not known to be one tensor (a cast that was just inserted)."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()
