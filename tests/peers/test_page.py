"""Goals judged on rows, and the page and picture that show them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from export.machine import described
from peers.__main__ import PACKAGES
from peers.goals import Goal, Row, judged
from peers.page import page
from peers.picture import picture


def row(name: str, ours: bool = False, db: float = 40.0, **seconds: float) -> Row:
    counts = {"prefill": 160, "decode": 64}
    making = {"seconds": 29.0, "peak_rss_bytes": int(0.9e9), "artefacts": {name: {"bytes": 5 << 20}}}
    return {
        "name": name,
        "ours": ours,
        "runs": True,
        "about": "int4",
        "version": "v1",
        "why": None,
        "medians": seconds,
        "tokens_per_s": {m: counts[m] / s for m, s in seconds.items() if m in counts},
        "seconds": {m: [s] * 5 for m, s in seconds.items()},
        "accuracy_db": {"vision": db} if "vision" in seconds else {},
        "load_seconds": 1.0,
        "peak_rss_bytes": 100 << 20,
        "file_bytes": 5 << 20,
        "making": making if ours else None,
    }


@pytest.fixture
def rows() -> list[Row]:
    return [
        row("vlmx onnxruntime", True, prefill=1.0, decode=2.0, vision=0.8, ttft=2.0),
        row("vlmx executorch", True, db=24.0, prefill=1.2, decode=2.2, vision=0.7, ttft=2.1),
        row("llama.cpp", prefill=1.6, decode=2.1, vision=2.0, ttft=3.9),
        row("onnxruntime-genai", prefill=3.2, decode=3.0),
    ]


def verdicts(rows: list[Row]) -> list[bool | None]:
    return [goal.met for goal in judged(rows)]


def test_goals_are_judged_by_ratio_and_accuracy(rows: list[Row]) -> None:
    decode, each, prefill, vision, first, onnx, pte, *_ = judged(rows)
    assert decode.met
    assert decode.evidence == "vlmx onnxruntime 1.05 times, vlmx executorch 0.95 times"
    assert each.met
    assert prefill.met
    assert vision.met
    assert "0.70 s at 24.0 dB" in vision.evidence
    assert first.met is False
    assert "1.95 times" in first.evidence
    assert onnx.met
    assert pte.met


def test_goals_just_missed(rows: list[Row]) -> None:
    rows[0]["medians"] |= {"decode": 2.2, "prefill": 1.1, "vision": 0.86, "ttft": 1.9}
    rows[0]["making"]["peak_rss_bytes"] = int(1.1e9)
    rows[1]["medians"]["decode"] = 2.4  # not 1.3 times, though the other is
    assert verdicts(rows) == [False, False, False, False, True, False, True, None, None]


def test_an_inaccurate_tower_meets_nothing(rows: list[Row]) -> None:
    rows[0]["accuracy_db"] = {}
    assert verdicts(rows)[3] is False


def test_what_was_not_measured_is_not_judged(rows: list[Row]) -> None:
    assert verdicts(rows[:2]) == [None, None, None, True, None, True, True, None, None]
    rows[1]["medians"] = {}
    assert judged(rows)[1].met is False  # one of ours has no number: not each of them met it
    assert verdicts([]) == [None] * 9


def test_what_is_made_alone_is_judged_for_that(rows: list[Row]) -> None:
    engines = row("vlmx tensorrt", True) | {"runs": False, "file_bytes": int(1e9)}
    before = verdicts(rows)
    assert verdicts([*rows, engines]) == [*before[:-1], True]
    engines["making"]["peak_rss_bytes"] = int(2.6e9)  # 1.5 times a gigabyte, and one more
    goal = judged([*rows, engines])[-1]
    assert goal.met is False
    assert goal.evidence == "29.0 s, 2.60 GB of 2.50"


def document(rows: list[Row]) -> dict[str, Any]:
    return {"machine": described(PACKAGES), "load_average": {"before running": 0.4}, "rounds": 5, "rows": rows}


def test_the_page_has_a_row_each_and_says_why_some_did_not_run(rows: list[Row]) -> None:
    broken = copy.deepcopy(rows[3]) | {"name": "broken", "why": "no compiler", "medians": {}, "version": None}
    written = page(document([*rows, broken]), judged(rows))
    assert "| vlmx onnxruntime | 160.0 (1.60x) | 32.0 (1.05x) | 0.80 (2.50x) | 2.00 (1.95x) |" in written
    assert "| llama.cpp | 100.0 | 30.5 | 2.00 | 3.90 |" in written
    assert "| onnxruntime-genai | 50.0 (0.50x) | 21.3 (0.70x) | - | - |" in written
    assert "* broken: not run: no compiler" in written
    assert "| time to the first token at most half of llama.cpp's | vlmx onnxruntime 1.95 times" in written
    assert page(document(rows), [Goal("a", "b", None)]).count("not judged") == 1


def test_the_picture_has_a_bar_for_each_number(rows: list[Row]) -> None:
    drawn = picture(rows, "a & b")
    assert drawn.count("<rect") == 1 + 4 + 4 + 3 + 3 + 4
    assert "a &amp; b" in drawn
    assert "<title>onnxruntime-genai: 50.0</title>" in drawn


def test_a_tower_that_computes_something_else_is_named(rows: list[Row]) -> None:
    assert "is another" not in page(document(rows), [])
    rows[2]["accuracy_db"] = {"vision": 3.4, "vision_class_last": 63.6}
    assert "agrees with llama.cpp 63.6 dB." in page(document(rows), [])


def test_a_busy_machine_is_told(rows: list[Row]) -> None:
    quiet = document(rows)
    assert "Something else was running" not in page(quiet, [])
    assert "Something else was running" in page(quiet | {"load_average": {"before making": 0.1, "x": 7.0}}, [])
