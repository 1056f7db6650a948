"""The stages of a long job: progress as it runs, and seconds and peak memory of each afterwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from export.memory import peak_rss_bytes, reclaim, reset_peak

Progress = Callable[[str], None]


def to_stderr(line: str) -> None:
    """Progress for people: standard output stays free for results."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def silent(line: str) -> None:
    """No progress."""


@dataclass
class Stages:
    """Runs named stages in order; `records` is what the manifest keeps of them, with what was `estimated` of peaks."""

    progress: Progress
    names: tuple[str, ...]
    records: list[dict[str, Any]] = field(default_factory=list)
    estimated: Mapping[str, int] = field(default_factory=dict)  # bytes, by stage

    @contextmanager
    def __call__(self, name: str, what: str = "") -> Iterator[Progress]:
        """Run one stage; gives a function that reports its detail lines."""
        number = f"[{self.names.index(name) + 1}/{len(self.names)}] {name}"
        self.progress(f"{number}: {what}" if what else number)
        if name != self.names[-1]:  # which needs little
            reclaim()
        reset_peak()
        start = time.perf_counter()
        yield lambda line: self.progress(f"      {line}")
        seconds, peak = time.perf_counter() - start, peak_rss_bytes()
        record = {"name": name, "seconds": round(seconds, 3), "peak_rss_bytes": peak}
        estimated = {"estimated_rss_bytes": self.estimated[name]} if name in self.estimated else {}
        self.records.append(record | estimated)
        self.progress(f"      {seconds:.1f} s, peak memory {peak / 2**20:.0f} MiB")
