"""An ONNX file's outputs against its Program's, for targets whose own artefact cannot run on this machine."""

from __future__ import annotations

from pathlib import Path

from export.verify import relative_l2
from graphs.errors import GateError
from graphs.files import reason
from graphs.program import Program
from runtimes.eager import EagerRuntime

#: larger methods are not evaluated: it would hold their weights in memory twice
MAX_WEIGHT_BYTES = 2 << 30


def evaluate(program: Program, method: str, path: Path, limit: float) -> str:
    """What onnxruntime makes of `path` against the program, in words. Raises GateError beyond `limit`.

    The method owns no state (`state_io.explicit_state`): caches are seeded inputs and compared outputs like any others.
    """
    import onnxruntime

    traced = program.methods[method]
    size = sum(tensor.nbytes for tensor in traced.exported.state_dict.values())
    if size > MAX_WEIGHT_BYTES:
        return f"not evaluated (its weights are {size / 2**30:.1f} GiB)"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    by = f"onnxruntime {onnxruntime.__version__}"
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its error types share no public base class
        raise GateError(f"{method}: {by} cannot load the ONNX graph: {reason(error)}") from error
    eager = EagerRuntime(program)
    worst = 0.0
    for example in traced.signature.method(method).examples(lengths=(12, 1)):
        inputs = [tensor.numpy() for tensor in example]
        feeds = {spec.name: array for spec, array in zip(traced.signature.inputs, inputs, strict=True)}
        worst = max(worst, relative_l2(session.run(None, feeds), eager.call(method, inputs)))
    if worst > limit:
        raise GateError(
            f"{method}: relative L2 of the ONNX graph, run by {by}, is {worst:.2e}; the limit is {limit:.0e}"
        )
    return f"evaluated by {by}: relative L2 {worst:.1e}"
