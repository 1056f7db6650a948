"""A contender for the tests: counts, sleeps, and fails when asked to by its directories' names."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np


class Counter:
    version = "counter 1"

    def __init__(self, word: str) -> None:
        self.word, self.calls = word, 0

    def prefill(self) -> np.ndarray:
        sys.stdout.write("a library talks on standard output\n")
        os.write(1, b"and past Python, too\n")
        self.calls += 1
        if self.word == "dies" and self.calls == 3:
            sys.exit("died of old age")
        return np.full(3, np.nan if self.word == "nan" else self.calls)

    def vision(self) -> np.ndarray:
        time.sleep(0.05)
        return np.arange(4.0)


def load(directory: Path) -> Counter:
    if directory.name == "unloadable":
        raise SystemExit("no such thing")
    return Counter(directory.name)
