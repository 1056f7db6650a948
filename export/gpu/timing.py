"""How calls on a GPU are timed, by whoever makes them: the same inputs, the same warming up, the same medians."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

from graphs.dialogue import DECODER, VISION
from graphs.program import Signature
from runtimes.base import Array

#: seconds of one window of runs, how many windows there are at the most, and the share of a window's median that the
#: next must reach for the times to have settled: libraries compile kernels for the very shapes while others serve
WINDOW, WINDOWS, SETTLED = 0.8, 6, 0.95

#: runs of one window at the least, and at the most
LEAST, MOST = 5, 200


def inputs_of(signatures: Mapping[str, Signature], prompt: int) -> dict[str, list[list[Array]]]:
    """Seeded calls of every method; a stateful one reads `prompt` embeddings and then three single ones."""
    lengths = {name: (prompt, 1, 1, 1) if signature.state else () for name, signature in signatures.items()}
    return {
        name: [[t.numpy() for t in call] for call in signature.method(name).examples(0, lengths[name])]
        for name, signature in signatures.items()
    }


def calls_of(inputs: Mapping[str, list[list[Array]]]) -> dict[str, tuple[str, list[Array]]]:
    """The calls that are timed, of an image-text decoder: their methods and inputs."""
    return {
        "vision_ms": (VISION, inputs[VISION][0]),
        "prefill_ms": (DECODER, inputs[DECODER][0]),
        "decode_ms": (DECODER, inputs[DECODER][1]),
    }


def median_ms(run: Callable[[], object], window: float = WINDOW) -> float:
    """Milliseconds of one `run`, which ends when the device has: the median of the window in which it was settled."""
    run()
    last = math.inf
    for _ in range(WINDOWS):
        now = window_ms(run, window)
        if now >= SETTLED * last:
            return now
        last = now
    return last


def window_ms(run: Callable[[], object], seconds: float) -> float:
    """The median over a window of so many seconds."""
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < LEAST or (time.perf_counter() - begin < seconds and len(taken) < MOST):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)
