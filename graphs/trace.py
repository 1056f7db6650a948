"""Architecture and weights to a `Program`, built and traced on fake tensors: size costs neither memory nor time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim as ExportDim
from torch.export import ExportedProgram

from graphs.program import Program, Signature, TracedMethod
from graphs.repeat import grown, shortened, stacks
from graphs.spec import Architecture, Method, TensorSpec


def build_fake(architecture: Architecture, mode: FakeTensorMode | None = None) -> nn.Module:
    """The root module of `architecture` on fake float32 tensors, in eval mode, without gradients."""
    with mode or FakeTensorMode(allow_non_fake_inputs=True):
        return architecture.build().eval().requires_grad_(False)


def count_parameters(architecture: Architecture) -> int:
    """Parameters of the published checkpoint: those of the graph, and those it carries but the graph does not use.

    A tensor that two parameters read (tied embeddings) counts once.
    """
    parameters = build_fake(architecture).named_parameters()
    sizes = {architecture.source(name): parameter.numel() for name, parameter in parameters}
    return sum(sizes.values()) + architecture.unused_parameters()


def tables(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that follow from the configuration (rotary tables, pixel statistics), recomputed on real tensors."""
    for prefix, module in root.named_modules():
        compute: Callable[[], Mapping[str, Tensor]] | None = getattr(module, "tables", None)
        if compute is not None:
            for name, table in compute().items():
                yield f"{prefix}.{name}" if prefix else name, table


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's cyclic garbage collector: a deep graph makes it walk millions of live objects again and again.

    It takes a quarter off the time of a trace, and leaves some tens of megabytes longer.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def trace_module(module: nn.Module, inputs: tuple[TensorSpec, ...], mode: FakeTensorMode) -> ExportedProgram:
    """Trace a module over fake tensors of `inputs`, their dynamic dimensions kept.

    The result is functional: state is read and written through the signature's buffer mutations, composite operators
    (linear, attention, layer norm) stay whole.
    """
    method = Method("traced", module, inputs, ())
    dims = {name: ExportDim(name, min=dim.min, max=dim.max) for name, dim in method.dims.items()}
    dynamic = tuple(
        {axis: dims[size.name] for axis, size in enumerate(spec.shape) if not isinstance(size, int)} for spec in inputs
    )
    example = next(method.examples(lengths=(7,)))
    with mode, torch.no_grad(), uncollected():
        fake = tuple(mode.from_tensor(tensor) for tensor in example)
        exported = torch.export.export(module, fake, dynamic_shapes=dynamic, strict=False)
        exported = exported.run_decompositions({})
    drop_nothings(exported)
    return exported


def drop_nothings(exported: ExportedProgram) -> None:
    """Remove what computes nothing and targets lack: dtype assertions behind casts, and aliases, as whole slices are.

    An alias that leaves the graph stays.
    """
    graph = exported.graph_module.graph
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        if all(user.op == "call_function" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    exported.graph_module.recompile()


def trace(architecture: Architecture, weights: Mapping[str, Tensor]) -> Program:
    """Trace every method of `architecture`; `weights` gives each parameter of its root module by name, on demand."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    root = build_fake(architecture, mode)
    constants = dict(tables(root))
    where = {id(tensor): name for name, tensor in [*root.named_parameters(), *root.named_buffers()]}
    methods = {}
    found = stacks(root)
    for method in architecture.methods(root):
        with shortened(found):
            short = trace_module(method.module, method.inputs, mode)
        exported = grown(short, method.module, found) or trace_module(method.module, method.inputs, mode)
        names = {fqn: where[id(t)] for fqn, t in method.module.state_dict(keep_vars=True).items()}
        methods[method.name] = TracedMethod(Signature.of(method), exported, names)
    return Program(methods, weights, constants)
