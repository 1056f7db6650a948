"""Core ML's protobuf messages, taken from the coremltools that is installed.

Importing all of coremltools takes seconds (it pulls in torch, torchao, scikit-learn and its converters); its generated
message modules need protobuf alone, so they are imported under a package of our own that points at the same directory.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

PACKAGE = "runtimes.mil._coreml_messages"


@cache
def message_module(name: str) -> ModuleType:
    """The generated module `name` (`Model_pb2`, `MIL_pb2`).

    Raises ModuleNotFoundError where coremltools is not installed.
    """
    if PACKAGE not in sys.modules:
        spec = importlib.util.find_spec("coremltools")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("coremltools is not installed", name="coremltools")
        package = ModuleType(PACKAGE)
        package.__path__ = [str(Path(spec.origin).parent / "proto")]
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{name}")
