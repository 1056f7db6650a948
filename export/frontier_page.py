"""The page and the picture of `export.frontier`, made from its data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.accuracy import half_width
from export.chart import Point, scatter
from export.frontier_goals import CONTROLS, REFERENCE, Goal, Row, change, goals, measured, pareto, points, pruned, short

STATE = {True: "met", False: "**MISSED**", None: "not told"}
REPORTED = {True: "reported, holds", False: "reported, does not hold", None: "not told"}


def goal_line(goal: Goal) -> str:
    """One goal of the list."""
    return f"- {REPORTED[goal.met] if goal.reported else STATE[goal.met]}: {goal.text}: {goal.evidence}"


def percent(row: Row, group: str) -> str:
    """A share of right answers."""
    return f"{100 * row['accuracy'][group]:.1f}" if group in row["accuracy"] else "-"


def number(value: float | None, form: str = ".1f") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def table(rows: Sequence[Row], everything: Sequence[Row]) -> list[str]:
    """One target's rows, the most accurate first, those on its frontier marked."""
    best = [id(row) for row in pareto(rows)]
    lines = [
        "| frontier | passes | recipe | visual tokens | all % | reading % | others % | against fp32, points | KiB "
        "| vision ms | prefill tokens/s | decode tokens/s | first token ms | lower error |",
        "|:-:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: (-row["accuracy"]["all"], row["ttft_ms"] or 0)):
        half = 100 * half_width(row["accuracy"]["all"], row["count"])
        found = change(row, everything)
        cells = [
            "●" if id(row) in best else "",
            short(row["passes"]),
            row["recipe"],
            str(row["tokens"]),
            f"{percent(row, 'all')} ± {half:.1f}",
            percent(row, "reading"),
            percent(row, "others"),
            points(*found) if found else "-",
            f"{row['bytes'] / 1024:.0f}",
            number(row["vision_ms"], ".2f"),
            number(row["prefill_tokens_per_s"], ".0f"),
            number(row["decode_tokens_per_s"], ".0f"),
            number(row["ttft_ms"], ".2f"),
            f"{max(row['lower'].values()):.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def pruning(rows: Sequence[Row]) -> list[str]:
    """Every pruning method beside the controls, by task."""
    full = [r for r in measured(rows) if (r["target"], r["passes"], r["recipe"]) == ("onnxruntime", "", REFERENCE)]
    if not full:
        return ["Not measured."]
    groups = list(full[0]["accuracy"])
    lines = [f"| tokens | method | {' | '.join(groups)} |", f"|--:|---|{'--:|' * len(groups)}"]
    chosen = [(full[0]["tokens"], "all of them", full[0])]
    for keep in (full[0]["tokens"] // 2, full[0]["tokens"] // 4):
        methods = pruned(rows, keep)
        for method in sorted(methods, key=lambda name: (name in CONTROLS, name)):
            name = f"*{method}* (control)" if method in CONTROLS else method
            seeded = len(methods[method]) > 1
            chosen += [(keep, f"{name} {n}" if seeded else name, row) for n, row in enumerate(methods[method], 1)]
    lines += [f"| {keep} | {name} | {' | '.join(percent(row, g) for g in groups)} |" for keep, name, row in chosen]
    return lines


def refusals(rows: Sequence[Row]) -> list[str]:
    """What was refused or failed, one line a reason."""
    reasons: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            reasons.setdefault((row["target"], row["recipe"], row["status"], row["why"]), []).append(row["passes"])
    if not reasons:
        return ["Nothing."]
    lines = ["| target | recipe | passes | | why |", "|---|---|---|---|---|"]
    for (target, recipe, status, why), texts in reasons.items():
        word = "refused" if status == "refused" else "**FAILED**"
        passes = ", ".join(map(short, texts))
        lines.append(f"| {target} | {recipe} | {passes} | {word} | {why.replace('|', '/')} |")
    return lines


def page(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    facts, rows = report["facts"], report["rows"]
    done = measured(rows)
    versions = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
    tasks = [name for name in done[0]["accuracy"] if name not in ("all", "reading", "others")] if done else []
    days = sorted({row["date"] for row in rows})
    dates = dict.fromkeys((*days[:1], *days[-1:]))
    lines = [
        "# Accuracy against latency",
        "",
        f"`{facts['checkpoint']}` on {facts['count']} held-out questions (seed {facts['seed']}: {', '.join(tasks)}), "
        "the same ones for every row, answered greedily by the target's own runtime; right is what matches exactly. "
        "*Reading* is digits and words. ± is half the width of a 95% interval: Wilson's for a share; for a change "
        "against fp32 (same target, same passes) that of paired questions.",
        "",
        f"Latency: all bundles one after the other in {facts['rounds']} rounds, medians over rounds of the median of "
        f"{facts['repeat']} runs after one that warms up, a picture and {facts['prompt_tokens']} tokens of text, "
        f"{facts['new_tokens']} tokens made; of each target, ● marks the rows that no faster row of it "
        "equals in accuracy. KiB are the bundle's without its test vectors. The lower error is the largest relative L2 "
        "of a lowered method against its graph.",
        "",
        "![accuracy over time to the first token](frontier.svg)",
        "",
        "## Goals",
        "",
        *map(goal_line, goals(rows)),
        "",
    ]
    for target in dict.fromkeys(row["target"] for row in done):
        of = [row for row in done if row["target"] == target]
        lines += [f"## {target}", "", f"Run by {', '.join(dict.fromkeys(row['runtime'] for row in of))}."]
        if all(row["ttft_ms"] is None for row in of):
            lines[-1] += " NOT TIMED: this evaluator shows the numbers' accuracy, and says nothing of speed."
        lines += ["", *table(of, rows), ""]
    lines += ["## Pruning methods beside the controls", "", "In fp32 on ONNX Runtime, % right by task.", ""]
    lines += [*pruning(rows), "", "## Refused", "", *refusals(rows), ""]
    present = {*facts["targets"], *(row["target"] for row in rows)}
    absent = [name for name in facts["runs_here"] if name not in present]
    lines += ["## Not run", ""]
    lines += [f"- {name}, no row of it. Does it run here: {facts['runs_here'][name]}." for name in absent]
    lines += [f"- {row['target']}, {row['recipe']}, {short(row['passes'])}: no time" for row in report["not_run"]]
    loads = [row["load"] for row in done if row["ttft_ms"] is not None]
    busy = f" Load averages while timing: {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    lines += [
        "",
        f"Made by `make frontier` (`{facts['command']}`) on {' to '.join(dates)}, "
        f"{sum(row['seconds'] for row in rows) / 60:.0f} minutes for {len(rows)} rows: {facts['processor']}, "
        f"{facts['cores']} cores, {facts['system']}; {versions}; weights {facts['weights']}.{busy}",
        "",
    ]
    return "\n".join(lines)


def picture(report: Mapping[str, Any]) -> str:
    """Accuracy over time to the first token of the timed rows as SVG."""
    timed = [row for row in measured(report["rows"]) if row["ttft_ms"] is not None]
    best = {
        id(row) for name in {row["target"] for row in timed} for row in pareto(r for r in timed if r["target"] == name)
    }
    return scatter(
        [
            Point(
                x=row["ttft_ms"],
                y=100 * row["accuracy"]["all"],
                series=row["target"],
                marker=row["recipe"],
                filled=bool(row["passes"]),
                title=f"{short(row['passes'])}, {row['recipe']}: {percent(row, 'all')}% in {row['ttft_ms']:.2f} ms",
                best=id(row) in best,
            )
            for row in timed
        ],
        title=f"zoo/mobilevlm-nano: {report['facts']['count']} held-out questions",
        x_label="time to the first token, ms",
        y_label="exact match, %",
        filled=("no pass", "tokens compressed"),
    )
