"""Turns, medians, and contenders that drop out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peers.contenders import CONTENDERS
from peers.process import Failed, Process
from peers.rounds import Result, alternate, turned
from peers.rows import making, row, sqnr_db


class Scripted:
    """Answers from a list of seconds a measure; writes who was asked what into a common diary."""

    def __init__(self, name: str, diary: list[tuple[str, str]], seconds: dict[str, list[float]]) -> None:
        self.name, self.diary, self.seconds = name, diary, seconds
        self.hello = {"version": "1", "load_seconds": 0.5, "measures": list(seconds)}

    def ask(self, **request: Any) -> dict[str, Any]:
        self.diary.append((self.name, request["do"]))
        if not self.seconds[request["do"]]:
            raise Failed("out of seconds")
        return {"seconds": self.seconds[request["do"]].pop(0), "finite": True}

    def end(self) -> dict[str, Any]:
        return {"peak_rss_bytes": 7}


def test_everyone_is_asked_in_turn_and_the_first_round_does_not_count(tmp_path: Path) -> None:
    diary: list[tuple[str, str]] = []
    fast = Scripted("fast", diary, {"prefill": [9.0, 1, 2, 3, 4, 50], "decode": [9.0, 1, 1, 1, 1, 1]})
    slow = Scripted("slow", diary, {"prefill": [9.0, 6, 7, 8, 9, 10]})
    results = alternate({"fast": fast, "slow": slow}, 5, tmp_path, lambda line: None)
    assert diary[:3] == [("fast", "prefill"), ("slow", "prefill"), ("fast", "decode")]
    assert diary[3:6] == [("slow", "prefill"), ("fast", "prefill"), ("fast", "decode")]
    assert results["fast"].median("prefill") == 3
    assert results["slow"].median("prefill") == 8
    assert results["slow"].median("decode") is None
    assert results["slow"].peak_rss_bytes == 7


def test_who_fails_drops_out_with_a_reason_and_the_others_go_on(tmp_path: Path) -> None:
    processes = {
        word: Process(["peers.worker", "tests.peers.contender", str(tmp_path / word)], tmp_path / f"{word}.log")
        for word in ("counts", "dies", "nan")
    }
    results = alternate(processes, 5, tmp_path, lambda line: None)
    for process in processes.values():
        process.kill()
    assert len(results["counts"].seconds["vision"]) == 5
    assert results["counts"].why is None
    assert "old age" in (results["dies"].why or "")
    assert results["dies"].median("prefill") is None
    assert results["nan"].why == "prefill: the output has NaN or Inf"
    assert np.load(tmp_path / "counts-prefill.npy").tolist() == [1, 1, 1]


def test_orders_turn() -> None:
    assert [turned("abc", n) for n in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]


def test_sqnr() -> None:
    exact = np.array([[3.0, 4.0]])
    assert sqnr_db(np.array([3.0, 4.5]), exact) == pytest.approx(20)
    assert sqnr_db(exact, exact) == float("inf")


def test_what_could_not_be_made_has_a_row_with_its_reason() -> None:
    contender = CONTENDERS[0]
    found = row(contender, Result(why="ours-onnxruntime: no cheese"), {"ours-onnxruntime": "no cheese"}, {})
    assert found["name"] == contender.name
    assert found["why"] == "ours-onnxruntime: no cheese"
    assert found["medians"] == {}
    assert found["making"] is making({"ours-onnxruntime": "no cheese"}) is None
