"""Latency of the frontier's bundles, one after the other and round after round, so that all see the same machine."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from export.bench import bench
from export.frontier_goals import Row
from export.stages import Progress, silent

#: what `bench` measures of a bundle
SPEED = ("vision_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "ttft_ms")

#: all bundles are timed once a round; so many runs each time, of such a prompt
ROUNDS, REPEAT, PROMPT_TOKENS, NEW_TOKENS = 5, 5, 24, 24


def side_by_side(bundles: Sequence[Path], progress: Progress = silent) -> list[Row]:
    """For each bundle the medians over rounds of a round's medians, and the highest load average of the machine."""
    found: list[list[Row]] = [[] for _ in bundles]
    for number in range(1, ROUNDS + 1):
        progress(f"timing {len(bundles)} bundles side by side, round {number} of {ROUNDS}")
        for directory, rounds in zip(bundles, found, strict=True):
            timed = bench(directory, None, REPEAT, PROMPT_TOKENS, NEW_TOKENS, silent)
            rounds.append({**timed, "load": os.getloadavg()[0]})
    return [
        {name: statistics.median(row[name] for row in rounds) for name in SPEED}
        | {"load": max(row["load"] for row in rounds)}
        for rounds in found
    ]
