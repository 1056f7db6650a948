"""`vlmx verify`: a bundle's hashes, then its `lower` errors again on its own test vectors, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.gate import Limit, execute
from export.stability import MOST
from export.stages import Progress
from export.verify import load_vectors
from graphs.errors import GateError, UserError
from runtimes.base import Unavailable, load_runtime
from runtimes.manifest import VECTORS, Bundle, inside


def recorded_limits(bundle: Bundle) -> dict[str, Limit]:
    """The limit of each method that the bundle was exported under. Raises UserError where the manifest lacks one."""
    limits = bundle.manifest.get("limits")
    found: dict[str, Limit] = {}
    for method in bundle.artifact.signatures:
        limit = limits.get(method) if isinstance(limits, dict) else None
        try:
            found[method] = Limit.from_json(limit, MOST)
        except ValueError as error:
            raise UserError(f"{bundle.directory}: the manifest's limit for {method} is {limit!r}") from error
    return found


def verify_bundle(directory: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    """The `lower` entries as this machine measures them.

    Raises UserError where a file is not the one that the manifest describes, GateError where a method is off by more
    than its limit or nothing could be executed here.
    """
    bundle = Bundle.open(directory)
    progress(f"{bundle.check_files(progress)} files are as the manifest says")
    vectors = load_vectors(inside(directory, VECTORS), bundle.artifact.signatures)
    try:
        runtime = load_runtime(bundle.target, bundle.artifact)
    except Unavailable as why:
        raise GateError(f"{directory}: files are whole, but {bundle.target} cannot run here: {why}") from why
    progress(f"running {runtime.version}")
    return execute(runtime, vectors, recorded_limits(bundle), str(directory))
