"""Opens a saved .mlpackage: its manifest, the model specification and the weights files beside it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from graphs.errors import UserError
from graphs.files import contained, listing, read_json, reason, shown
from runtimes.mil.blob import BlobFile
from runtimes.mil.proto import message_module

MAX_SPEC_BYTES = (1 << 31) - 1  # protobuf's own limit
MODEL_PATH = "@model_path/"


class Package:
    """A package directory: `spec` is its `Model` message; weights are opened when they are first asked for.

    Raises UserError where the package is missing, damaged, or not an ML program.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UserError(f"{path}: no such .mlpackage directory")
        manifest = read_json(contained(path, "Manifest.json"))
        items, root = manifest.get("itemInfoEntries"), manifest.get("rootModelIdentifier")
        item = items.get(root) if isinstance(items, dict) and isinstance(root, str) else None
        if not isinstance(item, dict) or not isinstance(item.get("path"), str):
            raise UserError(f"{path / 'Manifest.json'}: names no root model")
        self.model_path = self._inside(path / "Data", item["path"])
        self.spec = self._parse(self.model_path)
        self._blobs: dict[str, BlobFile] = {}

    def blob(self, name: str) -> BlobFile:
        """The weights file that the specification calls `name` (`@model_path/weights/weight.bin`)."""
        if name not in self._blobs:
            if not name.startswith(MODEL_PATH):
                raise UserError(f"{self.path}: weights '{shown(name)}' lie outside the package")
            self._blobs[name] = BlobFile(self._inside(self.model_path.parent, name.removeprefix(MODEL_PATH)))
        return self._blobs[name]

    def _inside(self, directory: Path, relative: str) -> Path:
        """A file of the package by its relative path; each part must be a plain name and no link may lead out."""
        *folders, name = PurePosixPath(relative).parts or ("",)
        place = directory.joinpath(*folders)
        if PurePosixPath(relative).is_absolute() or ".." in folders:
            raise UserError(f"{self.path}: '{shown(relative)}' points outside the package")
        if not place.is_dir() or not place.resolve().is_relative_to(self.path.resolve()):
            raise UserError(f"{place}: no such directory; {self.path} holds {listing(self.path)}")
        return contained(place, name)

    def _parse(self, path: Path) -> Any:
        from google.protobuf.message import DecodeError

        if path.stat().st_size > MAX_SPEC_BYTES:
            raise UserError(f"{path}: {path.stat().st_size} bytes, more than a model specification may have")
        spec = message_module("Model_pb2").Model()
        try:
            spec.ParseFromString(path.read_bytes())
        except (DecodeError, OSError) as error:
            raise UserError(f"{path}: not a Core ML model specification: {reason(error)}") from error
        if spec.WhichOneof("Type") != "mlProgram":
            raise UserError(f"{path}: holds a {spec.WhichOneof('Type') or 'nothing'}, not an ML program")
        return spec
