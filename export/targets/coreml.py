"""Core ML: an .mlpackage a method, the KV cache as iOS 18 states, pixels as an image input."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.targets import coreml_convert, coreml_graph
from export.targets.base import Capabilities, Lowered, LowerOptions
from graphs.program import Program

#: recipe -> the precision that coremltools computes in
PRECISION = {"reference-fp16": "fp16", "reference-fp32": "fp32"}

#: entries of `LowerOptions.metadata` that a client of the packages needs
FACTS = ("variant", "context", "visual_tokens", "image_size", "vocab_size", "bos_id", "eos_ids")


class CoreMLTarget:
    """Writes `<method>.mlpackage` for every method: ML programs for iOS 18, macOS 15 and later.

    Weights and arithmetic are fp16 by default, what the Neural Engine and the GPU run at full speed. "reference-fp32"
    computes in fp32 on CPU and GPU, but its KV cache stays fp16, the only type of a Core ML state; so the limit of fp16
    applies to both. Sequence lengths are flexible from 1 to the context.
    """

    name = "coreml"
    capabilities = Capabilities(
        recipes=tuple(PRECISION),
        arithmetic=dict.fromkeys(PRECISION, "fp16"),
        runs_on="iPhones, iPads (iOS 18) and Macs (macOS 15): CPU, GPU and Neural Engine",
        native=frozenset(PRECISION),
    )

    def legalize(self, program: Program) -> Program:
        """Byte inputs as floats; everything else is left to the converters of `coreml_ops`."""
        return coreml_graph.legalize(program)

    def lower(self, program: Program, directory: Path, options: LowerOptions) -> Lowered:
        files: dict[str, str] = {}
        methods: dict[str, Any] = {}
        facts = {key: options.metadata[key] for key in FACTS if options.metadata.get(key) is not None}
        for method, traced in program.methods.items():
            files[method] = f"{method}.mlpackage"
            path = directory / files[method]
            options.progress(f"{method}: converting to an ML program")
            model = coreml_convert.convert(
                method, program.exported(method), traced.signature, PRECISION[options.recipe], path
            )
            coreml_convert.describe(model, method, traced.signature, facts)
            coreml_convert.finish(model, method, path)
            counts = coreml_convert.operators(model)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            options.progress(f"{method}: {files[method]}, {sum(counts.values())} operators, {size / 2**20:.1f} MiB")
            methods[method] = {
                "images": [spec.name for spec in traced.signature.inputs if coreml_convert.is_image(spec)],
                "precision": PRECISION[options.recipe],
                "state_precision": "fp16" if traced.signature.state else None,
                "operators": counts,
            }
        return Lowered(files, {"minimum": "iOS18", "methods": methods}, {"coremltools": version("coremltools")})


TARGET = CoreMLTarget()
