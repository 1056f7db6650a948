"""A pass that keeps a program's floating point numbers in another dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

from graphs.program import Program, TracedMethod
from graphs.spec import TensorSpec
from graphs.trace import trace_module


@dataclass(frozen=True)
class CastFloats:
    """Weights, activations and state in `dtype`; inputs are cast on entry and outputs on leaving, so signatures stay.

    Of a quantized program, scales and palettes are cast; integers and float8 numbers, state among them, stay what they
    are. The graph is traced anew, so that every operator is valid for its new operands.
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
            exported=retrace(traced.exported, traced.signature.inputs, self.dtype),
        )


def retrace(exported: ExportedProgram, inputs: tuple[TensorSpec, ...], dtype: torch.dtype) -> ExportedProgram:
    """`exported` (on fake tensors) with float32 replaced by `dtype` inside."""
    mode = next(t.fake_mode for t in exported.state_dict.values() if isinstance(t, FakeTensor))
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    with mode:
        cast_tensors(module, dtype)
    cast_nodes(module.graph, dtype)
    module.recompile()
    return trace_module(module, inputs, mode)


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


def insert_cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Have all users of `node` read it in `dtype`."""
    with graph.inserting_after(node):
        cast = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


def cast_nodes(graph: fx.Graph, dtype: torch.dtype) -> None:
    """Casts behind float inputs and before float outputs; operators that name float32 name `dtype` instead.

    An operator that makes floats of other things without naming their dtype (a mask from comparisons) is cast, too.
    """
    for node in list(graph.nodes):
        if node.op == "placeholder" and is_float32(node):
            insert_cast(graph, node, dtype)
        elif node.op == "call_function":
            named = torch.float32 in [*node.args, *node.kwargs.values()]
            node.args = tuple(dtype if arg is torch.float32 else arg for arg in node.args)
            node.kwargs = {key: dtype if arg is torch.float32 else arg for key, arg in node.kwargs.items()}
            if is_float32(node) and not named and not any(map(is_float, node.all_input_nodes)):
                insert_cast(graph, node, dtype)
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = fx.map_arg(output.args, lambda arg: float_again(graph, arg))


def float_again(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """An output in float32, as its signature says; integers as they are."""
    return graph.call_function(torch.ops.aten.to.dtype, (node, torch.float32)) if is_float(node) else node


def is_float(node: fx.Node) -> bool:
    """Whether a node's value is a float tensor, or not known to be one tensor (a cast that was just inserted)."""
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()
