"""`--max-memory`: what an export will take at its peak, said before it starts, and a watch over what it takes.

The estimate is of resident memory of the whole process, as docs/large-models.md measures it: what libraries and graphs
of a target take, and on top of that the most that one stage needs. The watch stops an export that goes beyond the
ceiling all the same, and nothing is left behind.
"""

from __future__ import annotations

import math
import re
import signal
import threading
from _thread import interrupt_main
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from calibration.collect import METHODS, ROWS
from calibration.moments import MODALITIES
from calibration.observe import Observer
from calibration.sweep import extent
from calibration.sweep import size as size_of
from export.memory import KEPT_BYTES, resident_bytes
from export.sample import float32_bytes
from export.stability import part
from export.targets.attention_slices import ATTENTION, slices
from export.targets.base import Capabilities
from graphs.dialogue import EMBEDDING, VISION
from graphs.errors import UserError
from graphs.program import Program
from quant.resolve import Resolved

#: what torch takes to run a part besides weights and state, in its largest value: what is read, given and in between
VALUES = 3

#: bytes of memory for each byte of weights that a target's runtime has loaded
LOADED = 1.15

#: bytes of memory for each number of a weight that is written: quantized, its integers, what is packed of them and
#: scales; else a copy in float32 and the checkpoint's pages
CODED, COPIED = 3.7, 6.0

#: bytes of memory for each byte that calibration holds: the heap keeps gaps between what stays
COLLECTED = 1.6

#: tokens of a prompt that calibration reads, besides those of its picture
TEXT_TOKENS = 64

#: what rounding by second moments takes, in matrices of them: those of modalities, what they are weighed into, its
#: factor, what factoring it takes, and the rows that are rounded
FACTORED = 8

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


def collected_bytes(program: Program, resolved: Resolved, samples: int, tokens: int) -> int:
    """What collecting statistics of samples takes, whose pictures are so many tokens: see `calibration.sweep`."""
    pattern = re.compile("") if resolved.needs_hessians else None
    found = 0
    for method in (method for method in METHODS if method in program):
        observer = Observer(program, method, hessians=pattern, rows=ROWS, outputs=0, seed=0)
        held = observer.held_bytes(1 if method == VISION else len(MODALITIES))
        found = max(found, held + samples * observer.sweep.passed_bytes(tokens + TEXT_TOKENS))
    return found + float32_bytes(part(program, {EMBEDDING} & set(program)))  # which is called all along


@dataclass(frozen=True)
class Widest:
    """Bytes of the largest value that a method computes of an example, of what attention's scores take in a target's
    runtime (torch has some of them at a time), and of the state."""

    value: int
    scores: int
    state: int

    @classmethod
    def of(cls, program: Program, table: Capabilities) -> Widest:
        """Over all methods."""
        value = scores = state = 0
        for traced in program.methods.values():
            signature = traced.signature
            length = signature.method("checked").example_length
            state = max(state, sum(math.prod(spec.size({})) * spec.dtype.itemsize for spec in signature.state))
            for node in traced.exported.graph.nodes:
                if node.op == "call_function":
                    value = max(value, size_of(node.meta.get("val"), length))
                if node.target is ATTENTION:
                    query, key = (read.meta["val"].shape for read in node.all_input_nodes[:2])
                    whole = 4 * math.prod(extent(side, length) for side in (*query[:-1], key[-2]))
                    times = table.scores if len(node.all_input_nodes) > 3 else table.unmasked
                    scores = max(scores, int(times * whole) // (slices(node) if table.sliced else 1))
        return cls(value, scores, state)


def largest_bytes(program: Program, resolved: Resolved) -> int:
    """What writing one weight takes, of the one that takes most."""
    return max(
        int((CODED if (method, entry) in resolved.layers else COPIED) * traced.exported.state_dict[entry].numel())
        for method, traced in program.methods.items()
        for entry in traced.weight_names
    )


def factored_bytes(resolved: Resolved) -> int:
    """What rounding by second moments takes: for the widest layer."""
    chosen = (layer.inputs for layer, _, rule in resolved.layers.values() if rule.scales == "gptq")
    return FACTORED * 4 * max(chosen, default=0) ** 2


def needed(
    table: Capabilities, whole: Program, checked: Program, resolved: Resolved, samples: int, tokens: int
) -> Mapping[str, int]:
    """Bytes of resident memory that each stage takes at its peak; `checked` is the part of `whole` that is run.

    `samples`: how many are calibrated with, `tokens`: those of a picture.
    """
    widest = Widest.of(checked, table)
    by_torch = float32_bytes(checked) + KEPT_BYTES + VALUES * widest.value + widest.state
    computed = table.values * widest.value + widest.scores + 3 * widest.state
    if table.evaluated:
        loaded = table.evaluated * max(float32_bytes(part(checked, [method])) for method in checked)
    else:
        loaded = LOADED * resolved.weight_bytes(checked)
    run = int(max(by_torch, loaded + computed))
    times = table.held if resolved.layers else max(table.held, table.held_floats)
    held = int(times * resolved.weight_bytes(whole))
    written = largest_bytes(whole, resolved) + KEPT_BYTES  # beside what checking has left free, not returned
    stages = {
        "verify": table.base_bytes + run,
        # limits are found by running it, too
        "lower": table.base_bytes + max(run, held + written) + factored_bytes(resolved),
    }
    if resolved.needs_statistics and samples:
        stages["calibrate"] = table.base_bytes + int(COLLECTED * collected_bytes(whole, resolved, samples, tokens))
    return stages


def check_memory(stages: Mapping[str, int], ceiling: int | None) -> None:
    """Raise UserError where a stage would take more than `ceiling` bytes, naming what it takes."""
    stage = max(stages, key=stages.__getitem__)
    if ceiling is not None and stages[stage] > ceiling:
        raise UserError(
            f"--max-memory {size(ceiling)} is not enough: {largest(stages)}"
            + ("; --verify sample takes less" if stage == "verify" else "")
            + ("; a recipe without calibration takes less" if stage == "calibrate" else "")
        )


def largest(stages: Mapping[str, int]) -> str:
    """In words, which stage takes most, and how much."""
    stage = max(stages, key=stages.__getitem__)
    return f"{stage} will take about {size(stages[stage])}"


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
