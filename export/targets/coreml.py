"""Core ML: an .mlpackage a method, compressed weights, the KV cache as iOS 18 states, pixels as an image input."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from export.memory import reclaim
from export.targets import coreml_convert, coreml_graph
from export.targets.base import LIMITS, Capabilities, Lowered, LowerOptions
from graphs.program import Program
from quant.scheme import GROUPS, Scheme, WeightScheme

#: what unquantized numbers are kept in -> what coremltools calls it
PRECISION = {"float16": "fp16", "float32": "fp32"}

#: Integer weights, one scale an output channel or a block of inputs, with and without zero points.
WEIGHTS = tuple(str(Scheme(WeightScheme("int", *choice))) for choice in product((4, 8), GROUPS, (False, True)))
PER_CHANNEL = ("w4", "w4z", "w8", "w8z")
#: With int8 activations of ranges fixed at compile time: all that Core ML's `quantize` takes.
STATIC = ("w8a8", "w8a8o")
PALETTES = ("p4", "p6", "p8")

#: entries of `LowerOptions.metadata` that a client of the packages needs
FACTS = ("variant", "context", "visual_tokens", "image_size", "vocab_size", "bos_id", "eos_ids")


def lower(program: Program, method: str, path: Path, options: LowerOptions) -> dict[str, Any]:
    """Write one method; its details."""
    traced, precision = program.methods[method], PRECISION[options.floats]
    facts = {key: options.metadata[key] for key in FACTS if options.metadata.get(key) is not None}
    options.progress(f"{method}: converting to an ML program")
    model = coreml_convert.convert(method, program.exported(method), traced.signature, precision, path)
    coreml_convert.describe(model, method, traced.signature, facts)
    coreml_convert.finish(model, method, path)
    counts = coreml_convert.operators(model)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    options.progress(f"{method}: {path.name}, {sum(counts.values())} operators, {size / 2**20:.1f} MiB")
    found = {
        "images": [spec.name for spec in traced.signature.inputs if coreml_convert.is_image(spec)],
        "precision": precision,
        "state_precision": "fp16" if traced.signature.state else None,
        "operators": counts,
        "weight_bytes": coreml_convert.weight_bytes(path),
    }
    return {method: found}


class CoreMLTarget:
    """Writes `<method>.mlpackage` for every method: ML programs for iOS 18, macOS 15 and later.

    Weights and arithmetic are float16 by default, what the Neural Engine and the GPU run at full speed; "float32"
    computes in that on CPU and GPU, but its KV cache stays float16, the only type of a Core ML state, so the limit of
    float16 applies to both. Sequence lengths are flexible from 1 to the context.

    Quantized weights lie packed in the package, as `coreml_quant` says. By Apple's guide to coremltools, blocks of 4
    bits suit the GPU, palettes and one scale a channel the Neural Engine, and int8 activations pay there alone, from
    A17 Pro and M4 on. Core ML quantizes no activations by ranges found at run time and has no float8.
    """

    name = "coreml"
    capabilities = Capabilities(
        runs_on="iPhones, iPads (iOS 18) and Macs (macOS 15): CPU, GPU and Neural Engine",
        floats=tuple(PRECISION),
        schemes={
            "linear": (*WEIGHTS, *STATIC, *PALETTES),
            "conv": (*PER_CHANNEL, *STATIC),
            "embedding": WEIGHTS,
        },
        default_recipe="reference-fp16",
        base_bytes=700 << 20,
        evaluated=2.8,
        held=2.0,  # integers a byte each, and what is packed of them
        held_floats=3.0,
        native=frozenset(PRECISION),
        gates={"float32": LIMITS["float16"]},
    )

    def legalize(self, program: Program) -> Program:
        """Byte inputs as floats, rows of embeddings gathered from weights; all else is left to the converters of
        `coreml_ops` and `coreml_quant`."""
        return coreml_graph.legalize(program)

    def lower(self, program: Program, directory: Path, options: LowerOptions) -> Lowered:
        files = {method: f"{method}.mlpackage" for method in program}
        methods: dict[str, Any] = {}
        for method, name in files.items():
            methods |= options.piece([method], partial(lower, program, method, directory / name, options))
            reclaim()  # what coremltools made of one method's weights, before the next one's
        return Lowered(files, {"minimum": "iOS18", "methods": methods}, {"coremltools": version("coremltools")})


TARGET = CoreMLTarget()
