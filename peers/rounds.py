"""Contenders measured in turn, round by round, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peers.load import MEASURES
from peers.process import Failed

#: as many values as make a median
ROUNDS = 5


class Asked(Protocol):
    """A running contender."""

    hello: dict[str, Any]

    def ask(self, **request: Any) -> dict[str, Any]: ...

    def end(self) -> dict[str, Any]: ...


@dataclass
class Result:
    """A contender's seconds by measure, a value a round; `why` it has none, or no more."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_rss_bytes: int | None = None
    version: str | None = None
    load_seconds: float | None = None
    why: str | None = None

    def median(self, measure: str) -> float | None:
        """None where there are too few."""
        values = self.seconds.get(measure, [])
        return statistics.median(values) if len(values) >= ROUNDS else None


def turned(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: each begins one further on."""
    first = number % max(1, len(names))
    return [*names[first:], *names[:first]]


def measure_one(process: Asked, result: Result, measure: str, save: Path | None) -> None:
    """One value, or the reason that there are no more; a round with `save` warms up and counts for nothing."""
    try:
        answer = process.ask(do=measure, save=None if save is None else str(save))
        if not answer["finite"]:
            raise Failed(f"{measure}: the output has NaN or Inf")
    except Failed as failed:
        result.why = str(failed)
        return
    if save is None:
        result.seconds.setdefault(measure, []).append(answer["seconds"])


def alternate(
    processes: Mapping[str, Asked], rounds: int, outputs: Path, progress: Callable[[str], None]
) -> dict[str, Result]:
    """Every measure of every contender: once to warm up, its outputs saved as OUTPUTS/NAME-MEASURE.npy, then `rounds`.

    A contender that fails has its reason from there on, and the others go on.
    """
    results = {
        name: Result(version=process.hello["version"], load_seconds=process.hello["load_seconds"])
        for name, process in processes.items()
    }
    for number in range(rounds + 1):
        progress(f"round {number} of {rounds}" if number else "warming up")
        for measure in MEASURES:
            for name in turned(list(processes), number):
                if results[name].why is None and measure in processes[name].hello["measures"]:
                    save = None if number else outputs / f"{name}-{measure}.npy"
                    measure_one(processes[name], results[name], measure, save)
    for name, process in processes.items():
        if results[name].why is None:
            try:
                results[name].peak_rss_bytes = process.end()["peak_rss_bytes"]
            except Failed as failed:
                results[name].why = str(failed)
    return results
