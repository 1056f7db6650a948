"""The frontier's arithmetic on given rows, its resuming, its picture, and one real row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from calibration.source import Calibration
from export.accuracy import difference, half_width, shares
from export.chart import linear_ticks, log_ticks
from export.frontier import GRID, TARGETS, Block, cells, facts, load, publish, run
from export.frontier_goals import change, goals, pareto
from export.frontier_page import page, picture
from export.frontier_rows import Cell, Measurer, Setting, measure
from export.stages import silent
from graphs.compress.base import parse
from graphs.errors import UserError

TASKS = ("color", "digits", "words", "shape", "position")  # of every five questions; two of them read
SVG = "{http://www.w3.org/2000/svg}"


def row(passes: str = "", recipe: str = "reference-fp32", target: str = "onnxruntime", **more: Any) -> dict[str, Any]:
    """A measured row of 100 questions; `wrong` are the numbers of those answered wrongly."""
    wrong = more.pop("wrong", ())
    correct = [n not in wrong for n in range(100)]
    return {
        "passes": ";".join(map(str, parse(passes))),
        "recipe": recipe,
        "target": target,
        "count": 100,
        "status": "measured",
        "runtime": f"{target} 1.0",
        "tokens": 36,
        "bytes": 1 << 20,
        "accuracy": shares(correct, TASKS * 20),
        "correct": "".join("01"[right] for right in correct),
        "vision_ms": 2.0,
        "prefill_tokens_per_s": 1000.0,
        "decode_tokens_per_s": 100.0,
        "ttft_ms": 10.0,
        "lower": {"text_decoder": 1e-6},
        "schemes": {} if recipe.startswith("reference") else {"text_decoder": {"w4g32": 8}},
        "load": 0.5,
        "seconds": 30.0,
        "date": "2026-01-02",
        **more,
    }


def refused(recipe: str) -> dict[str, Any]:
    kept = ("passes", "recipe", "target", "count", "seconds", "date")
    return {key: value for key, value in row(recipe=recipe).items() if key in kept} | {
        "status": "refused",
        "why": "no kernels for f8af8",
    }


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"facts": facts(Setting(100), TARGETS), "rows": rows, "not_run": []}


def test_shares_of_groups_and_tasks() -> None:
    found = shares([True, False, True, True, True], TASKS)
    assert found == {
        "all": 0.8,
        "reading": 0.5,
        "others": 1.0,
        "color": 1.0,
        "digits": 0.0,
        "words": 1.0,
        "shape": 1.0,
        "position": 1.0,
    }


def test_intervals() -> None:
    assert half_width(0.5, 280) == pytest.approx(0.0582, abs=1e-4)
    assert half_width(1.0, 280) == pytest.approx(0.0068, abs=1e-4)
    gain, half = difference([True, False, False, True], [True, True, True, False])
    assert gain == -0.25
    assert half == pytest.approx(1.96 * (0.75 - 0.0625) ** 0.5 / 2)
    assert difference([True] * 4, [True] * 4) == (0.0, 0.0)


def test_the_frontier_leaves_out_what_a_faster_row_equals() -> None:
    slow = row(ttft_ms=20.0)
    fast = row("pool{factor=2}", ttft_ms=5.0, wrong=range(20))
    equalled = row("prune{keep=18}", ttft_ms=9.0, wrong=range(20))
    worse = row(recipe="mobile-fast", ttft_ms=21.0, wrong=(1,))
    untimed = row(target="coreml", ttft_ms=None)
    assert pareto([slow, fast, equalled, worse, untimed, refused("server-fp8")]) == [fast, slow]


def test_a_change_is_against_fp32_on_the_same_target_with_the_same_passes() -> None:
    reference = row("pool{factor=2}", wrong=(1, 2, 3))
    others = [row(wrong=()), row("pool{factor=2}", target="executorch", wrong=(9,)), reference]
    found = change(row("pool{factor=2}", "mobile-small", wrong=(1, 2, 3, 4, 5)), others)
    assert found is not None
    assert found[0] == pytest.approx(-2.0)
    assert change(reference, others) is None
    assert change(row(recipe="mobile-small", target="executorch"), others) is None


def goals_of(rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    return {goal.text: goal.met for goal in goals(rows)}


def test_goals_of_quantized_recipes() -> None:
    rows = [
        row(wrong=(0,)),
        row(recipe="mobile-fast", wrong=(0, 1)),
        row(recipe="mobile-small", wrong=(0, 1, 2)),
        row(recipe="server-int8", target="executorch"),
        row("pool{factor=2}", wrong=(5,)),
        row("pool{factor=2}", "mobile-fast", wrong=(1, 2, 3, 4, 5)),
    ]
    found = goals_of(rows)
    suffix = "at most 1.0 point lost against fp32"
    assert found[f"mobile-fast on onnxruntime, no pass: {suffix}"] is True
    assert found[f"mobile-fast on onnxruntime, with passes: {suffix}"] is False
    assert found[f"mobile-small on onnxruntime, no pass: {suffix}"] is False
    assert found[f"server-int8 on executorch, no pass: {suffix}"] is None


def test_goals_of_pruning_take_the_best_method_and_the_mean_of_a_controls_seeds() -> None:
    reading = [n for n in range(100) if n % 5 in (1, 2)]
    others = [n for n in range(100) if n % 5 not in (1, 2)]
    rows = [
        row(),
        row("prune{keep=18,method=divprune}", wrong=[*reading[:9], others[0]]),
        row("prune{keep=18,method=tome}", wrong=range(30)),
        row("prune{keep=18,method=uniform}", wrong=reading[:9]),
        row("prune{keep=18,method=random}", wrong=others[:2] + reading[:20]),
        row("prune{keep=18,method=random,seed=1}", wrong=others[:4] + reading[:20]),
        row("prune{keep=18,method=random,seed=1}", "mobile-fast", wrong=()),
    ]
    found = goals_of(rows)
    assert found["divprune, the best at half the tokens: at most 2 points lost outside reading"] is True
    assert found["divprune beats uniform at half the tokens, over all and outside reading"] is False
    assert found["divprune beats random at half the tokens, over all and outside reading"] is True
    assert found["pruning to a quarter of the tokens"] is None
    evidence = {goal.text: goal.evidence for goal in goals(rows)}
    assert "2 seeds" in evidence["divprune beats random at half the tokens, over all and outside reading"]


def test_the_grid_names_each_cell_once_with_its_reference_first() -> None:
    wanted = cells(GRID)
    assert len(wanted) == len(set(wanted)) > 60
    assert wanted[0] == Cell("", "reference-fp32", "onnxruntime")
    assert {cell.target for cell in wanted} == set(TARGETS)
    for number, cell in enumerate(wanted):
        assert Cell(cell.passes, "reference-fp32", cell.target) in wanted[: number + 1]
    for keep in (18, 9):
        methods = {
            one.method
            for c in wanted
            for one in parse(c.passes)
            if getattr(one, "keep", 0) == keep and one.name == "prune"
        }
        assert methods == {"cdpruner", "cls_attention", "divprune", "random", "tome", "uniform", "visionzip"}
    assert {cell.target for cell in cells(GRID, ("executorch",))} == {"executorch"}


class Fake:
    """Measures nothing, and remembers what it was asked for."""

    def __init__(self, status: str = "measured") -> None:
        self.status, self.asked = status, list[Cell]()

    def __call__(self, cell: Cell) -> dict[str, Any]:
        self.asked.append(cell)
        return (
            row(cell.passes, cell.recipe, cell.target)
            if self.status == "measured"
            else {"status": self.status, "why": "it broke"}
        )


def go(out: Path, setting: Setting, measurer: Fake, minutes: float = 5, grid: Block | None = None) -> dict[str, Any]:
    about = facts(setting, TARGETS)
    run(
        cells([grid or Block(("", "pool{factor=2}"), ("reference-fp32",), ("onnxruntime",))]),
        setting.identity,
        load(out / "frontier.json"),
        measurer,
        lambda rows, left: publish(out, about, rows, left),
        minutes,
        silent,
    )
    found: dict[str, Any] = json.loads((out / "frontier.json").read_text())
    return found


def test_finished_rows_are_not_run_again_unless_their_inputs_changed(tmp_path: Path) -> None:
    setting = Setting(100, weights="abc")
    first = Fake()
    assert [row["passes"] for row in go(tmp_path, setting, first)["rows"]] == ["", "pool{factor=2}"]
    assert len(first.asked) == 2
    go(tmp_path, setting, again := Fake())
    assert again.asked == []
    found = go(
        tmp_path, setting, more := Fake(), grid=Block(("",), ("reference-fp32", "mobile-fast"), ("onnxruntime",))
    )
    assert more.asked == [Cell("", "mobile-fast", "onnxruntime")]
    assert [(row["passes"], row["recipe"]) for row in found["rows"]] == [
        ("", "reference-fp32"),
        ("", "mobile-fast"),
        ("pool{factor=2}", "reference-fp32"),  # not wanted this time, and true all the same
    ]
    go(tmp_path, Setting(100, weights="other"), other := Fake())
    assert len(other.asked) == 2


def test_failed_rows_are_run_again_and_refused_ones_are_not(tmp_path: Path) -> None:
    setting = Setting(100)
    go(tmp_path, setting, Fake("failed"))
    found = go(tmp_path, setting, refusing := Fake("refused"))
    assert len(refusing.asked) == 2
    assert {row["why"] for row in found["rows"]} == {"it broke"}
    go(tmp_path, setting, again := Fake())
    assert again.asked == []
    assert (
        "| onnxruntime | reference-fp32 | no pass, pool{factor=2} | refused | it broke |"
        in (tmp_path / "frontier.md").read_text()
    )


def test_without_time_left_rows_are_named_as_not_run(tmp_path: Path) -> None:
    found = go(tmp_path, Setting(100), Fake(), minutes=0)
    assert found["rows"] == []
    assert [cell["passes"] for cell in found["not_run"]] == ["", "pool{factor=2}"]
    assert "onnxruntime, reference-fp32, pool{factor=2}: no time" in (tmp_path / "frontier.md").read_text()


def test_a_damaged_data_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "frontier.json").write_text('{"rows": 3}')
    with pytest.raises(UserError, match=r"frontier\.json: no rows of an earlier run"):
        load(tmp_path / "frontier.json")


ROWS = [
    row(ttft_ms=20.0),
    row("pool{factor=2}", ttft_ms=5.0, wrong=range(20)),
    row("prune{keep=18,method=uniform}", ttft_ms=9.0, wrong=range(30)),
    row(recipe="mobile-fast", target="executorch", ttft_ms=12.5, wrong=(7,)),
    row(target="coreml", ttft_ms=None),
    refused("server-fp8"),
]


def test_the_picture_holds_a_point_for_each_timed_row_and_names_its_frontier() -> None:
    tree = ElementTree.fromstring(picture(report(ROWS)))
    points = [g for g in tree.iter(f"{SVG}g") if "point" in g.get("class", "")]
    titles = {"".join(point.itertext()) for point in points}
    assert titles == {
        "no pass, reference-fp32: 100.0% in 20.00 ms",
        "pool{factor=2}, reference-fp32: 80.0% in 5.00 ms",
        "prune 18 uniform, reference-fp32: 70.0% in 9.00 ms",
        "no pass, mobile-fast: 99.0% in 12.50 ms",
    }
    words = [text.text or "" for text in tree.iter(f"{SVG}text")]
    assert [word for word in words if word.startswith(("1  ", "2  "))] == [
        "1  pool{factor=2}, reference-fp32: 80.0% in 5.00 ms",
        "2  no pass, reference-fp32: 100.0% in 20.00 ms",
        "1  no pass, mobile-fast: 99.0% in 12.50 ms",
    ]
    hollow = [p for p in points if "hollow" in p[0].get("class", "")]
    assert len(hollow) == 2  # those without a pass
    assert {p.get("class") for p in points} == {"point s0", "point s1"}
    assert ElementTree.fromstring(picture(report([]))).tag == f"{SVG}svg"


def test_the_page_marks_frontiers_and_says_what_was_not_timed_or_run() -> None:
    text = page(report(ROWS))
    assert "| ● | no pass | reference-fp32 | 36 | 100.0 ± 1.8 | 100.0 | 100.0 | - | 1024 |" in text
    assert "|  | prune 18 uniform | reference-fp32 |" in text
    assert "*uniform* (control)" in text
    assert "NOT TIMED" in text.split("## coreml")[1]
    assert "NOT TIMED" not in text.split("## coreml")[0]
    assert "| onnxruntime | server-fp8 | no pass | refused | no kernels for f8af8 |" in text
    assert "- tensorrt, no row of it." in text


def test_ticks_are_round_and_cover_the_range() -> None:
    assert linear_ticks(55.0, 100.0) == [50, 60, 70, 80, 90, 100]
    assert log_ticks(2.9, 15.2) == [3, 4, 5, 7, 10, 15]
    assert all(len(log_ticks(low, low * ratio)) >= 4 for low in (0.7, 9.6, 12.0) for ratio in (1.1, 1.5, 3, 40, 5000))


def test_a_real_row_and_a_real_refusal(tmp_path: Path) -> None:
    setting = Setting.here(7)
    assert len(setting.weights) == 16
    cell = Cell("prune{keep=18,method=cls_attention,seed=0}", "reference-fp32", "onnxruntime")
    measurer = Measurer(setting, tmp_path)
    found = measurer(cell)
    assert found["status"] == "measured"
    assert found["tokens"] == 18
    assert len(found["correct"]) == 7
    assert found["accuracy"]["all"] == pytest.approx(found["correct"].count("1") / 7)
    assert found["accuracy"]["all"] >= 3 / 7
    assert found["ttft_ms"] is None
    assert max(found["lower"].values()) < 1e-4
    assert 10e6 < found["bytes"] < 20e6
    kept = measurer.place(cell) / "manifest.json"
    made = kept.stat().st_mtime_ns
    rows = [
        {**vars(cell), **found},
        {**vars(Cell("", "reference-fp32", "onnxruntime")), **found},
        refused("server-fp8"),
    ]
    measurer.time(rows, silent)
    assert kept.stat().st_mtime_ns == made  # only what is not there is made again
    for row in rows[:2]:
        assert row["ttft_ms"] > row["vision_ms"] > 0
        assert min(row["prefill_tokens_per_s"], row["decode_tokens_per_s"]) > 0
        assert row["load"] >= 0
    assert "ttft_ms" not in rows[2]
    no = measure(Cell("", "server-fp8", "executorch"), setting, Calibration(), tmp_path / "no")
    assert no["status"] == "refused"
    assert "f8af8" in no["why"]
