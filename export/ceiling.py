"""`--max-memory`: what an export will take at its peak, said before it starts, and a watch over what it takes.

The estimate is of resident memory of the whole process, as docs/large-models.md measures it: what libraries and graphs
of a target take, and on top of that the most that one stage needs. The watch stops an export that goes beyond the
ceiling all the same, and nothing is left behind.
"""

from __future__ import annotations

import re
import signal
import threading
from _thread import interrupt_main
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from export.memory import resident_bytes
from export.sample import float32_bytes
from export.targets.base import Capabilities
from graphs.errors import UserError
from graphs.program import Program
from quant.resolve import Resolved

#: bytes of memory for each byte of float32 weights that are run to check a lowered graph: they, and temporaries
RUN = 1.3

#: the same for calibration, which runs the whole model and keeps what it has seen of each layer
CALIBRATED = 1.5

#: seconds between two looks, in which an export allocates some tens of MiB
PERIOD = 0.005

#: of the ceiling, where the watch stops an export
NEARLY = 0.97

#: what stops the main thread; not the one of Ctrl-C, which jobs of a shell's background ignore
SIGNAL = signal.SIGUSR1


class Beyond(KeyboardInterrupt):
    """The process is about to take more than it may."""


def parse_bytes(text: str) -> int:
    """Bytes of "2GiB", "900 MB", "2g" (binary) or "1073741824". Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([KMGT]?)(IB|B?)", text.strip().upper())
    if found is None:
        raise ValueError(f"{text} is no size: write it as 2GiB or 900MB")
    number, prefix, suffix = found.groups()
    value = int(float(number) * (1000 if prefix and suffix == "B" else 1024) ** " KMGT".index(prefix or " "))
    if value < 1:
        raise ValueError(f"{text} is not above 0")
    return value


def hessian_bytes(program: Program, resolved: Resolved) -> int:
    """What second moments of the inputs of all linear layers come to, [K, K] float32 each."""
    if not resolved.needs_hessians:
        return 0
    layers = {key: program.methods[key[0]].exported.state_dict[key[1]].shape for key in resolved.layers}
    return sum(4 * shape[-1] ** 2 for key, shape in layers.items() if resolved.layers[key][0].kind == "linear")


def needed(table: Capabilities, whole: Program, part: Program, resolved: Resolved) -> Mapping[str, int]:
    """Bytes of resident memory that each stage takes at its peak; `part` of `whole` is run to check it."""
    stages = {
        "verify": table.base_bytes + int(RUN * float32_bytes(part)),
        "lower": table.base_bytes + int(table.held * resolved.weight_bytes(whole)),
    }
    if resolved.needs_statistics:
        seen = CALIBRATED * float32_bytes(whole) + hessian_bytes(whole, resolved)
        stages["calibrate"] = table.base_bytes + int(seen)
    return stages


def check_memory(stages: Mapping[str, int], ceiling: int | None) -> None:
    """Raise UserError where a stage would take more than `ceiling` bytes, naming what it takes."""
    stage = max(stages, key=stages.__getitem__)
    if ceiling is not None and stages[stage] > ceiling:
        raise UserError(
            f"--max-memory {size(ceiling)} is not enough: {stage} will take about {size(stages[stage])}"
            + ("; --verify sample takes less" if stage == "verify" else "")
            + ("; a recipe without calibration takes less" if stage == "calibrate" else "")
        )


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / (1 << 30):.2f} GiB"


@contextmanager
def watched(ceiling: int | None) -> Iterator[None]:
    """Raise UserError when the process nears `ceiling` bytes: the main thread, which must call this, is interrupted."""
    if ceiling is None:
        yield
        return
    done = threading.Event()

    def stop(number: int, frame: object) -> None:
        raise Beyond

    def watch() -> None:
        while not done.wait(PERIOD):
            if resident_bytes() > NEARLY * ceiling:
                interrupt_main(SIGNAL)
                return

    thread, before = threading.Thread(target=watch, daemon=True), signal.signal(SIGNAL, stop)
    try:
        try:
            thread.start()  # inside: it may interrupt at once
            yield
        finally:
            done.set()
            thread.join()
            signal.signal(SIGNAL, before)
    except Beyond:
        raise UserError(f"stopped: the export was about to take more than --max-memory {size(ceiling)}") from None
