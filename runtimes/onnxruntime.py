"""ONNX Runtime: a session a method, the KV cache kept in buffers of the runtime's own between calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from graphs.errors import UserError
from graphs.files import reason
from graphs.program import Signature
from runtimes.base import Array, Artifact, Unavailable
from runtimes.onnx_files import checked_model
from runtimes.ort_saturation import WITHOUT_VNNI, saturates

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue


@dataclass
class Session:
    """One method: its session, which input carries which output over to the next call, and those buffers.

    A state in `in_place` has one buffer, bound as input and output, so that a call writes only its new rows; any other
    has two, exchanged after each call.
    """

    session: InferenceSession
    state: Mapping[str, str]
    in_place: frozenset[str]
    buffers: dict[str, tuple[OrtValue, OrtValue]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = [i.name for i in self.session.get_inputs() if i.name not in self.state]
        carried = set(self.state.values())
        self.outputs = [o.name for o in self.session.get_outputs() if o.name not in carried]
        self.reset()

    def reset(self) -> None:
        from onnxruntime import OrtValue

        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
        for node in self.session.get_inputs():
            if node.name in self.state:
                first, second = (
                    OrtValue.ortvalue_from_numpy(np.zeros(node.shape, dtypes[node.type])) for _ in range(2)
                )
                self.buffers[node.name] = (first, first if node.name in self.in_place else second)

    def call(self, inputs: Sequence[Array]) -> list[Array]:
        binding = self.session.io_binding()
        arrays = [np.ascontiguousarray(array) for array in inputs]  # kept until the run is over: binding does not copy
        for name, array in zip(self.inputs, arrays, strict=True):
            binding.bind_cpu_input(name, array)
        for name in self.outputs:
            binding.bind_output(name)
        for name, (past, present) in self.buffers.items():
            binding.bind_ortvalue_input(name, past)
            binding.bind_ortvalue_output(self.state[name], present)
        self.session.run_with_iobinding(binding)
        self.buffers = {name: (present, past) for name, (past, present) in self.buffers.items()}
        return [value.numpy() for value in binding.get_outputs()[: len(self.outputs)]]


class OnnxRuntime:
    """Runs on the CPU; `details["threads"]` sets the threads of one operator (default: the machine's cores).

    Where `details` have `without_vnni`, sessions are configured so on processors whose integer products saturate.
    """

    def __init__(self, sessions: Mapping[str, Session], signatures: Mapping[str, Signature], version: str) -> None:
        self.sessions, self.signatures = sessions, signatures
        self.version = version

    @classmethod
    def load(cls, artifact: Artifact) -> Self:
        try:
            import onnxruntime
        except ImportError as error:
            raise Unavailable("onnxruntime is not installed") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(artifact.details.get("threads", 0))
        options.log_severity_level = 3
        if "without_vnni" in artifact.details and saturates():
            for key, value in WITHOUT_VNNI.items():  # what a manifest names is for others: nobody vouches for it
                options.add_session_config_entry(key, value)
        sessions: dict[str, Session] = {}
        for method, name in artifact.files.items():
            path = checked_model(artifact.directory, name)
            details: Mapping[str, Any] = artifact.details["methods"][method]
            try:
                session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # its error types share no public base class
                raise UserError(f"{path}: ONNX Runtime cannot load it: {reason(error)}") from error
            sessions[method] = Session(session, details["state"], frozenset(details["in_place"]))
        return cls(sessions, artifact.signatures, f"onnxruntime {onnxruntime.__version__}")

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        return self.sessions[method].call(inputs)

    def reset(self) -> None:
        for session in self.sessions.values():
            session.reset()
