"""What holds of every export of a size made for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.model import Request
from runtimes.manifest import Bundle


def lowers(request: Request, target: str, out: Path) -> dict[str, Any]:
    """The manifest of a bundle in fp32, each method asserted to be within its limit, or built where none can run."""
    bundle = Bundle.open(export(ExportOptions(request, target, "reference-fp32", out=out), silent))
    for name, record in bundle.manifest["verification"].items():
        entry = record["lower"]
        if entry["executed"]:
            assert entry["relative_l2"] <= entry["limit"], name
        else:
            assert "parsed and built by TensorRT-RTX" in entry["checked"], name
    return bundle.manifest
