"""An ONNX file's outputs against its Program's, for targets whose own artefact cannot run on this machine."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch

import quant.ops  # noqa: F401  (defines torch.ops.vlmx)
from export.gate import Limit, distance
from export.verify import Call
from graphs.errors import GateError
from graphs.files import reason
from graphs.program import Program, TracedMethod
from graphs.rewrite import Opened
from quant.precision import cast_tensors
from runtimes.eager import EagerRuntime

#: larger methods are not evaluated: it would hold their weights in memory twice
MAX_WEIGHT_BYTES = 2 << 30

FLOAT, HALVES = ir.DataType.FLOAT, (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
TORCH_HALVES = (torch.float16, torch.bfloat16)


def evaluate(program: Program, method: str, path: Path, limit: Limit, seed: int = 0) -> str:
    """What onnxruntime makes of `path` against the program, in words. Raises GateError beyond `limit`.

    Inputs are drawn by `seed`. The method owns no state (`state_io.explicit_state`): caches are seeded inputs and
    compared outputs like any others. Nodes are evaluated one by one, none fused, so that what the file says is what is
    computed. Two kinds are evaluated in float32 on both sides, the same graphs with the same (rounded) weights: those
    in bfloat16, for which onnxruntime has no CPU kernels, and those in float16 that round activations to integers,
    where the last bit of a half decides the integer, so that any two orders of summation are as far apart as the
    quantization itself.
    """
    import onnxruntime

    traced = program.methods[method]
    size = sum(tensor.nbytes for tensor in traced.exported.state_dict.values())
    if size > MAX_WEIGHT_BYTES:
        return f"not evaluated (its weights are {size / 2**30:.1f} GiB)"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # values go when they were read: plain scores are large
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    by = f"onnxruntime {onnxruntime.__version__}"
    if needs_float32(traced):
        program, path, by = in_float32(program, method), widened(path), f"{by} in float32, both graphs"
        traced = program.methods[method]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its error types share no public base class
        raise GateError(f"{method}: {by} cannot load the ONNX graph: {reason(error)}") from error
    eager = EagerRuntime(program)
    actual, expected = [], []
    for example in traced.signature.method(method).examples(seed, lengths=(12, 1)):
        inputs = [tensor.numpy() for tensor in example]
        feeds = {spec.name: array for spec, array in zip(traced.signature.inputs, inputs, strict=True)}
        actual.append(Call(inputs, session.run(None, feeds)))
        expected.append(Call(inputs, eager.call(method, inputs)))
    found = distance(actual, expected, limit)
    if not limit.admits(found):
        raise GateError(f"{method}: relative L2 of the ONNX graph, run by {by}, is {found}; the limit is {limit}")
    return f"evaluated by {by}: relative L2 {found}"


def needs_float32(traced: TracedMethod) -> bool:
    """Whether a method is in bfloat16, or in float16 with activations rounded to integers."""
    dtypes = {tensor.dtype for tensor in traced.exported.state_dict.values()}
    rounds = traced.exported.graph.find_nodes(op="call_function", target=torch.ops.vlmx.quantize.default)
    return torch.bfloat16 in dtypes or (torch.float16 in dtypes and bool(rounds))


def in_float32(program: Program, method: str) -> Program:
    """`program` with one method computed in float32, from the values that its weights have in half precision."""
    traced = program.methods[method]
    inputs, outputs = (
        tuple(replace(spec, dtype=torch.float32) if spec.dtype in TORCH_HALVES else spec for spec in specs)
        for specs in (traced.signature.inputs, traced.signature.outputs)
    )
    signature = replace(traced.signature, inputs=inputs, outputs=outputs)
    opened = Opened.open(program.replace(method, replace(traced, signature=signature)), method)
    halves = {
        entry: partial(program.tensor, method, entry)
        for entry, tensor in traced.exported.state_dict.items()
        if tensor.dtype in TORCH_HALVES
    }
    with opened.mode:
        for half in TORCH_HALVES:
            cast_tensors(opened.module, torch.float32, half)
    for node in opened.graph.nodes:
        node.args = tuple(torch.float32 if arg in TORCH_HALVES else arg for arg in node.args)
        node.kwargs = {key: torch.float32 if arg in TORCH_HALVES else arg for key, arg in node.kwargs.items()}
    return opened.retrace(halves)


def widened(path: Path) -> Path:
    """The model at `path`, written anew beside it, in float32 instead of half precision; weights keep their values."""
    model = ir.load(path)
    nodes = list(model.graph.all_nodes())
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(o for node in nodes for o in node.outputs)]
    for value in values:
        if value.dtype in HALVES:
            value.type = ir.TensorType(FLOAT)
        if value.const_value is not None and value.const_value.dtype in HALVES:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
    for node in nodes:  # constants are initializers by now, only casts name a dtype
        target = node.attributes.get("to")
        if target is not None and target.value in HALVES:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
    wide_path = path.with_suffix(".float32.onnx")
    ir.save(model, wide_path, external_data=f"{wide_path.name}.data")
    return wide_path
