"""ONNX Runtime: one ONNX graph a method with its weights beside it, the KV cache as inputs and outputs."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.targets.base import Capabilities, Lowered, LowerOptions
from export.targets.onnx_graph import OPSET, emit, in_place, operators, write
from export.targets.state_io import explicit_state, state_pairs
from graphs.program import Program


class OnnxRuntimeTarget:
    """Writes `<method>.onnx` and `<method>.onnx.data` for every method."""

    name = "onnxruntime"
    capabilities = Capabilities(
        recipes=("reference-fp32", "reference-fp16"),
        arithmetic={"reference-fp32": "fp32", "reference-fp16": "fp16"},
        runs_on="CPUs; through ONNX Runtime's execution providers also GPUs and NPUs",
    )

    def legalize(self, program: Program) -> Program:
        """The same methods with their caches as inputs and outputs: an ONNX graph keeps no state."""
        return explicit_state(program)

    def lower(self, program: Program, directory: Path, options: LowerOptions) -> Lowered:
        files: dict[str, str] = {}
        details: dict[str, Any] = {"opset": OPSET, "methods": {}}
        for method, traced in program.methods.items():
            options.progress(f"{method}: translating to ONNX")
            model = emit(program, method)
            files[method] = f"{method}.onnx"
            counts = operators(model)
            options.progress(f"{method}: writing {files[method]}, {sum(counts.values())} nodes")
            write(model, directory / files[method])
            pairs = state_pairs(traced.signature)
            details["methods"][method] = {
                "state": pairs,
                "in_place": in_place(model, pairs),
                "nodes": sum(counts.values()),
                "operators": counts,
            }
        versions = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
        return Lowered(files, details, versions)


TARGET = OnnxRuntimeTarget()
