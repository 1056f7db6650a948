"""The shipped checkpoint, traced, and its statistics on a few samples: collected once for all tests of a file."""

from __future__ import annotations

from functools import cache

from calibration.collect import collect
from calibration.samples import open_samples
from calibration.statistics import Statistics
from graphs.model import Model, Request, load_model
from graphs.program import Program
from graphs.trace import trace

COUNT = 4
SEED = 3


@cache
def nano() -> tuple[Model, Program]:
    """Immutable, so one serves all."""
    model = load_model(Request("mobilevlm"))
    return model, trace(model.architecture, model.weights)


def run() -> Statistics:
    """Statistics of the zoo's samples, collected anew."""
    return collect(*nano(), open_samples("zoo", COUNT, SEED), seed=SEED, rows=64)


@cache
def collected() -> Statistics:
    """The same, collected once."""
    return run()
