"""TensorRT: one engine a method, built from ONNX by TensorRT-RTX (no GPU needed) or by full TensorRT where it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from export.memory import reclaim
from export.targets.base import Capabilities, Lowered, LowerOptions
from export.targets.onnx_graph import OPSET, emit, operators, write
from export.targets.onnx_reference import evaluate
from export.targets.state_io import explicit_state, state_pairs
from export.targets.trt_engine import build_engine, choose_builder, profiles_of
from export.targets.trt_graph import dequantize_tables, plain_bfloat16
from graphs.program import Program
from runtimes.tensorrt_api import Library


def lower(
    program: Program, method: str, path: Path, options: LowerOptions, library: Library, trt: Any
) -> dict[str, Any]:
    """Write one method's engine; its details. Raises GateError as `TensorRTTarget.lower` does."""
    traced, version = program.methods[method], f"{library.title} {trt.__version__}"
    with TemporaryDirectory(prefix=".onnx-", dir=path.parent) as scratch:
        options.progress(f"{method}: translating to ONNX")
        model = emit(program, method, fusions=(dequantize_tables,))
        graph = Path(scratch) / f"{method}.onnx"
        write(model, graph)
        finding = ""
        if options.loads:
            options.progress(f"{method}: evaluating the ONNX with onnxruntime")
            finding = f"ONNX {evaluate(program, method, graph, options.limits[method], options.seed)}; "
        profiles = profiles_of(traced.signature, library)
        options.progress(f"{method}: {version} builds the engine")
        start = perf_counter()
        engine = build_engine(library, trt, graph, path, traced.signature, profiles, options.progress)
        seconds = perf_counter() - start
    options.progress(f"{method}: {engine.size} bytes in {seconds:.1f} s")
    found = {
        "state": state_pairs(traced.signature),
        "profiles": [{"name": p.name, "sizes": p.sizes} for p in profiles],
        "operators": operators(model),
        "layers": engine.layers,
        "quantized_layers": engine.arithmetic,
        "warnings": engine.warnings,
        "bytes": engine.size,
        "header": engine.header.hex(),
        "checked": f"{finding}parsed and built by {version}",
    }
    return {method: found}


class TensorRTTarget:
    """Writes `<method>.engine` for every method; `extra["builder"]` is `auto`, `tensorrt` or `tensorrt-rtx`."""

    name = "tensorrt"
    capabilities = Capabilities(
        runs_on="NVIDIA GPUs",
        floats=("float16", "bfloat16", "float32"),
        schemes={
            "linear": ("w8a8", "w8a8o", "f8af8", "w4g32", "w4g64", "w4g128", "w4", "w8", "w8g128", "f8"),
            "conv": ("w8a8", "f8af8"),
            "embedding": ("w8", "w4g32", "w4g64", "w4g128"),
        },
        symmetric=True,
        gates={"bfloat16": 5e-2},
        base_bytes=860 << 20,
        values=20.0,  # the builder's, too
        scores=5.6,
        unmasked=5.6,
        held=2.0,  # what the builder copies of the weights, and the engine
    )

    def legalize(self, program: Program) -> Program:
        """The same methods with their caches as inputs and outputs: an engine keeps no state."""
        return explicit_state(plain_bfloat16(program))

    def lower(self, program: Program, directory: Path, options: LowerOptions) -> Lowered:
        """Evaluate each method's ONNX, then build its engine.

        Raises UserError where there is no such builder, GateError where it refuses or the ONNX is off.
        """
        library, trt = choose_builder(options.extra.get("builder", "auto"))
        files = {method: f"{method}.engine" for method in program}
        methods: dict[str, Any] = {}
        for method, name in files.items():
            make = partial(lower, program, method, directory / name, options, library, trt)
            methods |= options.piece([method], make)
            reclaim()  # before the next method's weights
        checked = {method: found["checked"] for method, found in methods.items()}
        details = {
            "builder": {"name": library.name, "version": trt.__version__, "engines_run_on": library.engines},
            "opset": OPSET,
            "methods": methods,
        }
        return Lowered(files, details, {library.name: trt.__version__}, checked)


TARGET = TensorRTTarget()
