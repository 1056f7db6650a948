"""What passes the gate, and what does not."""

from __future__ import annotations

import numpy as np
import pytest

from export.gate import Distance, Limit, distance, gate, quantized
from export.verify import Call
from runtimes.base import Array


def tokens(*kept: int) -> Array:
    """Some of 32 tokens that have nothing to do with one another: [1, N, 32]."""
    return np.eye(32, dtype=np.float32)[None, list(kept)]


def calls(*outputs: Array) -> list[Call]:
    return [Call([], [output]) for output in outputs]


EXPECTED = calls(tokens(0, 2, 4, 6, 8, 10), tokens(1, 3, 5, 7, 9, 11))


def test_tokens_that_are_others_are_counted_over_all_calls() -> None:
    actual = calls(tokens(0, 2, 4, 6, 8, 9), tokens(0, 1, 3, 5, 7, 11) * 1.01)
    found = distance(actual, EXPECTED, Limit(0.05, 2))
    assert (found.tokens, found.others) == (12, 2)
    assert found.relative_l2 == pytest.approx(0.01 * np.sqrt(5 / 10), rel=1e-5)
    assert found.share == pytest.approx(1 / 6)
    assert Limit(0.05, 2).admits(found)
    assert not Limit(0.05, 1).admits(found)
    assert not Limit(0.005, 2).admits(found)


def test_without_a_choice_another_token_is_an_error() -> None:
    actual = calls(tokens(0, 2, 4, 6, 8, 9), tokens(1, 3, 5, 7, 9, 11))
    found = distance(actual, EXPECTED, Limit(0.05))
    assert found == Distance(pytest.approx(np.sqrt(2 / 6)))
    assert not Limit(0.05).admits(found)


@pytest.mark.parametrize(
    "wrong", [tokens(0, 2, 4), tokens(10, 8, 6, 4, 2, 0), tokens(0, 0, 0, 0, 0, 0), EXPECTED[0].outputs[0] * np.nan]
)
def test_shapes_orders_and_repeats_are_seen(wrong: Array) -> None:
    found = distance(calls(wrong, tokens(1, 3, 5, 7, 9, 11)), EXPECTED, Limit(0.05, 3))
    assert found.others >= 5
    assert not Limit(0.05, 3).admits(found)


def test_entries_say_what_was_measured() -> None:
    actual = {"m": calls(tokens(0, 2, 4, 6, 8, 9), tokens(1, 3, 5, 7, 9, 11))}
    entry = gate(actual, {"m": EXPECTED}, {"m": Limit(0.05, 1)}, "x")["m"]
    assert entry == {
        "executed": True,
        "by": "x",
        "relative_l2": 0,
        "limit": 0.05,
        "tokens": 12,
        "others": 1,
        "passed": True,
    }
    assert not gate(actual, {"m": EXPECTED}, {"m": Limit(0.05, 0)}, "x")["m"]["passed"]
    assert "tokens" not in gate(actual, {"m": EXPECTED}, {"m": Limit(0.05)}, "x")["m"]


@pytest.mark.parametrize("limit", [Limit(0.05), Limit(0.1, 3)])
def test_limits_come_back_from_json(limit: Limit) -> None:
    assert Limit.from_json(limit.to_json(), 0.1) == limit
    assert str(Distance(0.01, 18, 2)) == "1.0e-02, 2 of 18 tokens others"


@pytest.mark.parametrize(
    "value",
    [
        None,
        0.1,
        {},
        {"relative_l2": 0.2},
        {"relative_l2": "1"},
        {"relative_l2": 0.1, "others": -1},
        {"relative_l2": 0.1, "more": 1},
    ],
)
def test_what_is_no_limit(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        Limit.from_json(value, 0.1)


def test_quantizing_is_measured_on_the_tokens_that_both_chose() -> None:
    actual, expected = {"m": calls(tokens(0, 2, 4, 6, 8, 9) * 1.1)}, {"m": EXPECTED[:1]}
    found = quantized(actual, expected, {"m": Limit(0.01, 3)})["m"]
    assert (found["tokens"], found["others"]) == (6, 1)
    assert (found["relative_l2"], found["sqnr_db"]) == (pytest.approx(0.1), pytest.approx(20.0))
    assert quantized(actual, expected, {"m": Limit(0.01)})["m"]["relative_l2"] > 0.5
    assert quantized({"m": calls(tokens(20, 21))}, {"m": calls(tokens(1, 2))}, {"m": Limit(0.01, 1)})["m"] == {
        "relative_l2": pytest.approx(np.sqrt(2)),
        "sqnr_db": pytest.approx(-3.01, abs=0.01),
    }
