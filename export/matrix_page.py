"""The results of `make matrix` as Markdown: the ladder, then every export, then every published size."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import version
from typing import Any

from export.answers import LIMIT, NEW_TOKENS
from export.gate import words
from export.targets.base import TARGETS

#: where answers are compared: targets that run on any machine
ANSWERING = ("onnxruntime", "executorch")

PACKAGES = ("torch", "onnxruntime", "executorch", "coremltools", "tensorrt-rtx-cu13", "transformers")

#: the device whose milliseconds the page shows
DEVICE = "jetson-agx-orin-64"

Row = dict[str, Any]


def page(rows: Sequence[Row], command: str, left: int) -> str:
    """Everything, as one document."""
    exports = [row for row in rows if row["kind"] == "export"]
    written = sum("lower" in row for row in exports)
    refused, failed = (sum(why in row for row in exports) for why in ("refused", "failed"))
    plans = [row for row in rows if row["kind"] == "plan"]
    devices = len(next((row["milliseconds"] for row in plans if "milliseconds" in row), {}))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [
        "# What works, and how far a lowered graph is from its source",
        "",
        "L1: parameters of published sizes within 1% of the published count, or the same where that is rounded to two "
        "digits (1.7 B, 3 B). L2: every method of those sizes traced on "
        "fake tensors. L3: tests against transformers' implementation on random checkpoints. L4: the `tiny` variant on "
        "each target, checked against its graph. L5: the same with a compression pass (without a decoder, or where "
        "pictures are read by cross-attention alone: without) and a quantizing recipe. Answers: what a bundle of the "
        "`tiny` variant says, asked as `vlmx run` asks it, is what its graph says by torch. Plan: `vlmx plan` of every "
        "published size. A blank was not run or is refused by name below; TensorRT engines are built, not executed.",
        "",
        *ladder(rows),
        "",
        "## Exports",
        "",
        "Relative L2 of each lowered method against the graph it was lowered from, prefill and decode steps, on seeded "
        "inputs. The limit is 1e-4 in fp32 and 1e-2 in fp16 and for quantized graphs, or, where activations are "
        "rounded, twice what the graph itself moves when last bits are others (other floats, or weights changed by "
        "about a rounding); what is beyond it is not written. Where tokens are chosen by content, near ties may be "
        "decided otherwise: `others` counts tokens that are, at most twice as many as where the graph itself is "
        "shaken, and the error is that of the rest. Behind each error, how many layers the recipe keeps in which "
        "scheme. `tiny` has random weights.",
        "",
        f"{len(exports)} exports: {written} written, {refused} refused by name, {failed} failed"
        + (f"; {left} jobs were not run for want of time." if left else "."),
        "",
        "| model | variant | target | passes | recipe | methods | seconds | peak MiB | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(line, exports),
        "",
        "## Answers",
        "",
        "Each bundle in fp32 against the eager graph of its source. Decoders: the same "
        f"{NEW_TOKENS} greedy tokens for each prompt, and the relative L2 of all their logits. Others: the relative L2 "
        f"of each output for two pictures and three texts, {LIMIT:g} at most. Random weights have no tokenizer: bytes "
        "stand in for one.",
        "",
        "| model | variant | target | answers | seconds |",
        "|---|---|---|---|---|",
        *(answer_line(row) for row in rows if row["kind"] == "answers"),
        "",
        "## Published sizes, on fake tensors",
        "",
        "| model | variant | parameters | published | difference | methods traced | seconds |",
        "|---|---|---|---|---|---|---|",
        *(size_line(row) for row in rows if row["kind"] == "published"),
        "",
        "## Plans",
        "",
        f"`vlmx plan` of every published size in fp16: bytes of weights and cache, and the roofline of each call on "
        f"{DEVICE}, one of {devices} devices.",
        "",
        "| model | variant | weights MiB | cache MiB | milliseconds |",
        "|---|---|---|---|---|",
        *map(plan_line, plans),
        "",
        f"Made by `{command}` on {date.today()}: Python {platform.python_version()}, {versions}.",
        "",
    ]
    return "\n".join(lines)


def ladder(rows: Sequence[Row]) -> list[str]:
    """One line a model: the rungs that it stands on."""
    columns = (("L4", TARGETS), ("L5", TARGETS), ("answers", ANSWERING))
    heads = ["L1", "L2", "L3", *(f"{name} {target}" for name, targets in columns for target in targets), "plan"]
    lines = [f"| model | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        sizes = [row for row in mine if row["kind"] == "published"]
        exports = [row for row in mine if row["kind"] == "export"]
        answers = [row for row in mine if row["kind"] == "answers"]
        cells = [
            rung(sizes, lambda row: agrees(row["parameters"], row["catalogue"])),
            rung(sizes, lambda row: row["methods"] > 0),
            rung([row for row in mine if row["kind"] == "equality"], lambda row: "files" in row),
            *(rung([r for r in exports if r["target"] == t and not quantized(r)], passed) for t in TARGETS),
            *(rung([r for r in exports if r["target"] == t and quantized(r)], passed) for t in TARGETS),
            *(rung([r for r in answers if r["target"] == t], lambda row: "answers" in row) for t in ANSWERING),
            rung([row for row in mine if row["kind"] == "plan"], lambda row: "milliseconds" in row),
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def quantized(row: Row) -> bool:
    """Whether a recipe or a pass was asked for: the key says so, `recipe` is what the export was made with."""
    return not row["key"].endswith("::")


def agrees(count: int, published: int) -> bool:
    """Whether a count of parameters is within 1% of the published one, or is it, rounded to its first two digits."""
    step = 10 ** max(0, len(str(published)) - max(2, len(str(published).rstrip("0"))))
    return abs(count - published) <= max(0.01 * published, step / 2)


def passed(row: Row) -> bool:
    """Whether an export was written, its gate passed."""
    return "lower" in row


def rung(rows: Iterable[Row], good: Callable[[Row], bool]) -> str:
    """How many of the rows that say something are good; blank where none was run or all are refused."""
    told = [row for row in rows if "refused" not in row]
    right = sum("failed" not in row and good(row) for row in told)
    if not told:
        return ""
    return "yes" if right == len(told) else f"{right} of {len(told)}"


def cell(row: Row, method: str) -> str:
    """What became of one method, and what its layers are kept in."""
    entry = row["lower"][method]
    found = words(entry) if entry["executed"] else f"not executed; {entry['checked']}"
    schemes = ", ".join(f"{count} {scheme}" for scheme, count in row["schemes"].get(method, {}).items())
    return f"{method} {found}" + (f" ({schemes})" if schemes else "")


def line(row: Row) -> str:
    """One export of the table."""
    head = f"| {row['model']} | {row['variant']} | {row['target']} | {row['passes']} | {row['recipe']} |"
    for why in ("failed", "refused"):
        if why in row:
            return f"{head} {why.upper() if why == 'failed' else why}: {row[why]} | | | |"
    cells = "; ".join(cell(row, method) for method in row["lower"])
    costs = (f"{row['seconds']:.0f}", f"{row['peak_rss_bytes'] / 2**20:.0f}", f"{row['file_bytes'] / 2**20:.1f}")
    return f"{head} {cells} | {' | '.join(costs)} |"


def size_line(row: Row) -> str:
    """One published size of the table."""
    head = f"| {row['model']} | {row['variant']} |"
    if "failed" in row:
        return f"{head} FAILED: {row['failed']} | | | | |"
    difference = 100 * (row["parameters"] / row["catalogue"] - 1)
    return (
        f"{head} {row['parameters']:,} | {row['catalogue']:,} | {difference:+.2f}% | {row['methods']} | "
        f"{row['seconds']:.1f} |"
    )


def answer_line(row: Row) -> str:
    """One bundle's answers of the table."""
    head = f"| {row['model']} | {row['variant']} | {row['target']} |"
    for why in ("failed", "refused"):
        if why in row:
            return f"{head} {why.upper() if why == 'failed' else why}: {row[why]} | |"
    return f"{head} {'; '.join(map(answer_words, row['answers']))} | {row['seconds']:.0f} |"


def answer_words(found: Row) -> str:
    """One prompt, or one output, of a bundle's answers."""
    if "refused" in found:
        return f"{found['prompt']}: not taken ({found['refused']})"
    said = f"{found['prompt']}: the same" if "prompt" in found else found["output"]
    return f"{said} {found['relative_l2']:.1e}"


def plan_line(row: Row) -> str:
    """One published size's plan of the table."""
    head = f"| {row['model']} | {row['variant']} |"
    if "failed" in row:
        return f"{head} FAILED: {row['failed']} | | |"
    spent = "; ".join(f"{call} {ms:.3g}" for call, ms in row["milliseconds"][DEVICE].items())
    return f"{head} {row['weight_bytes'] / 2**20:,.1f} | {row['kv_cache_bytes'] / 2**20:,.1f} | {spent} |"
