"""What one export of many took, as a row of a table: also where it was refused, or failed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from export.pipeline import ExportOptions, export
from export.stages import silent
from graphs.errors import GateError, UserError

Row = dict[str, Any]


def measured(options: ExportOptions, more: Callable[[Mapping[str, Any]], Row]) -> Row:
    """Peak memory, bytes and `lower` entries of an export, and `more` of its manifest; or why there is none."""
    try:
        manifest = json.loads((export(options, silent) / "manifest.json").read_text())
    except UserError as error:
        return {"refused": str(error)}
    except GateError as error:
        return {"failed": str(error)}
    return {
        "lower": {name: entry["lower"] for name, entry in manifest["verification"].items()},
        "peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in manifest["stages"]),
        "file_bytes": sum(record["bytes"] for record in manifest["files"].values()),
        **more(manifest),
    }


def failure(error: Exception) -> Row:
    """What is told of a row that raised: the others go on."""
    return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
