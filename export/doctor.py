"""`vlmx doctor`: what each target can do on this machine, found out by asking its libraries."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

#: target -> module that lowers for it, and the distribution whose version counts
LIBRARIES = {
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "executorch": ("executorch.exir", "executorch"),
    "coreml": ("coremltools", "coremltools"),
    "tensorrt": ("tensorrt_rtx", "tensorrt-rtx-cu13"),
}


def gpu() -> str | None:
    """The NVIDIA GPU's name, None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.splitlines()[0] if answer.returncode == 0 and answer.stdout else None


def runs_tensorrt() -> str:
    """Whether engines can be executed here."""
    name = gpu()
    return f"yes, on {name}" if name else "no: no NVIDIA GPU here; engines are built and not executed"


def runs_coreml() -> str:
    """What checks Core ML packages here."""
    if sys.platform == "darwin":
        return "yes, by Core ML"
    return "no Core ML here (macOS only); the saved package's numbers are checked by the reference evaluator"


RUNS: dict[str, Callable[[], str]] = {
    "onnxruntime": lambda: "yes, on the CPU",
    "executorch": lambda: "yes, by the runtime in the executorch wheel",
    "coreml": runs_coreml,
    "tensorrt": runs_tensorrt,
}


def doctor() -> dict[str, Any]:
    """For each target whether it lowers and runs here, and why not."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform(), "targets": {}}
    for target, (module, distribution) in LIBRARIES.items():
        try:
            importlib.import_module(module)
            lowers, runs = f"yes, {distribution} {version(distribution)}", RUNS[target]()
        except (ImportError, PackageNotFoundError, OSError) as error:
            lowers, runs = f"no: {error}; install it with `pip install {distribution}`", "no"
        found["targets"][target] = {"lowers": lowers, "runs": runs}
    try:
        found["full_tensorrt"] = version("tensorrt-cu13")
    except PackageNotFoundError:
        found["full_tensorrt"] = None
    return found


def describe(found: dict[str, Any]) -> str:
    """The findings for people."""
    lines = [f"Python {found['python']} on {found['system']}"]
    for target, row in found["targets"].items():
        lines += [f"{target}", f"  lowers here: {row['lowers']}", f"  runs here:   {row['runs']}"]
    full = found["full_tensorrt"]
    lines.append(f"full TensorRT: {full or 'not installed (extra [tensorrt]; TensorRT-RTX builds the engines)'}")
    return "\n".join(lines)
