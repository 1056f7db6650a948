"""A traced method opened for change: modules and buffers added to its graph, then traced anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from graphs.errors import UserError
from graphs.lift import lift, mode_of
from graphs.program import Constant, Program
from graphs.spec import Dim, TensorSpec
from graphs.trace import trace_module


def acts(node: fx.Node) -> bool:
    """Whether a node must stay though nothing reads it. Attention, which may drop at random, need not: not here."""
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return node.is_impure() and torch.Tag.nondeterministic_seeded not in tags


@dataclass(frozen=True)
class Opened:
    """A program whose `method` lies open as `module`, a copy with weights as attributes.

    `constants` are the values of entries added by `constant`, `names` what the program calls some of them.
    """

    program: Program
    method: str
    module: fx.GraphModule
    mode: FakeTensorMode
    constants: dict[str, Constant] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, program: Program, method: str) -> Self:
        """Raises UserError where the program has no such method."""
        if method not in program.methods:
            raise UserError(f"the model has no place for this: no method '{method}', only {', '.join(program)}")
        exported = program.methods[method].exported
        module = exported.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        return cls(program, method, module, mode_of(exported))

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def attach(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """Add `module`, which is on real tensors, as the child `name`; its weights and buffers, by their entries."""
        values = {f"{name}.{entry}": tensor.detach().clone() for entry, tensor in module.state_dict().items()}
        with self.mode:
            for owner in module.modules():
                for entry, parameter in list(owner.named_parameters(recurse=False)):
                    fake = self.mode.from_tensor(parameter.detach())
                    setattr(owner, entry, nn.Parameter(fake, requires_grad=False))
                for entry, buffer in list(owner.named_buffers(recurse=False)):
                    setattr(owner, entry, self.mode.from_tensor(buffer))
        self.module.add_module(name, module)
        return values

    def buffer(self, entry: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        """A node that reads a new buffer `entry`; insert it in order. `retrace` takes its value, unless it is state."""
        *parts, last = entry.split(".")
        owner: nn.Module = self.module
        for part in parts:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        with self.mode:
            owner.register_buffer(last, torch.empty(shape, dtype=dtype))
        return self.graph.get_attr(entry)

    def constant(
        self, entry: str, value: Constant, shape: tuple[int, ...], dtype: torch.dtype, name: str | None = None
    ) -> fx.Node:
        """A node that reads a new buffer of that value; `name` is what the program calls it, as in `retrace`."""
        self.constants[entry] = value
        if name is not None:
            self.names[entry] = name
        return self.buffer(entry, shape, dtype)

    def drop_unread(self) -> None:
        """Remove weights that no node reads any more, so that the program asks for them no more."""
        self.graph.eliminate_dead_code(acts)
        read = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        for prefix, owner in self.module.named_modules():
            for table in (owner._parameters, owner._buffers):
                for name in [name for name in table if (f"{prefix}.{name}" if prefix else name) not in read]:
                    del table[name]

    def reshape(self, entry: str, shape: Sequence[int]) -> None:
        """Give the weight or state `entry` another shape; `retrace` takes its new value, or its new spec."""
        path, _, last = entry.rpartition(".")
        owner = self.module.get_submodule(path)
        held = getattr(owner, last)
        with self.mode:
            fake = torch.empty(tuple(shape), dtype=held.dtype)
        setattr(owner, last, nn.Parameter(fake, requires_grad=False) if isinstance(held, nn.Parameter) else fake)

    def retrace(
        self,
        constants: Mapping[str, Constant] | None = None,
        inputs: tuple[TensorSpec, ...] | None = None,
        state: tuple[TensorSpec, ...] = (),
    ) -> Program:
        """The program with the changed graph traced anew, its outputs declared as they are now.

        `constants`: the values of more new entries; the program calls those without a name of their own METHOD.ENTRY,
        and equal names are one constant. `inputs`: those that the method takes from now on, where they change. `state`:
        what it keeps besides what it kept, or in another shape; state that the graph no longer writes is dropped.
        """
        self.graph.eliminate_dead_code(acts)
        self.module.recompile()
        self.module._forward_pre_hooks.clear()  # they check for the sizes of inputs as they were
        taken = inputs or self.inputs
        return self.with_exported(trace_module(self.module, taken, self.mode), taken, state, constants)

    def lift(
        self, constants: Mapping[str, Constant] | None = None, inputs: tuple[TensorSpec, ...] | None = None
    ) -> Program:
        """As `retrace`, but not traced anew where only operators that stay whole were put in.

        Nodes keep the values that they have: where one changed in shape or dtype, `graphs.lift.forget` them first.
        Inputs of other shapes, or new state, need `retrace`.
        """
        self.graph.eliminate_dead_code(acts)
        exported = lift(self.program.methods[self.method].exported, self.module)
        if exported is None:
            return self.retrace(constants, inputs)
        return self.with_exported(exported, inputs or self.inputs, (), constants)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the method takes so far."""
        return self.program.methods[self.method].signature.inputs

    def with_exported(
        self,
        exported: ExportedProgram,
        inputs: tuple[TensorSpec, ...],
        state: tuple[TensorSpec, ...],
        constants: Mapping[str, Constant] | None,
    ) -> Program:
        """The program with `exported` as the method; see `retrace`."""
        traced = self.program.methods[self.method]
        signature = replace(traced.signature, inputs=inputs)
        written = set(exported.graph_signature.buffers_to_mutate.values())
        every_state = {spec.name: spec for spec in (*signature.state, *state)}
        states = tuple(spec for spec in every_state.values() if spec.name in written)
        users = exported.graph_signature.user_outputs
        leaving = {node.name: node.meta["val"].shape for node in exported.graph.output_node().all_input_nodes}
        outputs = tuple(
            replace(spec, shape=resized(spec.shape, leaving[str(name)]))
            for spec, name in zip(signature.outputs, users, strict=True)
        )
        kept = set(exported.state_dict) - {spec.name for spec in states}
        values = {**self.constants, **(constants or {})}
        called = {entry: self.names.get(entry, f"{self.method}.{entry}") for entry in values if entry in kept}
        every = {**traced.weight_names, **called}
        return self.program.replace(
            self.method,
            replace(
                traced,
                signature=replace(signature, outputs=outputs, state=states),
                exported=exported,
                weight_names={entry: every[entry] for entry in kept},
            ),
            {name: values[entry] for entry, name in called.items()},
        )


def resized(declared: tuple[int | Dim, ...], found: Sequence[Any]) -> tuple[int | Dim, ...]:
    """The shape `found`; where it is dynamic, as declared before. No symbol is asked for a value: that would fix it."""
    if all(isinstance(size, int) for size in found):
        return tuple(found)
    if len(declared) != len(found):
        return declared
    return tuple(new if isinstance(new, int) else old for old, new in zip(declared, found, strict=True))
