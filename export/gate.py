"""The gate: what a lowered method may be off by, and how far off it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.align import align
from export.verify import Call, Vectors, compare, inputs_of, record, sqnr_db, worst
from graphs.errors import GateError
from runtimes.base import Runtime

#: a token is the same one where it is at most so many limits away
SAME = 2.0

#: where a quantized graph is held against its source, by the relative distance between two tokens instead
LIKE = 0.5


@dataclass(frozen=True)
class Distance:
    """How far a method is from what is expected of it.

    `relative_l2` is the largest of all calls, or, where tokens are told apart, that of those which are the same in
    both; `others` of `tokens` are not.
    """

    relative_l2: float
    tokens: int = 0
    others: int = 0

    @property
    def share(self) -> float:
        """Of tokens that are other ones."""
        return self.others / self.tokens if self.tokens else 0.0

    def farthest(self, other: Distance) -> Distance:
        """The worse of two, number by number."""
        return Distance(*map(max, zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        return f"{self.relative_l2:.1e}" + (f", {self.others} of {self.tokens} tokens others" if self.tokens else "")


@dataclass(frozen=True)
class Limit:
    """What a method may be off by.

    `others`: where a method chooses tokens by content, a near tie is decided by the last bits, and what is kept is then
    another token altogether. So many of its output tokens [1, N, D] may be others than those expected, the rest must be
    the same ones in the same order, within `relative_l2`. None: outputs are compared as they stand.
    """

    relative_l2: float
    others: int | None = None

    def admits(self, found: Distance) -> bool:
        """Whether that is near enough."""
        return found.relative_l2 <= self.relative_l2 and found.others <= (self.others or 0)

    def __str__(self) -> str:
        return f"{self.relative_l2:.2g}" + ("" if self.others is None else f", {self.others} others")

    def to_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_json(value: Any, most: float) -> Limit:
        """Raises ValueError for what is no limit, or none at most `most`."""
        found = Limit(**value) if isinstance(value, dict) and value.keys() <= {"relative_l2", "others"} else None
        if found is None or not isinstance(found.relative_l2, float) or not 0 < found.relative_l2 <= most:
            raise ValueError
        if found.others is not None and (type(found.others) is not int or found.others < 0):
            raise ValueError
        return found


def are_tokens(calls: Sequence[Call]) -> bool:
    """Whether all outputs are [1, N, D]."""
    return all(output.ndim == 3 and len(output) == 1 for call in calls for output in call.outputs)


def distance(actual: Sequence[Call], expected: Sequence[Call], limit: Limit) -> Distance:
    """How far the calls of a method are from the expected ones, as `limit` counts it."""
    if limit.others is None:
        return Distance(worst(actual, expected))
    pairs = [pair for a, e in zip(actual, expected, strict=True) for pair in zip(a.outputs, e.outputs, strict=True)]
    tokens = sum(e.shape[1] for _, e in pairs)
    if any(a.shape != e.shape for a, e in pairs):
        return Distance(math.inf, tokens, tokens)
    far = np.concatenate([align(a[0], e[0], SAME * limit.relative_l2) for a, e in pairs])
    return Distance(math.sqrt(far.mean()) if len(far) else math.inf, tokens, tokens - len(far))


def quantized(actual: Vectors, expected: Vectors, limits: Mapping[str, Limit]) -> dict[str, dict[str, Any]]:
    """The manifest's `quantize` entry of every method: relative L2 and SQNR of quantized outputs against the source's.

    Where a method chooses tokens, of those which both chose, and how many of how many were `others`.
    """
    entries = compare(actual, expected)
    for method, calls in expected.items():
        if limits[method].others is not None:
            found = distance(actual[method], calls, Limit(LIKE / SAME, 0))
            if found.others < found.tokens:
                entries[method] = {**asdict(found), "sqnr_db": sqnr_db(found.relative_l2)}
    return entries


def gate(actual: Vectors, expected: Vectors, limits: Mapping[str, Limit], by: str) -> dict[str, dict[str, Any]]:
    """The manifest's `lower` entry of every method, passed or not."""
    entries = {}
    for method, calls in expected.items():
        limit = limits[method]
        found = distance(actual[method], calls, limit)
        entries[method] = {
            "executed": True,
            "by": by,
            "relative_l2": found.relative_l2,
            "limit": limit.relative_l2,
            **({} if limit.others is None else {"tokens": found.tokens, "others": found.others}),
            "passed": limit.admits(found),
        }
    return entries


def execute(runtime: Runtime, expected: Vectors, limits: Mapping[str, Limit], what: str) -> dict[str, dict[str, Any]]:
    """Run `expected`'s inputs and gate the outputs; the `lower` entries. Raises GateError naming the methods beyond."""
    entries = gate(record(runtime, inputs_of(expected)), expected, limits, runtime.version)
    failed = [f"{name} {words(entry)} (limit {limits[name]})" for name, entry in entries.items() if not entry["passed"]]
    if failed:
        raise GateError(f"{what} does not compute the model: relative L2 of {', '.join(failed)}")
    return entries


def words(entry: Mapping[str, Any]) -> str:
    """What a `lower` entry measured."""
    return str(Distance(entry["relative_l2"], entry.get("tokens", 0), entry.get("others", 0)))
