"""The two libraries that speak TensorRT's Python interface: full TensorRT and TensorRT-RTX."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Library:
    """One of them; `module` is what Python imports, `engines` says where the engines that it builds run.

    `specializes`: whether kernels are compiled for the very shapes that are met when an engine runs; then one profile
    serves prefill and decode. Each further profile would add a copy of most weights to the engine.
    """

    name: str
    title: str
    module: str
    install: str
    builds_without_gpu: bool
    specializes: bool
    engines: str

    def load(self) -> Any | None:
        """The module, or None where it or the libraries behind it are missing."""
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError):
            return None


#: library name -> library, the preferred one first
LIBRARIES: dict[str, Library] = {
    library.name: library
    for library in (
        Library(
            name="tensorrt",
            title="TensorRT",
            module="tensorrt",
            install="pip install 'vlmx[tensorrt]'",
            builds_without_gpu=False,
            specializes=False,
            engines="GPUs of the kind that it was built on",
        ),
        Library(
            name="tensorrt-rtx",
            title="TensorRT-RTX",
            module="tensorrt_rtx",
            install="pip install tensorrt-rtx-cu13",
            builds_without_gpu=True,
            specializes=True,
            engines="NVIDIA GPUs of compute capability 8.0, 8.6, 8.9, 12.0 and later",
        ),
    )
}


def collecting_logger(trt: Any) -> Any:
    """A logger for `trt` that keeps what the library says: `warnings` and `errors`, each once, in order."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warnings: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            kinds = trt.ILogger
            errors, line = severity in (kinds.ERROR, kinds.INTERNAL_ERROR), " ".join(message.split())
            kept = self.errors if errors else self.warnings
            if (errors or severity == kinds.WARNING) and line not in kept:
                kept.append(line)

    return Logger()
