"""The one intermediate representation: an `ExportedProgram` a method, traced on fake tensors, and its weights by name.

Weights stay where they are (a memory-mapped checkpoint, a generator of random ones) until someone asks for them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from graphs.spec import Method, TensorSpec
from graphs.weights import NamedWeights

#: a tensor, or what computes it each time it is asked for, so that memory holds one at a time
Constant = Tensor | Callable[[], Tensor]


def zeros(like: Tensor) -> Tensor:
    """Zeros of a fake tensor's shape and dtype, which take memory where they are written: torch writes its own."""
    count = math.prod(like.shape) * like.element_size()
    return torch.from_numpy(np.zeros(count, np.uint8)).view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class Signature:
    """What a method takes, gives and keeps, without the module that computes it."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[TensorSpec, ...] = ()

    @classmethod
    def of(cls, method: Method) -> Signature:
        return cls(method.inputs, method.outputs, method.state)

    def method(self, name: str, module: nn.Module | None = None) -> Method:
        """The method with this signature; `module` may be left out where only specs and examples are wanted."""
        return Method(name, module or nn.Identity(), self.inputs, self.outputs, self.state)


@dataclass(frozen=True)
class TracedMethod:
    """A traced graph, its signature, and for every entry of the graph's state dict the name of the weight it reads.

    Entries that `signature.state` lists have no weight: they begin as zeros.
    """

    signature: Signature
    exported: ExportedProgram
    weight_names: Mapping[str, str]


@dataclass(frozen=True)
class Program:
    """Methods by name, weights by name, and `constants`: tensors computed from the configuration or by a pass, or how.

    `exported(name)` gives an ExportedProgram that runs; `methods[name].exported` holds shapes and dtypes only.
    """

    methods: Mapping[str, TracedMethod]
    weights: Mapping[str, Tensor]
    constants: Mapping[str, Constant]

    def __iter__(self) -> Iterator[str]:
        return iter(self.methods)

    def tensor(self, method: str, entry: str) -> Tensor:
        """The value of one entry of a method's state dict, in the dtype that the graph expects."""
        traced = self.methods[method]
        fake = traced.exported.state_dict[entry]
        if entry in {spec.name for spec in traced.signature.state}:
            return zeros(fake)
        name = traced.weight_names[entry]
        value = self.value(name)
        if value.shape != fake.shape:
            raise ValueError(
                f"{method}: '{entry}' is {tuple(fake.shape)} in the graph, its weight {tuple(value.shape)}"
            )
        return value.to(fake.dtype)

    def value(self, name: str) -> Tensor:
        """A constant, computed now if it is one to compute, or else the weight of that name."""
        constant = self.constants.get(name)
        return self.weights[name] if constant is None else constant() if callable(constant) else constant

    def stored(self, method: str, entry: str, rows: int | None = None) -> Tensor:
        """As `tensor`, or its first rows, but in the dtype that the checkpoint keeps, and no copy where that can be.

        Whoever has read it calls `release`.
        """
        name = self.methods[method].weight_names[entry]
        if name in self.constants or not isinstance(self.weights, NamedWeights):
            whole = self.tensor(method, entry)
            return whole if rows is None else whole[:rows]
        return self.weights.stored(name, rows)

    def release(self, method: str, entry: str) -> None:
        """The caller has copied an entry: pages of a mapped checkpoint, which count as memory, may go."""
        name = self.methods[method].weight_names.get(entry)
        if isinstance(self.weights, NamedWeights) and name is not None and name not in self.constants:
            self.weights.release(name)

    def exported(self, method: str, value_of: Callable[[str, Tensor], Tensor] | None = None) -> ExportedProgram:
        """A copy of a method's ExportedProgram with real weights, in tensors of its own over them, and zeroed state.

        `value_of` (entry, its fake tensor) gives others.
        """
        exported = copy.copy(self.methods[method].exported)
        values: dict[str, Tensor] = {}
        for entry, fake in exported.state_dict.items():
            value = value_of(entry, fake) if value_of else self.tensor(method, entry)
            values[entry] = (
                nn.Parameter(value, requires_grad=False) if isinstance(fake, nn.Parameter) else value.detach()
            )
        exported._state_dict = values
        exported._constants = dict(exported.constants)  # lowering takes entries out
        return exported

    def module(self, method: str) -> nn.Module:
        """A callable with state of its own, beginning at zero."""
        return self.exported(method).module(check_guards=False)

    def replace(self, method: str, traced: TracedMethod, constants: Mapping[str, Constant] | None = None) -> Program:
        """This program with one method exchanged, and constants added."""
        return replace(
            self, methods={**self.methods, method: traced}, constants={**self.constants, **(constants or {})}
        )

    def check(self) -> None:
        """Raise ValueError where a graph is malformed, disagrees with its signature, or lacks a weight's name."""
        for name, traced in self.methods.items():
            traced.exported.graph_module.graph.lint()
            taken = len(traced.exported.graph_signature.user_inputs)
            given = len(traced.exported.graph_signature.user_outputs)
            signature = traced.signature
            if (taken, given) != (len(signature.inputs), len(signature.outputs)):
                raise ValueError(
                    f"{name}: the graph takes {taken} and gives {given} tensors, its signature says "
                    f"{len(signature.inputs)} and {len(signature.outputs)}"
                )
            states = {spec.name for spec in signature.state}
            mutated = set(traced.exported.graph_signature.buffers_to_mutate.values())
            if mutated != states:
                raise ValueError(f"{name}: the graph updates {sorted(mutated)}, its signature says {sorted(states)}")
            nameless = set(traced.exported.state_dict) - states - set(traced.weight_names)
            if nameless:
                raise ValueError(f"{name}: no weight is named for {sorted(nameless)}")
