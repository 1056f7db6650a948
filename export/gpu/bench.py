"""`make bench-gpu`: exports MobileVLM to TensorRT engines in fp16, int8, int4 and fp8, runs, checks and times them on
this machine's NVIDIA GPU beside torch, and writes docs/benchmarks/gpu.json and gpu.md, all within ten minutes.

Exports run side by side first; then one engine, or torch, has the GPU for itself at a time. A step that fails or for
which no time is left becomes a row with its reason, and the others go on. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from export.gpu import jobs
from export.gpu.jobs import Budget, Engine, Size
from export.gpu.page import page
from export.stages import Progress, to_stderr
from export.verify import compare, load_vectors
from graphs.errors import UserError
from graphs.files import write_whole
from runtimes.base import Unavailable
from runtimes.cuda import Cuda
from runtimes.manifest import MANIFEST, Bundle
from runtimes.tensorrt_api import LIBRARIES

Row = dict[str, Any]

#: shares of the whole time after which no checkpoint is written, no range read, no engine built, and torch stops
MAKE, RANGES, BUILD, TORCH = 0.2, 0.35, 0.6, 0.97

#: seconds that one engine may take to load, be checked and timed
RUN_S = 90.0


def facts() -> dict[str, Any]:
    """The machine and the versions that the numbers depend on. Raises Unavailable without a GPU."""
    device = Cuda()
    found = device.facts() | {"driver": driver(), "cores": os.cpu_count(), "system": platform.platform()}
    device.close()
    packages: dict[str, str | None] = {}
    for name in ("torch", "tensorrt-rtx-cu13", "tensorrt-cu13", "onnx", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return found | {"python": platform.python_version(), "packages": packages}


def driver() -> str | None:
    """The driver's version, None where nvidia-smi does not tell it."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else None


@dataclass
class Results:
    """What is known so far, on disk each time something is added."""

    out: Path
    machine: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        table = {"machine": self.machine, "notes": self.notes, "rows": self.rows}
        write_whole(self.out / "gpu.json", json.dumps(table, indent=1) + "\n")
        write_whole(self.out / "gpu.md", page(table))


@dataclass
class Run:
    """One run of everything."""

    scratch: Path
    budget: Budget
    results: Results
    say: Progress
    torch_python: str
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)

    def log(self, name: str) -> Path:
        return self.scratch / f"{name}.log"

    def prepare(self, size: Size) -> str | None:
        """Write a size's checkpoint, and read its ranges; why exports of it cannot be, or None."""
        if size.make:
            self.say(f"{size.name}: writing random weights")
            made = jobs.run(size.make, self.budget.until(MAKE), self.log(f"{size.name}-make"), self.cores)
            if made.why:
                return f"no checkpoint: {made.why}"
        self.say(f"{size.name}: reading ranges")
        command, log = jobs.calibrate(size, self.scratch), self.log(f"{size.name}-ranges")
        ranges = jobs.run(command, self.budget.until(RANGES), log, self.cores)
        if ranges.why:
            self.results.notes.append(f"{size.name} has no ranges for static activations: {ranges.why}")
        return None

    def build(self, engine: Engine) -> Row:
        """Export one bundle; a row that has failed, or what the export took."""
        self.say(f"{engine.key}: exporting")
        limit, log = self.budget.until(BUILD), self.log(engine.key)
        ran = jobs.run(engine.command(self.scratch), limit, log, jobs.CORES, engine.hidden)
        if ran.why:
            return {"export_s": ran.seconds, "failed": f"export: {ran.why}"}
        manifest = json.loads((engine.out(self.scratch) / MANIFEST).read_text())
        return {
            "export_s": ran.seconds,
            "file_bytes": sum(record["bytes"] for record in manifest["files"].values()),
            "export_peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in manifest["stages"]),
            "schemes": manifest["quantization"]["schemes"],
        }

    def time(self, engine: Engine) -> Row:
        """Run and time what was built."""
        self.say(f"{engine.key}: running")
        out, outputs = self.scratch / f"{engine.key}.json", self.outputs(engine.key)
        command = [sys.executable, "-m", "export.gpu.engine", str(engine.out(self.scratch)), str(out), str(outputs)]
        ran = jobs.run(command, min(RUN_S, self.budget.left), self.log(engine.key), self.cores)
        found: Row = {"failed": f"run: {ran.why}"} if ran.why else json.loads(out.read_text())
        return found

    def outputs(self, key: str) -> Path:
        return self.scratch / f"{key}-outputs.safetensors"

    def torch(self, size: Size) -> list[Row]:
        """torch's rows of a size; one with the reason where there are none."""
        self.say(f"{size.name}: torch, eager and compiled")
        rows, log = self.scratch / f"{size.name}-torch.json", self.log(f"{size.name}-torch")
        command = [self.torch_python, "-m", "export.gpu.reference", size.checkpoint, str(rows)]
        ran = jobs.run([*command, str(self.outputs(size.name))], self.budget.until(TORCH), log, self.cores)
        found: list[Row] = json.loads(rows.read_text()) if rows.exists() else []
        if ran.why and len(found) < 2:
            missing = "torch.compile" if found else "torch"
            found.append({"by": missing, "numbers": "fp16", "failed": ran.why})
        return [{"size": size.name, **row} for row in found]

    def against_eager(self, engine: Engine) -> dict[str, Any]:
        """Errors of an engine's outputs against torch eager's in half precision on the same GPU, where both ran."""
        ours, theirs = self.outputs(engine.key), self.outputs(engine.size.name)
        if not (ours.exists() and theirs.exists()):
            return {}
        signatures = Bundle.open(engine.out(self.scratch)).artifact.signatures
        return {"against_eager": compare(*(load_vectors(path, signatures) for path in (ours, theirs)))}

    def everything(self, sizes: Sequence[Size], builders: Sequence[str]) -> None:
        """Prepare, build, run the engines of one size after the other, then torch; rows appear as they are known."""
        unable = {size.name: attempt(lambda size=size: self.prepare(size)) for size in reversed(sizes)}  # type: ignore[misc]
        wanted = [engine for size in sizes for engine in jobs.engines(size, builders)]

        def build(engine: Engine) -> Row:
            why = unable[engine.size.name]
            return self.build(engine) if why is None else {"failed": why}

        with ThreadPoolExecutor(jobs.at_a_time(self.cores, jobs.memory_bytes())) as pool:
            built = list(pool.map(lambda engine: kept(engine, lambda: build(engine)), wanted))
        for engine, row in zip(wanted, built, strict=True):
            self.results.add(row if "failed" in row else row | kept(engine, lambda: self.time(engine)))  # noqa: B023
        for size in sizes:
            if unable[size.name] is None:
                for row in self.torch(size):
                    self.results.add(row)
        for engine, row in zip(wanted, self.results.rows, strict=False):
            if "failed" not in row:
                row |= kept(engine, lambda: self.against_eager(engine))  # noqa: B023
        self.results.write()


def attempt(step: Callable[[], str | None]) -> str | None:
    """What a step says, or what it raised, in one line."""
    try:
        return step()
    except Exception as error:  # the others go on
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def kept(engine: Engine, step: Callable[[], Row]) -> Row:
    """What a step adds to an engine's row; what it raised is a reason."""
    try:
        return jobs.described(engine) | step()
    except Exception as error:  # the others go on
        return jobs.described(engine) | {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def builders() -> list[str]:
    """The libraries that are installed, the one that needs no GPU to build first."""
    found = [name for name, library in LIBRARIES.items() if library.load() is not None]
    return sorted(found, key=lambda name: not LIBRARIES[name].builds_without_gpu)


def main() -> int:
    """Run everything within the time; 1, and one line, where there is no GPU or nothing that builds engines."""
    parser = argparse.ArgumentParser(prog="python -m export.gpu.bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="the folder to write to")
    parser.add_argument("--checkpoint", help="instead of random weights of MobileVLM 1.7B")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter whose torch has CUDA")
    args = parser.parse_args()
    try:
        machine = facts()
        if not builders():
            raise UserError("neither TensorRT-RTX nor TensorRT is installed")
    except (Unavailable, UserError) as why:
        to_stderr(f"bench-gpu: {why}; nothing was run or written")
        return 1
    budget = Budget(60 * args.minutes - 15)  # the rest: to tidy up, and to write
    with TemporaryDirectory(prefix="vlmx-gpu-") as folder:
        scratch = Path(folder)
        run = Run(scratch, budget, Results(args.out, machine), to_stderr, args.torch_python)
        run.everything(jobs.sizes(scratch, args.checkpoint), builders())
    failed = sum("failed" in row for row in run.results.rows)
    to_stderr(f"{args.out / 'gpu.md'}: {len(run.results.rows)} rows, {failed} without numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
