"""The goals that were set for running and for making artefacts, judged on the rows of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

LLAMA, GENAI = "llama.cpp", "onnxruntime-genai"

#: of the tower against float32, at least
SQNR_DB = 30.0

#: target -> seconds that making its artefact may take, and bytes: a share of the artefact's, and so many more
MAKING = {
    "onnxruntime": (30.0, 0.0, 1.0e9),
    "executorch": (75.0, 0.0, 2.5e9),
    "coreml": (120.0, 0.0, 4.0e9),
    "tensorrt": (120.0, 1.5, 1.0e9),
}


@dataclass(frozen=True)
class Goal:
    """What was to be reached, the numbers, and whether it was; None where a number is missing."""

    text: str
    evidence: str
    met: bool | None


def value(row: Row | None, measure: str) -> float | None:
    """A row's median seconds."""
    return None if row is None else row["medians"].get(measure)


def named(rows: Sequence[Row], name: str) -> Row | None:
    """The row of a contender."""
    return next((row for row in rows if row["name"] == name), None)


def timed(rows: Sequence[Row], measure: str) -> list[Row]:
    """Our rows that have a measure, the fastest first."""
    found = [row for row in rows if row["ours"] and value(row, measure) is not None]
    return sorted(found, key=lambda row: row["medians"][measure])


def against(rows: Sequence[Row], measure: str, peer: str, least: float, text: str, each: bool = False) -> Goal:
    """How many times as fast as the peer our fastest row is, or each of ours."""
    mine, theirs = timed(rows, measure), value(named(rows, peer), measure)
    if not mine or theirs is None:
        return Goal(text, "not measured", None)
    ratios = {row["name"]: theirs / row["medians"][measure] for row in mine}
    evidence = ", ".join(f"{name} {ratio:.2f} times" for name, ratio in ratios.items())
    complete = len(mine) == sum(row["ours"] and row["runs"] for row in rows)
    met = min(ratios.values()) >= least and complete if each else max(ratios.values()) >= least
    return Goal(text, evidence, met)


def vision(rows: Sequence[Row]) -> Goal:
    """Seconds of the tower, counted only where it is accurate enough."""
    text = f"vision tower at most 0.85 s at {SQNR_DB:.0f} dB SQNR or better against float32"
    mine = timed(rows, "vision")
    if not mine:
        return Goal(text, "not measured", None)
    accurate = {row["name"]: row["accuracy_db"].get("vision") for row in mine}
    told = (f"{row['name']} {value(row, 'vision'):.2f} s at {accurate[row['name']] or 0:.1f} dB" for row in mine)
    met = any(row["medians"]["vision"] <= 0.85 and (accurate[row["name"]] or 0) >= SQNR_DB for row in mine)
    return Goal(text, ", ".join(told), met)


def making(rows: Sequence[Row], target: str) -> Goal:
    """Seconds and peak memory of exporting, verification included."""
    seconds, share, more = MAKING[target]
    size = (f"{share:g} times its bytes and " if share else "") + f"{more / 1e9:.1f} GB"
    text = f"{target} artefact made in at most {seconds:.0f} s and {size}"
    row = named(rows, f"vlmx {target}")
    if row is None or row["making"] is None:
        return Goal(text, "not made", None)
    made, most = row["making"], share * row["file_bytes"] + more
    evidence = f"{made['seconds']:.1f} s, {made['peak_rss_bytes'] / 1e9:.2f} GB" + f" of {most / 1e9:.2f}" * bool(share)
    return Goal(text, evidence, made["seconds"] <= seconds and made["peak_rss_bytes"] <= most)


def judged(rows: Sequence[Row]) -> list[Goal]:
    """Every goal, in the order they were set."""
    return [
        against(rows, "decode", LLAMA, 1.0, "decode at least 1.0 times llama.cpp's Q4_0"),
        against(rows, "decode", GENAI, 1.3, "decode of each at least 1.3 times onnxruntime-genai's", each=True),
        against(rows, "prefill", LLAMA, 1.5, "prefill at least 1.5 times llama.cpp's"),
        vision(rows),
        against(rows, "ttft", LLAMA, 2.0, "time to the first token at most half of llama.cpp's"),
        *(making(rows, target) for target in MAKING),
    ]
