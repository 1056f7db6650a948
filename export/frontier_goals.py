"""What the rows of `export.frontier` say: the Pareto frontier, losses against fp32, and which goals are met."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from export.accuracy import difference
from graphs.compress.base import parse
from graphs.compress.passes.prune import Prune

Row = dict[str, Any]

REFERENCE = "reference-fp32"
CONTROLS = ("random", "uniform")
QUANTIZATION_LOSS = 1.0  # points over all questions, at most
PRUNING_LOSS = 2.0  # points outside the reading tasks at half the tokens, at most


@dataclass(frozen=True)
class Goal:
    """What was to be reached, whether it was (None: nothing to tell by), and the numbers that say so.

    What is `reported` alone was never a goal: it stands beside them, whatever it shows.
    """

    text: str
    met: bool | None
    evidence: str
    reported: bool = False


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows that have numbers."""
    return [row for row in rows if row["status"] == "measured"]


def pareto(rows: Iterable[Row]) -> list[Row]:
    """The timed rows that no other beats: none answers as many rightly in less time. The fastest first."""
    timed = [row for row in measured(rows) if row["ttft_ms"] is not None]
    best: list[Row] = []
    for row in sorted(timed, key=lambda row: (row["ttft_ms"], -row["accuracy"]["all"])):
        if not best or row["accuracy"]["all"] > best[-1]["accuracy"]["all"]:
            best.append(row)
    return best


def reference_of(row: Row, rows: Iterable[Row]) -> Row | None:
    """The fp32 row on the same target with the same passes."""
    same = (r for r in measured(rows) if (r["target"], r["passes"], r["recipe"]) == (*where(row), REFERENCE))
    return next(same, None)


def where(row: Row) -> tuple[str, str]:
    """Target and passes."""
    return row["target"], row["passes"]


def change(row: Row, rows: Iterable[Row]) -> tuple[float, float] | None:
    """Points gained over fp32, and half the width of the 95% interval; None where there is nothing to compare with."""
    reference = reference_of(row, rows)
    if reference is None or row["recipe"] == REFERENCE:
        return None
    gain, half = difference(*([bit == "1" for bit in r["correct"]] for r in (row, reference)))
    return 100 * gain, 100 * half


def points(value: float, half: float) -> str:
    """A change in points."""
    return f"{value:+.1f} ± {half:.1f}"


def quantization_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """For each recipe and target that quantizes: the loss without passes, and the largest with passes."""
    quantized = [row for row in measured(rows) if row["schemes"]]
    for target, recipe in dict.fromkeys((row["target"], row["recipe"]) for row in quantized):
        of = [row for row in quantized if (row["target"], row["recipe"]) == (target, recipe)]
        for what, chosen in (
            ("no pass", [row for row in of if not row["passes"]]),
            ("with passes", [row for row in of if row["passes"]]),
        ):
            changes = [(found, row) for row in chosen if (found := change(row, rows)) is not None]
            text = f"{recipe} on {target}, {what}: at most {QUANTIZATION_LOSS} point lost against fp32"
            if changes:
                (gain, half), worst = min(changes, key=lambda pair: pair[0])
                named = f", the worst of {len(changes)}: {short(worst['passes'])}" if worst["passes"] else ""
                yield Goal(text, -gain <= QUANTIZATION_LOSS + 1e-9, f"{points(gain, half)} points{named}")
            elif not chosen and what == "with passes":
                continue
            else:
                yield Goal(text, None, "no fp32 row to compare with")


def pruned(rows: Iterable[Row], keep: int) -> dict[str, list[Row]]:
    """Rows in fp32 on ONNX Runtime with `prune` alone to `keep` tokens, by method; a method may have several seeds."""
    found: dict[str, list[Row]] = {}
    for row in measured(rows):
        passes = parse(row["passes"])
        if (row["target"], row["recipe"], len(passes)) == ("onnxruntime", REFERENCE, 1):
            (one,) = passes
            if isinstance(one, Prune) and one.keep == keep:
                found.setdefault(one.method, []).append(row)
    return found


def share(rows: Sequence[Row], group: str) -> float:
    """The mean share of right answers in percent, over a method's seeds."""
    return 100 * sum(row["accuracy"][group] for row in rows) / len(rows)


def pruning_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """At half of the tokens: the best method's loss, and its lead over each control. A quarter is reported."""
    full = [r for r in measured(rows) if (*where(r), r["recipe"]) == ("onnxruntime", "", REFERENCE)]
    tokens = full[0]["tokens"] if full else 0
    for name, keep, reported in (("half", tokens // 2, False), ("a quarter of", tokens // 4, True)):
        methods = pruned(rows, keep) if full else {}
        ours = {method: of for method, of in methods.items() if method not in CONTROLS}
        if not ours:
            yield Goal(f"pruning to {name} the tokens", None, "not measured", reported)
            continue
        best = max(ours, key=lambda method: (share(ours[method], "all"), share(ours[method], "others")))
        loss = share(full, "others") - share(ours[best], "others")
        goal = f"at most {PRUNING_LOSS:g} points lost outside reading"
        text = f"{best}, the best at {name} the tokens: {goal}"
        yield Goal(text, loss <= PRUNING_LOSS + 1e-9, f"{-loss:+.1f} points", reported)
        for control in CONTROLS:
            text = f"{best} beats {control} at {name} the tokens, over all and outside reading"
            if control not in methods:
                yield Goal(text, None, "not measured", reported)
                continue
            leads = {group: share(ours[best], group) - share(methods[control], group) for group in ("all", "others")}
            seeds = f" (mean of {len(methods[control])} seeds)" if len(methods[control]) > 1 else ""
            evidence = f"{leads['all']:+.1f} points over all, {leads['others']:+.1f} outside reading{seeds}"
            yield Goal(text, min(leads.values()) > 0, evidence, reported)


def goals(rows: Sequence[Row]) -> list[Goal]:
    """All goals, as far as rows tell."""
    return [*quantization_goals(rows), *pruning_goals(rows)]


def short(passes: str) -> str:
    """A pass text for people: without seeds that choose nothing, and of `keep=` and `method=` the values alone."""
    parts = []
    for one in parse(passes):
        text = str(one)
        if isinstance(one, Prune):
            seed = f", seed {one.seed}" if one.method == "random" else ""
            text = f"prune {one.keep} {one.method}{seed}"
        parts.append(text)
    return "; ".join(parts) or "no pass"
