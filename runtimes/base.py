"""What every runtime is: a loaded artefact whose methods can be called with numpy arrays."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from graphs.dialogue import Caller
from graphs.errors import UserError, nearest
from graphs.preprocess.picture import Array
from graphs.program import Signature

__all__ = ["Array", "Artifact", "Caller", "Runtime", "Unavailable", "load_runtime"]


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
