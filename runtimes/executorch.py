"""ExecuTorch: a .pte run by the wheel's own runtime, its caches in the runtime's planned memory between calls."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from graphs.errors import UserError
from graphs.files import reason, sha256
from graphs.program import Signature
from runtimes.base import Array, Artifact, Unavailable

if TYPE_CHECKING:
    from executorch.runtime import Program

#: root offset and identifier of the flatbuffer, then magic, own length, flatbuffer's, segments' offset and length
HEADER = struct.Struct("<I4s4sIQQQ")
IDENTIFIER, MAGIC = b"ET12", b"eh00"


def check_pte(path: Path, expected: str | None) -> None:
    """Raise UserError where `path` is no .pte, is not as long as its header says, or its sha256 is not `expected`.

    The runtime verifies the program's own flatbuffer, but trusts offsets into segments and what the delegate reads
    there: some single flipped bits end it with a segmentation fault, so a damaged file must not reach it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    if len(head) < HEADER.size:
        raise UserError(f"{path}: {size} bytes are too few for an ExecuTorch program")
    _, identifier, magic, _, program, segments, segment_bytes = HEADER.unpack(head)
    if (identifier, magic) != (IDENTIFIER, MAGIC):
        raise UserError(f"{path}: not an ExecuTorch program: it must say {IDENTIFIER!r} and {MAGIC!r} at bytes 4 and 8")
    wanted = max(program, segments + segment_bytes)
    if size < wanted or (segments and program > segments):
        raise UserError(f"{path}: {size} bytes, its header speaks of {wanted}: the file is cut short or damaged")
    if expected is not None:
        found = sha256(path)
        if found != expected:
            raise UserError(f"{path}: damaged: its sha256 is {found[:12]}..., it was written with {expected[:12]}...")


class Method:
    """A loaded method and the caches it owns, which alias the runtime's memory."""

    def __init__(self, program: Program, name: str, state: Sequence[str]) -> None:
        method = program.load_method(name)
        assert method is not None
        self.execute = method.execute
        self.state: list[Tensor] = [method._method.get_attribute(entry) for entry in state]


class ExecuTorchRuntime:
    """Loads every method at once; `reset` writes zeros over the caches."""

    def __init__(self, methods: dict[str, Method], signatures: Mapping[str, Signature]) -> None:
        self.methods, self.signatures = methods, signatures
        self.version = f"executorch {version('executorch')}"

    @classmethod
    def load(cls, artifact: Artifact) -> Self:
        try:
            import executorch.extension.llm.custom_ops.custom_ops  # registers attention over a cache
            import executorch.kernels.quantized  # noqa: F401  # registers the kernels of quantized embeddings
            from executorch.runtime import Runtime, Verification
        except ImportError as error:
            raise Unavailable(f"executorch is not installed: {reason(error)}") from error
        programs: dict[str, Program] = {}
        methods: dict[str, Method] = {}
        for name, file in artifact.files.items():
            path = artifact.directory / file
            try:
                if file not in programs:
                    check_pte(path, artifact.details.get("sha256"))
                    programs[file] = Runtime.get().load_program(path, verification=Verification.InternalConsistency)
                state = [spec.name for spec in artifact.signatures[name].state]
                methods[name] = Method(programs[file], name, state)
            except (RuntimeError, KeyError, ValueError) as error:
                raise UserError(f"{path}: ExecuTorch cannot load method '{name}': {reason(error)}") from error
        return cls(methods, artifact.signatures)

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in inputs]
        outputs: Sequence[Any] = self.methods[method].execute(tensors)
        return [tensor.numpy() for tensor in outputs]

    def reset(self) -> None:
        for method in self.methods.values():
            for cache in method.state:
                cache.zero_()
