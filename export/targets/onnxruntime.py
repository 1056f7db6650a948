"""ONNX Runtime: one ONNX graph a method with its weights beside it, the KV cache as inputs and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx

from export.targets.attention_slices import slice_attention
from export.targets.base import Capabilities, Lowered, LowerOptions
from export.targets.onnx_graph import OPSET, emit, in_place, operators, write
from export.targets.ort_activations import fuse_integer, unsigned_activations
from export.targets.ort_attention import fuse_attention
from export.targets.ort_embedding import fuse_embedding
from export.targets.ort_joined import join_layers
from export.targets.ort_linear import fuse_linear
from export.targets.ort_multi_head import fuse_multi_head
from export.targets.ort_per_token import fuse_per_token
from export.targets.state_io import explicit_state, state_pairs
from graphs.errors import GateError
from graphs.files import reason
from graphs.program import Program
from runtimes.ort_saturation import WITHOUT_VNNI

GROUPS = tuple(f"g{group}" for group in (16, 32, 64, 128, 256))
FORMS = [f"w{bits}{{}}{zero}" for bits in (4, 8, 3) for zero in ("", "z")]
#: MatMulIntegerToFloat three times; MatMulNBits in int8; the same in float
LINEAR = (
    "w8a8",
    "w8a8o",
    "w8a8t",
    *(form.format(group) + "a8b" for form in FORMS for group in GROUPS),
    *(form.format(group) for form in FORMS for group in ("", *GROUPS)),
)
#: rows of int8 gathered by the standard's operators, of 4 bits by GatherBlockQuantized
EMBEDDING = tuple(f"w{bits}{group}" for bits in (8, 4, 3) for group in ("", *GROUPS))

#: ONNX Runtime's own operators and number formats for quantized layers
FUSIONS = (unsigned_activations, fuse_integer, fuse_per_token, fuse_linear, fuse_embedding)
LAST_FUSIONS = (fuse_attention, fuse_multi_head, join_layers)


def optimized(path: Path, entries: Mapping[str, str] = {}) -> onnx.GraphProto:
    """What a session configured by `entries` makes of a graph for its CPU kernels, without large weights' values."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    with TemporaryDirectory(prefix=".optimized-", dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.name}.data")
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        try:
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its error types share no public base class
            raise GateError(f"{path.name}: ONNX Runtime cannot load it: {reason(error)}") from error
        return onnx.load(written, load_external_data=False).graph


def optimized_operators(path: Path) -> dict[str, int]:
    """The operators that a session of default options runs."""
    return dict(Counter(node.op_type for node in optimized(path).node).most_common())


def lower(program: Program, method: str, path: Path, options: LowerOptions) -> dict[str, Any]:
    """Write one method; its details."""
    options.progress(f"{method}: translating to ONNX")
    model = emit(program, method, FUSIONS, last_fusions=LAST_FUSIONS)
    counts = operators(model)
    options.progress(f"{method}: writing {path.name}, {sum(counts.values())} nodes")
    write(model, path)
    pairs = state_pairs(program.methods[method].signature)
    found = {
        "state": pairs,
        "in_place": in_place(model, pairs),
        "nodes": sum(counts.values()),
        "operators": counts,
        "optimized_operators": optimized_operators(path) if options.loads else None,
    }
    return {method: found}


class OnnxRuntimeTarget:
    """Writes `<method>.onnx` and `<method>.onnx.data` for every method."""

    name = "onnxruntime"
    capabilities = Capabilities(
        floats=("float32", "float16"),
        schemes={"linear": LINEAR, "conv": ("w8a8o", "w8"), "embedding": EMBEDDING},
        kv_cache=("float", "int8"),
        runs_on="CPUs; through ONNX Runtime's execution providers also GPUs and NPUs",
        base_bytes=520 << 20,
        scores=3.0,  # its arena keeps blocks of other sizes besides
        unmasked=0.0,
        sliced=True,
    )

    def legalize(self, program: Program) -> Program:
        """The same methods with their caches as inputs and outputs: an ONNX graph keeps no state. Large attention in
        slices."""
        return explicit_state(slice_attention(program))

    def lower(self, program: Program, directory: Path, options: LowerOptions) -> Lowered:
        files = {method: f"{method}.onnx" for method in program}
        methods: dict[str, Any] = {}
        for method, name in files.items():
            methods |= options.piece([method], partial(lower, program, method, directory / name, options))
        details = {"opset": OPSET, "methods": methods}
        if any("QuantizeLinear" in found["operators"] for found in methods.values()):
            details["without_vnni"] = WITHOUT_VNNI
        versions = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
        return Lowered(files, details, versions)


TARGET = OnnxRuntimeTarget()
