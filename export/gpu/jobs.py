"""What `make bench-gpu` runs, as commands: what is exported, what is timed, and how much of the time each may take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

#: number formats and the recipes that give them; those in `CALIBRATED` read ranges of activations
RECIPES = {
    "fp16": "reference-fp16",
    "int8": "server-int8",
    "int4": str(HERE / "int4.toml"),
    "fp8": "server-fp8",
}
CALIBRATED = ("int8", "fp8")

#: samples that ranges are read from: enough to run, weights of the large size being random
SAMPLES = 2

#: embeddings of the prompt, a picture's among them, and tokens that are made of it
PROMPT, NEW_TOKENS = 160, 64

#: the size whose weights are drawn at random, and the trained one that is tried besides, which always fits the time
LARGE, SMALL = "mobilevlm-1.7b", "mobilevlm-nano"

#: cores and memory that one export is given
CORES, MEMORY_BYTES = 4, 12 << 30


@dataclass(frozen=True)
class Size:
    """One model: `checkpoint` is what an export reads, `make` the command that writes that first, if any."""

    name: str
    checkpoint: str
    make: tuple[str, ...] = ()


def sizes(scratch: Path, checkpoint: str | None) -> tuple[Size, ...]:
    """The large one, of the user's checkpoint or one made here, and the small one."""
    made = str(scratch / LARGE)
    command = (sys.executable, "-m", "zoo.random_checkpoint", "mobilevlm", "--variant", LARGE, "--out", made)
    large = Size(LARGE, made, command) if checkpoint is None else Size(Path(checkpoint).name, checkpoint)
    return large, Size(SMALL, f"zoo:{SMALL}")


@dataclass(frozen=True)
class Engine:
    """A bundle of TensorRT engines. `hidden`: built as if there were no GPU."""

    size: Size
    numbers: str
    builder: str = "tensorrt-rtx"
    hidden: bool = False

    @property
    def key(self) -> str:
        return "-".join((self.size.name, self.numbers, self.builder, *(["nogpu"] if self.hidden else [])))

    def out(self, scratch: Path) -> Path:
        return scratch / self.key

    def command(self, scratch: Path) -> list[str]:
        """`vlmx export`, which runs what it built on the GPU and compares it with the graph."""
        given = ["--checkpoint", self.size.checkpoint, "--target", "tensorrt", "--builder", self.builder]
        given += ["--quant", RECIPES[self.numbers], "--out", str(self.out(scratch)), "--force"]
        if self.numbers in CALIBRATED:
            given += ["--calibration", str(statistics(self.size, scratch))]
        return [sys.executable, "-m", "export.cli", "export", "mobilevlm", *given]


def statistics(size: Size, scratch: Path) -> Path:
    """Where a size's ranges are kept."""
    return scratch / f"{size.name}.safetensors"


def calibrate(size: Size, scratch: Path) -> list[str]:
    """The command that reads a size's ranges once, for all recipes that need them."""
    out = ["--count", str(SAMPLES), "--out", str(statistics(size, scratch)), "--force"]
    return [sys.executable, "-m", "export.cli", "calibrate", "mobilevlm", "--checkpoint", size.checkpoint, *out]


def engines(size: Size, builders: Sequence[str]) -> Iterator[Engine]:
    """Every bundle of a size: all number formats by the first builder, half precision by the others, and, of the small
    size, half precision built as on a machine without a GPU."""
    first, *others = builders
    yield from (Engine(size, numbers, first) for numbers in RECIPES)
    yield from (Engine(size, "fp16", other) for other in others)
    if size.name == SMALL and first == "tensorrt-rtx":
        yield Engine(size, "fp16", first, hidden=True)


def at_a_time(cores: int, memory_bytes: int) -> int:
    """How many exports run side by side."""
    return max(1, min(cores // CORES, memory_bytes // MEMORY_BYTES))


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass
class Budget:
    """Seconds for everything; `left` never goes below zero."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return max(0.0, self.start + self.seconds - time.monotonic())

    def until(self, share: float) -> float:
        """Seconds until that share of the whole is spent."""
        return max(0.0, self.left - (1 - share) * self.seconds)


@dataclass(frozen=True)
class Ran:
    """How a command ended: `why` is None where it did what it should, else its last words, in one line."""

    seconds: float
    why: str | None


def run(command: Sequence[str], limit: float, log: Path, threads: int, hidden: bool = False) -> Ran:
    """Run a command of this project for at most `limit` seconds, what it says into `log`; nothing it started stays."""
    if limit < 1:
        return Ran(0.0, "not run: no time was left")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if hidden:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    start = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Ran(time.monotonic() - start, f"stopped after {limit:.0f} s; last: {last_words(log)}")
    seconds = time.monotonic() - start
    return Ran(seconds, None if status == 0 else last_words(log) or f"exit status {status}")


def last_words(log: Path) -> str:
    """The last line of a log that says anything."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def described(engine: Engine) -> dict[str, Any]:
    """What a row says of an engine before anything ran."""
    built = "as on a machine without a GPU" if engine.hidden else "on this machine"
    return {"by": engine.builder, "size": engine.size.name, "numbers": engine.numbers, "built": built}
