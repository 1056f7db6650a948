"""A row a contender: medians, accuracy, memory, sizes, and what making its artefacts took, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peers.contenders import Contender
from peers.goals import Row
from peers.load import DECODE, MEASURES, PREFILL
from peers.make import Made
from peers.rounds import Result

#: below which a tower computes something else, not the same less exactly
ELSEWHERE_DB = 10.0


def sqnr_db(found: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> float:
    """Signal to quantization noise of an output against float32, in decibels; the shapes may differ in ones."""
    signal, noise = exact.astype(np.float64).ravel(), found.astype(np.float64).ravel() - exact.ravel()
    power = float(noise @ noise)
    return math.inf if power == 0 else 10 * math.log10(float(signal @ signal) / power)


def accuracy(name: str, outputs: Path, reference: Path | None) -> dict[str, float]:
    """By measure, for those whose output was saved."""
    if reference is None:
        return {}
    pairs = {measure: (outputs / f"{name}-{measure}.npy", reference / f"{measure}.npy") for measure in MEASURES}
    found = {
        measure: round(sqnr_db(np.load(output), np.load(exact)), 2)
        for measure, (output, exact) in pairs.items()
        if output.is_file()
    }
    if found.get("vision", math.inf) < ELSEWHERE_DB:
        other = sqnr_db(np.load(pairs["vision"][0]), np.load(reference / "vision_class_last.npy"))
        found["vision_class_last"] = round(other, 2)
    return found


def making(artefacts: Mapping[str, Made | str]) -> dict[str, Any] | None:
    """Seconds together and the highest peak; None where one of them could not be made."""
    made = {name: found for name, found in artefacts.items() if isinstance(found, Made)}
    if len(made) < len(artefacts):
        return None
    return {
        "seconds": round(sum(each.seconds for each in made.values()), 2),
        "peak_rss_bytes": max(each.peak_rss_bytes for each in made.values()),
        "artefacts": {name: {k: v for k, v in each.__dict__.items() if k != "digest"} for name, each in made.items()},
    }


def row(contender: Contender, result: Result, artefacts: Mapping[str, Made | str], accuracies: dict[str, float]) -> Row:
    """What is kept of a contender; `why` says what it lacks."""
    medians = {measure: result.median(measure) for measure in MEASURES}
    made = making(artefacts)
    return {
        "name": contender.name,
        "ours": contender.ours,
        "runs": contender.worker is not None,
        "about": contender.about,
        "version": result.version,
        "why": result.why,
        "medians": {measure: round(seconds, 4) for measure, seconds in medians.items() if seconds is not None},
        "tokens_per_s": {
            measure: round(count / seconds, 2)
            for measure, count in (("prefill", PREFILL), ("decode", DECODE))
            if (seconds := medians[measure]) is not None
        },
        "seconds": {measure: [round(value, 4) for value in values] for measure, values in result.seconds.items()},
        "accuracy_db": accuracies,
        "load_seconds": result.load_seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "file_bytes": None if made is None else sum(each["bytes"] for each in made["artefacts"].values()),
        "making": made,
    }
