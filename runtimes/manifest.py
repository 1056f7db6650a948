"""The bundle's manifest: reading one, from a directory that nobody vouches for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphs.errors import UserError
from graphs.files import read_json, sha256, shown
from graphs.program import Signature
from graphs.spec import Dim, TensorSpec
from runtimes.base import Artifact

SCHEMA = 1
MANIFEST = "manifest.json"
VECTORS = "vectors.safetensors"


def spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    """A TensorSpec as JSON values; a dynamic dimension is an object with its name and bounds."""
    shape = [
        size if isinstance(size, int) else {"name": size.name, "min": size.min, "max": size.max} for size in spec.shape
    ]
    drawn = {"values": spec.values, **({"high": spec.high} if spec.high else {})}
    return {"name": spec.name, "shape": shape, "dtype": str(spec.dtype).removeprefix("torch."), **drawn}


def spec_from_json(value: Mapping[str, Any]) -> TensorSpec:
    """The inverse of `spec_to_json`. Raises KeyError, TypeError or ValueError where the value is not of its form."""
    shape = tuple(
        size if isinstance(size, int) else Dim(size["name"], size["min"], size["max"]) for size in value["shape"]
    )
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{value['dtype']} is no dtype")
    return TensorSpec(value["name"], shape, dtype, value.get("values", "normal"), value.get("high", 0))


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """A Signature as JSON values."""
    parts = {"inputs": signature.inputs, "outputs": signature.outputs, "state": signature.state}
    return {part: [spec_to_json(spec) for spec in specs] for part, specs in parts.items()}


def signature_from_json(value: Mapping[str, Any]) -> Signature:
    """The inverse of `signature_to_json`."""
    parts = (tuple(spec_from_json(spec) for spec in value[part]) for part in ("inputs", "outputs", "state"))
    return Signature(*parts)


def inside(directory: Path, name: str) -> Path:
    """The path `name` below `directory`. Raises UserError where it leads elsewhere."""
    path = directory / name
    if not name or Path(name).is_absolute() or not path.resolve().is_relative_to(directory.resolve()):
        raise UserError(f"{directory / MANIFEST}: '{shown(name)}' points outside the bundle")
    return path


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk: its directory and its manifest, whose form has been checked but not its files."""

    directory: Path
    manifest: Mapping[str, Any]
    artifact: Artifact  # what the target's runtime loads; its signatures are those of the lowered methods

    @property
    def target(self) -> str:
        return str(self.manifest["target"])

    @classmethod
    def open(cls, directory: Path) -> Bundle:
        """Raises UserError where there is no bundle, or its manifest is damaged or of another schema."""
        if not (directory / MANIFEST).is_file():
            raise UserError(f"{directory} is not a bundle: it has no {MANIFEST}; make one with `vlmx export`")
        manifest = read_json(directory / MANIFEST)
        if manifest.get("schema") != SCHEMA:
            raise UserError(f"{directory / MANIFEST}: schema {manifest.get('schema')!r}, this vlmx reads {SCHEMA}")
        try:
            methods = manifest["methods"]
            artifact = Artifact(
                directory,
                {name: signature_from_json(method) for name, method in methods.items()},
                {
                    name: str(inside(directory, method["file"]).relative_to(directory))
                    for name, method in methods.items()
                },
                manifest["details"],
            )
            _ = manifest["target"], manifest["source"], manifest["files"], manifest["prompt"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{directory / MANIFEST} is damaged: {type(error).__name__} {error}") from error
        return cls(directory, manifest, artifact)

    def check_files(self, progress: Callable[[str], None] = lambda line: None) -> int:
        """Compare every file's size and sha256 with the manifest; the number of files. Raises UserError by name."""
        for name, recorded in self.manifest["files"].items():
            path = inside(self.directory, name)
            progress(f"hashing {name}")
            if not path.is_file():
                raise UserError(f"{self.directory}: {name} is missing")
            if path.stat().st_size != recorded["bytes"] or sha256(path) != recorded["sha256"]:
                raise UserError(
                    f"{self.directory}: {name} is not the file that the manifest describes (sha256 differs)"
                )
        return len(self.manifest["files"])
