"""One traced method to one .mlpackage, by coremltools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from export.targets import coreml_names, coreml_ops
from graphs.errors import GateError
from graphs.files import reason
from graphs.program import Signature
from graphs.spec import TensorSpec

#: Core ML's element types for inputs and outputs, by the signature's
FEATURES: dict[torch.dtype, type[np.generic]] = {
    torch.uint8: np.float32,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.int32: np.int32,
    torch.int64: np.int32,
    torch.bool: np.int32,
}

#: what Xcode shows beside an input, by the values that the input takes
ABOUT = {
    "pixels": "A picture as it is, values 0 to 255; the model normalises it.",
    "ids": "Token ids.",
    "positions": "Consecutive positions in the context, from the number of tokens already seen.",
    "normal": "",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' progress bars, its warnings about versions and casts, and those of what it imports."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def scratch_in(directory: Path) -> Iterator[None]:
    """Temporary files under `directory`: coremltools writes the weights once beside the package, and a process that is
    killed must leave nothing elsewhere."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        tempfile.tempdir = scratch
        try:
            yield
        finally:
            tempfile.tempdir = before


def is_image(spec: TensorSpec) -> bool:
    """Whether an input is a picture to Core ML: bytes [1, 3, H, W] of a fixed size."""
    return spec.dtype == torch.uint8 and spec.values == "pixels" and spec.shape[:2] == (1, 3) and not spec.dims


def feature(spec: TensorSpec, ranges: Mapping[str, Any]) -> Any:
    """The Core ML input for `spec`; `ranges` holds a RangeDim for each dynamic dimension.

    A picture becomes an RGB image without scale or bias, so that an app may hand over a CVPixelBuffer, or let Vision
    crop and resize; anything else becomes a multi-array.
    """
    import coremltools as ct

    shape = [size if isinstance(size, int) else ranges[size.name] for size in spec.shape]
    if is_image(spec):
        return ct.ImageType(name=spec.name, shape=shape, color_layout=ct.colorlayout.RGB)
    return ct.TensorType(name=spec.name, shape=shape, dtype=FEATURES[spec.dtype])


def convert(name: str, exported: ExportedProgram, signature: Signature, precision: str, path: Path) -> Any:
    """Write the method as an ML program for iOS 18 and macOS 15 to `path`; returns coremltools' model of it.

    `precision` is "fp16" or "fp32"; states are fp16 in either, the only type that Core ML has for them.
    Raises GateError where coremltools cannot convert the graph.
    """
    with quiet(), scratch_in(path.parent):
        import coremltools as ct

        coreml_ops.originals()
        ranges = {d.name: ct.RangeDim(d.min, d.max) for spec in signature.inputs for d in spec.dims}
        pipeline = ct.PassPipeline.DEFAULT
        # Ids and positions are never negative, so nothing needs guarding against indices that are.
        pipeline.remove_passes({"common::guard_negative_gather_indices"})
        try:
            return ct.convert(
                exported,
                inputs=[feature(spec, ranges) for spec in signature.inputs],
                outputs=[ct.TensorType(name=spec.name, dtype=FEATURES[spec.dtype]) for spec in signature.outputs],
                minimum_deployment_target=ct.target.iOS18,
                convert_to="mlprogram",
                compute_precision=ct.precision.FLOAT16 if precision == "fp16" else ct.precision.FLOAT32,
                pass_pipeline=pipeline,
                package_dir=str(path),
                skip_model_load=True,
            )
        except (RuntimeError, ValueError, NotImplementedError, TypeError, KeyError) as error:
            raise GateError(f"coremltools cannot convert {name}: {reason(error)}") from error


def describe(model: Any, name: str, signature: Signature, facts: Mapping[str, Any]) -> None:
    """Say in the package what the method is, and what a client must know, as JSON values under `vlmx.` keys."""
    model.short_description = f"{name} of {facts.get('variant', 'a model')}, exported by vlmx"
    for spec in signature.inputs:
        model.input_description[spec.name] = ABOUT[spec.values]
    # Without the date the same program makes the same file.
    model.user_defined_metadata.pop("com.github.apple.coremltools.conversion_date", None)
    for key, value in {"method": name, **facts}.items():
        model.user_defined_metadata[f"vlmx.{key}"] = value if isinstance(value, str) else json.dumps(value)


def finish(model: Any, name: str, path: Path) -> None:
    """Write the specification, with short names, and the manifest again, so that equal programs make equal bytes.

    coremltools draws the identifiers in the manifest at random; here they follow from the method's name.
    """
    manifest_path = path / "Manifest.json"
    manifest = json.loads(manifest_path.read_text())
    items: dict[str, dict[str, str]] = manifest["itemInfoEntries"]
    names = {key: str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name}/{item['path']}")) for key, item in items.items()}
    root: str = manifest["rootModelIdentifier"]
    spec = model.get_spec()
    coreml_names.shorten(spec)
    (path / "Data" / items[root]["path"]).write_bytes(spec.SerializeToString(deterministic=True))
    manifest["itemInfoEntries"] = {names[key]: item for key, item in items.items()}
    manifest["rootModelIdentifier"] = names[root]
    manifest_path.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def operators(model: Any) -> dict[str, int]:
    """How often each MIL operator occurs, the most frequent first; constants are none."""
    counts: dict[str, int] = {}
    for function in model.get_spec().mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                if operation.type != "const":
                    counts[operation.type] = counts.get(operation.type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def weight_bytes(path: Path) -> int:
    """Bytes of a package's weights, as they lie there."""
    return sum(file.stat().st_size for file in path.rglob("weight.bin"))
