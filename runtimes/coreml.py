"""Core ML: saved packages run by the system on macOS, elsewhere by the reference evaluator of `runtimes.mil`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

from graphs.errors import UserError
from graphs.files import reason
from graphs.program import Signature
from runtimes.base import Array, Artifact, Unavailable


class Executor(Protocol):
    """One loaded package: arrays in and out by name, `reset` for its states."""

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]: ...

    def reset(self) -> None: ...


class SystemModel:
    """A package run by Core ML through coremltools (macOS only); pictures go in as Pillow images."""

    def __init__(self, path: Path, images: Sequence[str], stateful: bool) -> None:
        from coremltools.models import MLModel

        self.images = frozenset(images)
        self.stateful = stateful
        self.model: Any = MLModel(str(path))
        self.reset()

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        from PIL import Image

        given: dict[str, Any] = dict(inputs)
        for name in self.images:
            given[name] = Image.fromarray(np.ascontiguousarray(inputs[name][0].transpose(1, 2, 0)))
        outputs: Mapping[str, Array] = self.model.predict(given, state=self.state)
        return outputs

    def reset(self) -> None:
        self.state = self.model.make_state() if self.stateful else None


@dataclass(frozen=True)
class Method:
    """A package and the signature it serves."""

    executor: Executor
    signature: Signature

    def call(self, inputs: Sequence[Array]) -> list[Array]:
        """Positional arrays to positional arrays; Core ML has no int64, so integers go in as int32."""
        named = {
            spec.name: array.astype(np.int32) if array.dtype == np.int64 else array
            for spec, array in zip(self.signature.inputs, inputs, strict=True)
        }
        outputs = self.executor(named)
        return [
            np.asarray(outputs[spec.name]).astype(torch.empty(0, dtype=spec.dtype).numpy().dtype)
            for spec in self.signature.outputs
        ]


class CoreMLRuntime:
    """Runs the packages of one artefact; `version` says whether Core ML or the evaluator executes."""

    def __init__(self, methods: Mapping[str, Method], version: str) -> None:
        self.methods = methods
        self.signatures = {name: method.signature for name, method in methods.items()}
        self.version = version

    @classmethod
    def load(cls, artifact: Artifact) -> Self:
        """Raises UserError where a package is damaged, Unavailable where coremltools is missing."""
        try:
            tools = version("coremltools")
        except ImportError as error:
            raise Unavailable("coremltools is not installed") from error
        on_mac = sys.platform == "darwin"
        open_package = system_model if on_mac else evaluated_model
        methods = {
            name: Method(open_package(artifact, name, artifact.directory / file), artifact.signatures[name])
            for name, file in artifact.files.items()
        }
        by = (
            f"Core ML, macOS {platform.mac_ver()[0]}"
            if on_mac
            else f"coremltools MIL evaluated by vlmx reference evaluator, coremltools {tools}"
        )
        return cls(methods, by)

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        return self.methods[method].call(inputs)

    def reset(self) -> None:
        for method in self.methods.values():
            method.executor.reset()


def system_model(artifact: Artifact, name: str, path: Path) -> Executor:
    """The package compiled and loaded by Core ML. Raises UserError where it refuses."""
    images = artifact.details["methods"][name]["images"]
    try:
        return SystemModel(path, images, bool(artifact.signatures[name].state))
    except Exception as error:  # coremltools raises plain exceptions
        raise UserError(f"{path}: Core ML cannot load it: {reason(error)}") from error


def evaluated_model(artifact: Artifact, name: str, path: Path) -> Executor:
    """The package read by the reference evaluator. Raises UserError where it is damaged or has another signature."""
    from runtimes.mil.model import MilModel

    model = MilModel(path)
    signature = artifact.signatures[name]
    wanted = {spec.name for spec in signature.inputs}, {spec.name for spec in signature.outputs}
    if wanted != ({port.name for port in model.inputs}, set(model.outputs)):
        raise UserError(f"{path}: takes {sorted(p.name for p in model.inputs)} and gives {sorted(model.outputs)}, "
                        f"the manifest says {sorted(wanted[0])} and {sorted(wanted[1])}")  # fmt: skip
    return model
