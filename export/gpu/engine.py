"""Times the engines of one bundle on the GPU: `python -m export.gpu.engine BUNDLE ROW OUTPUTS`.

Two kinds of time: of the device alone, with inputs and outputs left on it (what torch is compared by), and through the
runtime, which carries pictures, embeddings and logits over the bus (what a user of this runtime waits for).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from export.bench import seeded_prompt
from export.check import recorded_limits
from export.gate import execute
from export.gpu.jobs import NEW_TOKENS, PROMPT
from export.gpu.timing import WINDOW, calls_of, inputs_of, median_ms
from export.quiet import quiet_libraries
from export.verify import load_vectors, record, save_vectors
from graphs.errors import GateError
from runtimes.base import Array
from runtimes.cuda import Cuda
from runtimes.generate import generate
from runtimes.manifest import VECTORS, Bundle, inside
from runtimes.session import open_runtime
from runtimes.tensorrt import TensorRTRuntime

#: answers that are generated, after one that warms up
ANSWERS = 3


def prompt_length(bundle: Bundle) -> int:
    """Embeddings of the prompt: as many as are asked for, if the context has room for the answer too."""
    return int(min(PROMPT, bundle.manifest["prompt"]["context"] - NEW_TOKENS))


def device_times(
    runtime: TensorRTRuntime, inputs: dict[str, list[list[Array]]], window: float = WINDOW
) -> dict[str, float]:
    """Milliseconds of each call on the device alone. State is left as the last call read it."""
    found = {}
    for name, (method, arrays) in calls_of(inputs).items():
        engine = runtime.engines[method]
        bound = engine.bind(arrays)

        def run(engine: Any = engine, bound: Any = bound) -> None:
            engine.enqueue(bound)
            engine.synchronize()

        found[name] = median_ms(run, window)
    return found


def answers(runtime: TensorRTRuntime, bundle: Bundle) -> dict[str, float]:
    """What `vlmx bench` measures: a picture and text answered through the runtime, medians."""
    visual = bundle.manifest["prompt"].get("visual_tokens") or 0
    segments = seeded_prompt(bundle, max(1, prompt_length(bundle) - visual))
    context, runs = bundle.manifest["prompt"]["context"], []
    for _ in range(ANSWERS + 1):
        *_, last = generate(runtime, segments, context=context, max_new_tokens=NEW_TOKENS)
        runs.append(last)
    steps = [seconds for run in runs[1:] for seconds in run.decode_seconds]
    return {
        "first_token_ms": 1e3 * statistics.median(run.first_token_seconds for run in runs[1:]),
        "decode_tokens_per_s": 1 / statistics.median(steps),
    }


def checked(runtime: TensorRTRuntime, bundle: Bundle) -> dict[str, Any]:
    """The `lower` entries: run here on the bundle's own vectors, or, where a sample was run, those of the export."""
    if bundle.manifest.get("left_out"):
        return {name: entry["lower"] for name, entry in bundle.manifest["verification"].items()}
    vectors = load_vectors(inside(bundle.directory, VECTORS), bundle.artifact.signatures)
    return execute(runtime, vectors, recorded_limits(bundle), str(bundle.directory))


def measure(directory: Path, outputs: Path) -> dict[str, Any]:
    """One row; what the methods gave for seeded inputs goes into the file `outputs`."""
    bundle = Bundle.open(directory)
    memory = Cuda()
    free, start = memory.free_bytes(), time.perf_counter()
    runtime = open_runtime(bundle)
    assert isinstance(runtime, TensorRTRuntime)
    row: dict[str, Any] = {"version": runtime.version, "load_s": time.perf_counter() - start}
    inputs = inputs_of(bundle.artifact.signatures, prompt_length(bundle))
    start = time.perf_counter()
    save_vectors(outputs, record(runtime, inputs))
    row["first_calls_s"] = time.perf_counter() - start
    try:
        row["lower"] = checked(runtime, bundle)
    except GateError as error:
        row["wrong"] = str(error)
    row |= device_times(runtime, inputs) | answers(runtime, bundle)
    return row | {"memory_bytes": free - memory.free_bytes()}


def main() -> int:
    """Write the row of one bundle; a traceback's last line says why there is none."""
    directory, row, outputs = map(Path, sys.argv[1:])
    quiet_libraries()
    row.write_text(json.dumps(measure(directory, outputs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
