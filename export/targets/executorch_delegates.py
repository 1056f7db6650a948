"""XNNPACK's part of lowering, once for all delegates that are alike, and weights read when each is written.

ExecuTorch hands XNNPACK every delegate with its weights and runs seventeen passes over it; a decoder of 24 layers has
100 delegates of six kinds, so nearly all of that is work done again, on weights that all lie in memory. Here graphs are
lowered over `hollow` weights, the passes run for the first delegate of each kind, and the others are written from its
graph with weights of their own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from export.memory import trim
from graphs.program import Program

#: bytes from which a weight is hollow; passes may look at smaller ones, such as scales and constants
HOLLOW_BYTES = 1 << 16


def hollow(program: Program, method: str) -> ExportedProgram:
    """A method as `Program.exported` gives it, its large weights memory that nobody has written: it takes none.

    They are of the right shape and dtype and hold anything; copying them gives themselves.
    """

    def value(entry: str, fake: Tensor) -> Tensor:
        if is_hollow(program, method, entry):
            return torch.empty(fake.shape, dtype=fake.dtype)
        return compact(program.tensor(method, entry))

    exported = Functional.of(program.exported(method, value))
    for tensor in exported.state_dict.values():
        shared(tensor)
    return exported


class Functional(ExportedProgram):
    """A program that has been decomposed: that with an empty table, which makes a graph functional, changes nothing."""

    @classmethod
    def of(cls, exported: ExportedProgram) -> ExportedProgram:
        """`exported`, which is a copy of the caller's own, said to be such."""
        exported.__class__ = cls
        return exported

    def run_decompositions(self, decomp_table: Any = None, decompose_custom_triton_ops: bool = False) -> Any:
        """Of `ExportedProgram`."""
        empty = type(decomp_table) is dict and not decomp_table  # torch's own tables are dicts that fill themselves
        return self if empty else super().run_decompositions(decomp_table, decompose_custom_triton_ops)


def is_hollow(program: Program, method: str, entry: str) -> bool:
    """Whether an entry of a method is a weight large enough."""
    traced = program.methods[method]
    fake = traced.exported.state_dict.get(entry)
    if fake is None or entry in {spec.name for spec in traced.signature.state}:
        return False
    return math.prod(fake.shape) * fake.element_size() >= HOLLOW_BYTES


def compact(tensor: Tensor) -> Tensor:
    """`tensor` in memory of its own: XNNPACK writes all that a tensor's storage holds, whatever part of it is meant."""
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def shared(tensor: Tensor) -> Tensor:
    """`tensor`, whose copies are itself from now on: nothing writes to weights, and copies of caches are memory."""
    tensor.__deepcopy__ = Itself(tensor)  # type: ignore[method-assign]
    return tensor


@dataclass(frozen=True)
class Itself:
    """What a tensor's copy is: the tensor."""

    tensor: Tensor

    def __call__(self, memo: object) -> Tensor:
        return self.tensor

    def __deepcopy__(self, memo: object) -> Itself:
        return self


def fill(exported: ExportedProgram, program: Program, method: str) -> None:
    """Give what is still hollow in a lowered method, since no delegate reads it, its weights, in place."""
    for entry, tensor in exported.state_dict.items():
        if is_hollow(program, method, entry):
            value = compact(program.tensor(method, entry))
            held = nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value
            exported.state_dict[entry] = shared(held)


def structure(exported: ExportedProgram) -> str:
    """What is equal for graphs that compute the same of their inputs and weights: nodes, shapes, kinds of inputs."""
    kinds = {spec.arg.name: spec.kind.name for spec in exported.graph_signature.input_specs}
    numbers: dict[Node, str] = {}
    rows = []
    for node in exported.graph.nodes:
        numbers[node] = f"%{len(numbers)}"
        arguments = map_arg((node.args, node.kwargs), numbers.__getitem__)
        values = pytree.tree_map(described, node.meta.get("val"))
        what = str(node.target) if node.op == "call_function" else kinds.get(node.name, node.op)
        rows.append(f"{what} {arguments} {values}")
    return "\n".join(rows)


def described(value: Any) -> Any:
    """A tensor's shape, strides and dtype."""
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def weights(exported: ExportedProgram) -> list[tuple[str, Tensor]]:
    """Name and value of every weight, buffer and constant that a delegate reads, in the order of its inputs."""
    specs = exported.graph_signature.input_specs
    values = {**exported.constants, **exported.state_dict}
    return [(spec.target, values[spec.target]) for spec in specs if spec.target is not None]


@dataclass(frozen=True)
class Prepared:
    """A delegate after XNNPACK's passes; `names` of its weights, in the order of `weights`."""

    exported: ExportedProgram
    names: tuple[str, ...]


class Delegates:
    """Stands in for XNNPACK's passes, and for how it reads weights, while `program` is lowered.

    `whole` has the layers that `program` was left without. `prepared` holds what passes made of the delegates of other
    programs, by structure, and takes what they make of these; None: they computed weights.
    """

    def __init__(self, program: Program, whole: Program, prepared: dict[str, Prepared | None]) -> None:
        self.program = program
        self.whole = whole
        self.method = ""
        self.rename: Callable[[str], str] = str
        self.prepared = prepared
        self.current: Mapping[str, Callable[[], Tensor]] = {}
        self.written: list[Any] = []

    def preprocess(self, delegate: ExportedProgram, specs: list[Any]) -> Any:
        """`XnnpackBackend.preprocess`; what it gives holds the bytes of weights."""
        from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend

        done = XnnpackBackend.preprocess(delegate, specs)
        self.written.append(done.data_store_output)
        trim()  # a delegate's temporaries are freed between bytes that stay
        return done

    def forget(self) -> None:
        """Let go of all weights: lowered graphs live on as keys in a cache of torch, and as what a logger saw last."""
        for output in self.written:
            output.buffers.clear()

    def each(self, programs: Mapping[str, list[ExportedProgram]], specs: Mapping[str, list[Any]]) -> dict[str, Any]:
        """`XnnpackBackend.preprocess_multimethod`."""
        results: dict[str, list[Any]] = {}
        for method, delegates in programs.items():
            self.method = method
            pairs = zip(delegates, specs[method], strict=True)
            results[method] = [self.preprocess(delegate, spec) for delegate, spec in pairs]
        return results

    def again(self, method: str, lowered: Any, rename: Callable[[str], str]) -> Any:
        """A lowered module with other weights, of the names that `rename` gives; None where passes computed some."""
        from executorch.exir.lowered_backend_module import LoweredBackendModule

        delegate = lowered.original_module
        if self.prepared.get(self.kind(method, delegate)) is None:
            return None
        self.method, self.rename = method, rename
        try:
            done = self.preprocess(delegate, lowered.compile_specs)
        finally:
            self.rename = str
        made = LoweredBackendModule(
            edge_program=delegate,
            backend_id=lowered.backend_id,
            processed_bytes=done.processed_bytes,
            compile_specs=lowered.compile_specs,
            named_data_store_output=done.data_store_output,
        )
        made.meta = dict(lowered.meta)
        return made

    @staticmethod
    def kind(method: str, delegate: ExportedProgram) -> str:
        """The same for delegates of a method that are alike."""
        return f"{method} {structure(delegate)}"

    def transformed(self, delegate: ExportedProgram, passes: Any) -> ExportedProgram:
        """`delegate` after XNNPACK's passes, or one that is alike; its weights are read from now on."""
        from executorch.backends.xnnpack._passes import XNNPACKPassManager

        kind = self.kind(self.method, delegate)
        mine = weights(delegate)
        if kind not in self.prepared:
            kept = copy.deepcopy(delegate)
            done = XNNPACKPassManager(delegate, passes).transform()
            given = {name: id(value) for name, value in mine}
            same = all(given.get(name) == id(value) for name, value in weights(done))
            self.prepared[kind] = Prepared(done, tuple(name for name, _ in mine)) if same else None
            delegate = kept
        alike = self.prepared[kind]
        if alike is None:
            self.current = {}
            for name, value in mine:
                if name in delegate.state_dict:
                    delegate.state_dict[name] = self.value(name, value)
            return XNNPACKPassManager(delegate, passes).transform()
        self.current = {
            name: lambda entry=entry, value=value: self.value(entry, value)  # type: ignore[misc]
            for name, (entry, value) in zip(alike.names, mine, strict=True)
        }
        return alike.exported

    def value(self, entry: str, given: Tensor) -> Tensor:
        """A weight of the program; what is none is a constant of the delegate, as it was given."""
        name = self.rename(entry)
        for program in (self.program, self.whole):
            if name in program.methods[self.method].exported.state_dict:
                return compact(program.tensor(self.method, name))
        return given

    @contextmanager
    def used(self) -> Iterator[None]:
        """While this lasts, XNNPACK's backend asks here."""
        from executorch.backends.xnnpack import xnnpack_preprocess
        from executorch.backends.xnnpack.operators import node_visitor, op_quant_dequant, quant_params
        from executorch.backends.xnnpack.utils.utils import get_param_tensor, get_tensor_name

        delegates = self

        class Passes:
            """`XNNPACKPassManager`."""

            def __init__(self, exported: ExportedProgram, passes: Any = None) -> None:
                self.exported, self.passes = exported, passes

            def transform(self) -> ExportedProgram:
                return delegates.transformed(self.exported, self.passes)

        def read(exported: ExportedProgram, node: Node | None) -> Tensor | None:
            """`get_param_tensor`."""
            value = None if node is None else delegates.current.get(get_tensor_name(exported, node))
            return value() if value is not None else get_param_tensor(exported, node)

        with ExitStack() as stack:
            stack.enter_context(patch.object(xnnpack_preprocess, "XNNPACKPassManager", Passes))
            stack.enter_context(
                patch.object(xnnpack_preprocess.XnnpackBackend, "preprocess_multimethod", staticmethod(self.each))
            )
            for module in (node_visitor, op_quant_dequant, quant_params):
                stack.enter_context(patch.object(module, "get_param_tensor", read))
            yield
