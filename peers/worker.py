"""A contender in a process of its own, asked over standard input and answering over standard output.

One JSON document a line: `{"do": "prefill", "save": PATH or null}` is answered by `{"seconds": .., "finite": ..}`, and
`{"do": "end"}` by the peak memory of the whole process. The first line says that it is loaded. Only the work is timed;
`save` writes the output, for its accuracy, after the clock has stopped.

    python -m peers.worker MODULE DIRECTORY...
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from peers.load import MEASURES, THREADS, Array
from peers.process import peak_rss_bytes


class Contender(Protocol):
    """What a contender's module gives by `load(*directories)`; besides `version`, a method of each measure it takes.

    `prefill`, `decode` and `ttft` return the logits [V] after their last token, `vision` the picture's embeddings.
    """

    version: str


def timed(method: Callable[[], Array], save: str | None) -> dict[str, Any]:
    """One measure, its output checked."""
    start = time.perf_counter()
    output = method()
    seconds = time.perf_counter() - start
    if save is not None:
        np.save(save, output)
    return {"seconds": seconds, "finite": bool(np.isfinite(output).all())}


def serve(contender: Contender, requests: IO[str], replies: IO[str], loading: float) -> None:
    """Answer until the end."""

    def say(reply: Mapping[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    measures = [measure for measure in MEASURES if hasattr(contender, measure)]
    say({"version": contender.version, "load_seconds": loading, "measures": measures})
    for line in requests:
        request = json.loads(line)
        if request["do"] == "end":
            say({"peak_rss_bytes": peak_rss_bytes("self")})
            return
        say(timed(getattr(contender, request["do"]), request.get("save")))


def main() -> None:
    """Whatever a library prints goes to standard error: replies have a descriptor of their own."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    module, *directories = sys.argv[1:]
    start = time.perf_counter()
    contender = import_module(module).load(*map(Path, directories))
    serve(contender, sys.stdin, replies, time.perf_counter() - start)


if __name__ == "__main__":
    main()
