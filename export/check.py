"""`vlmx verify`: a bundle's hashes, then its `lower` errors again on its own test vectors, on this machine."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from export.gate import Limit, execute
from export.sample import Sample, lower_part
from export.stability import MOST
from export.stages import Progress
from export.targets.base import LowerOptions, load_target
from export.verify import load_vectors
from graphs.errors import GateError, UserError
from runtimes.base import Unavailable, load_runtime
from runtimes.manifest import VECTORS, Bundle, inside
from runtimes.session import rebuild


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
    sample = Sample.from_json(bundle.manifest.get("left_out"))
    if sample.without:
        progress(f"lowering a sample again: {sample}")
    with TemporaryDirectory(prefix="vlmx-") as scratch:
        artifact = bundle.artifact
        if sample.without:
            given = LowerOptions(str(bundle.manifest["quantization"]["floats"]), recorded_limits(bundle))
            part = rebuild(bundle, sample.of)
            artifact, _ = lower_part(load_target(bundle.target), part, given, Path(scratch))
        vectors = load_vectors(inside(directory, VECTORS), artifact.signatures)
        try:
            runtime = load_runtime(bundle.target, artifact)
        except Unavailable as why:
            raise GateError(f"{directory}: files are whole, but {bundle.target} cannot run here: {why}") from why
        progress(f"running {runtime.version}")
        return execute(runtime, vectors, recorded_limits(bundle), str(directory))
