"""torch on the same GPU, eager and compiled, in fp16: `python -m export.gpu.reference CHECKPOINT ROWS OUTPUTS`.

The graphs are those that the engines were lowered from, with all tensors on the device. It needs torch with CUDA,
numpy, safetensors and Pillow, and so can be run by another interpreter than the pinned one.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from export.gpu.jobs import NEW_TOKENS, PROMPT
from export.gpu.timing import WINDOW, calls_of, inputs_of, median_ms
from export.verify import record, save_vectors
from graphs.model import Request, load_model
from graphs.program import Program, Signature
from graphs.trace import trace
from quant.precision import CastFloats
from runtimes.base import Array

#: what is timed, and how a graph becomes that
MODES: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "torch eager": lambda module: module,
    "torch.compile": lambda module: torch.compile(module, dynamic=False),
}


def half(checkpoint: str) -> tuple[Program, int]:
    """A checkpoint's program in half precision, and the embeddings of the prompt."""
    model = load_model(Request("mobilevlm", checkpoint=checkpoint))
    program = CastFloats(torch.float16).run(trace(model.architecture, model.weights))
    return program, min(PROMPT, model.architecture.facts()["context"] - NEW_TOKENS)


class OnDevice:
    """A program's methods with weights and state on a device: a runtime as all others are."""

    def __init__(self, program: Program, device: str) -> None:
        self.version, self.device = f"torch {torch.__version__} on {device}", device
        self.signatures: Mapping[str, Signature] = {name: t.signature for name, t in program.methods.items()}
        self.modules = {
            name: move_to_device_pass(program.exported(name), device).module(check_guards=False) for name in program
        }
        self.functions: dict[str, Callable[..., Any]] = dict(self.modules)

    def compiled(self, how: Callable[[nn.Module], Callable[..., Any]]) -> None:
        """Have every method run as `how` makes it."""
        self.functions = {name: how(module) for name, module in self.modules.items()}

    def run(self, method: str, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Tensors on the device, in and out; it has computed them when this returns."""
        with torch.inference_mode():
            outputs = self.functions[method](*inputs)
        if self.device != "cpu":
            torch.cuda.synchronize()
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    def held(self, inputs: Sequence[Array]) -> list[Tensor]:
        return [torch.from_numpy(array).to(self.device) for array in inputs]

    def call(self, method: str, inputs: Sequence[Array]) -> list[Array]:
        return [tensor.cpu().numpy() for tensor in self.run(method, self.held(inputs))]

    def reset(self) -> None:
        for name, module in self.modules.items():
            state = {spec.name for spec in self.signatures[name].state}
            for entry, buffer in module.named_buffers():
                if entry in state:
                    buffer.zero_()


def times(runtime: OnDevice, prompt: int, window: float = WINDOW) -> dict[str, float]:
    """Milliseconds of each call, its inputs on the device already."""
    found = {}
    for name, (method, arrays) in calls_of(inputs_of(runtime.signatures, prompt)).items():
        found[name] = median_ms(partial(runtime.run, method, runtime.held(arrays)), window)
    return found


def free_bytes(device: str) -> int:
    """Memory of the device that nobody has."""
    return int(torch.cuda.mem_get_info()[0]) if device != "cpu" else 0


def measure(checkpoint: str, rows: Path, outputs: Path, device: str, window: float = WINDOW) -> None:
    """A row for each mode into `rows`, written as soon as it is known; what eager gave for seeded inputs, `outputs`."""
    program, prompt = half(checkpoint)
    free, start = free_bytes(device), time.perf_counter()
    runtime = OnDevice(program, device)
    loaded = time.perf_counter() - start
    found: list[dict[str, Any]] = []
    for mode, how in MODES.items():
        row: dict[str, Any] = {"by": mode, "version": runtime.version, "numbers": "fp16", "load_s": loaded}
        try:
            start = time.perf_counter()
            runtime.reset()
            runtime.compiled(how)
            vectors = record(runtime, inputs_of(runtime.signatures, prompt))
            row["first_calls_s"] = time.perf_counter() - start
            if how is MODES["torch eager"]:
                save_vectors(outputs, vectors)
            row |= times(runtime, prompt, window) | {"memory_bytes": free - free_bytes(device)}
        except Exception as error:  # a mode that fails is a row too
            row["failed"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        found.append(row)
        rows.write_text(json.dumps(found))


def main() -> int:
    """Exit status 3, and why, where this torch has no GPU."""
    checkpoint, rows, outputs = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if not torch.cuda.is_available():
        kind = "sees no GPU" if torch.version.cuda else "is a CPU build"
        sys.stderr.write(f"not run: torch {torch.__version__} {kind}; give another interpreter as TORCH_PYTHON=\n")
        return 3
    measure(checkpoint, rows, outputs, "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
