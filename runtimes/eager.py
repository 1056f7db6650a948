"""The source graph itself, run by torch: what every other runtime is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from graphs.program import Program
from runtimes.base import Array
from runtimes.light import lighten


class EagerRuntime:
    """Runs a Program's graphs one operator at a time. Each method's weights are read when it is first called."""

    def __init__(self, program: Program) -> None:
        self.version = f"torch {torch.__version__}"
        self.signatures = {name: traced.signature for name, traced in program.methods.items()}
        self._program = program
        self._modules: dict[str, nn.Module] = {}

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        """Arrays in the order, shapes and dtypes of the method's signature, in and out."""
        with torch.no_grad():
            outputs = self.module(method)(*(torch.from_numpy(array) for array in inputs))
        return [tensor.numpy() for tensor in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))]

    def module(self, method: str) -> nn.Module:
        """What computes a method."""
        if method not in self._modules:
            self._modules[method] = self._program.module(method)
            lighten(self._modules[method])
        return self._modules[method]

    def close(self) -> None:
        """Let go of all weights now: graphs are cycles, which wait for the garbage collector."""
        for module in self._modules.values():
            for owner in module.modules():
                owner._parameters.clear()
                owner._buffers.clear()
        self._modules.clear()

    def reset(self) -> None:
        """Zero all state."""
        for name, module in self._modules.items():
            state = {spec.name for spec in self._program.methods[name].signature.state}
            for buffer_name, buffer in module.named_buffers():
                if buffer_name in state:
                    buffer.zero_()
