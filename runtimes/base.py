"""What every runtime is: a loaded artefact whose methods can be called with numpy arrays."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from graphs.errors import UserError, nearest
from graphs.program import Signature

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Artifact:
    """The lowered methods as they lie on disk: all that a runtime may know of them.

    `files` names each method's file or package relative to `directory` (several methods may share one); `details` is
    what the target recorded for its runtime (JSON values).
    """

    directory: Path
    signatures: Mapping[str, Signature]
    files: Mapping[str, str]
    details: Mapping[str, Any] = field(default_factory=dict)


class Unavailable(Exception):  # noqa: N818 (a finding, not an error)
    """This machine cannot run the runtime; the message says why in one line (no NVIDIA GPU, not macOS, ...)."""


class Caller(Protocol):
    """Methods that can be called; a stateful one continues from its last call until `reset`."""

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        """Arrays in the order, shapes and dtypes of the method's signature, in and out."""
        ...

    def reset(self) -> None:
        """Forget all state: the next call of a stateful method is the first."""
        ...


class Runtime(Caller, Protocol):
    """Callable methods, and what executes them."""

    version: str  # a name and a version, e.g. "onnxruntime 1.32.0"


class LoadedRuntime(Runtime, Protocol):
    """Runs the methods of one artefact."""

    @classmethod
    def load(cls, artifact: Artifact) -> Self:
        """Raises `Unavailable` where this machine cannot run it, UserError where a file is damaged."""
        ...


#: runtime name -> module and class; imported only when asked for
RUNTIMES: dict[str, tuple[str, str]] = {
    "coreml": ("runtimes.coreml", "CoreMLRuntime"),
    "executorch": ("runtimes.executorch", "ExecuTorchRuntime"),
    "onnxruntime": ("runtimes.onnxruntime", "OnnxRuntime"),
    "tensorrt": ("runtimes.tensorrt", "TensorRTRuntime"),
}


def load_runtime(name: str, artifact: Artifact) -> Runtime:
    """The runtime called `name`, loaded with `artifact`. Raises UserError, `Unavailable`."""
    if name not in RUNTIMES:
        raise UserError(f"unknown runtime '{name}': {nearest(name, [*RUNTIMES, 'eager'])}")
    module, attribute = RUNTIMES[name]
    runtime: type[LoadedRuntime] = getattr(importlib.import_module(module), attribute)
    return runtime.load(artifact)
