"""The rows as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.memory import mebibytes
from peers.goals import LLAMA, Goal, Row, named
from peers.load import CONTEXT, DECODE, PREFILL, THREADS, WORDS

#: heading, and the measure whose seconds a ratio to llama.cpp is taken of
TIMES = (
    ("prefill", "prefill, tok/s"),
    ("decode", "decode, tok/s"),
    ("vision", "vision, s"),
    ("ttft", "first token, s"),
)


def time(row: Row, measure: str, peer: Row | None) -> str:
    """A median in its unit, and how many times as fast as llama.cpp that is."""
    seconds = row["medians"].get(measure)
    if seconds is None:
        return "-"
    shown = f"{row['tokens_per_s'][measure]:.1f}" if measure in row["tokens_per_s"] else f"{seconds:.2f}"
    theirs = None if peer is None or peer is row else peer["medians"].get(measure)
    return shown if theirs is None else f"{shown} ({theirs / seconds:.2f}x)"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; the first column to the left."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    return [f"| {' | '.join(line)} |" for line in (head, rule, *lines)]


def sized(count: int | None) -> str:
    """A size in words."""
    return "-" if count is None else mebibytes(count)


def run_tables(rows: Sequence[Row]) -> list[str]:
    """Times with their ratios; memory and size; accuracy."""
    peer = named(rows, LLAMA)
    ran = [row for row in rows if row["medians"]]
    times = [[row["name"], *(time(row, measure, peer) for measure, _ in TIMES)] for row in ran]
    sizes = [
        [row["name"], sized(row["peak_rss_bytes"]), sized(row["file_bytes"]), f"{row['load_seconds']:.1f}"]
        for row in ran
    ]
    exact = [
        [row["name"], *(f"{found:.1f}" if (found := row["accuracy_db"].get(m)) is not None else "-" for m, _ in TIMES)]
        for row in ran
    ]
    return [
        *table(["", *(heading for _, heading in TIMES)], times),
        "",
        "In brackets: how many times as fast as llama.cpp.",
        "",
        *table(["", "peak memory, MiB", "files, MiB", "loading, s"], sizes),
        "",
        "Peak memory is the whole process's, from its start. SQNR of each measure's output against float32, in dB:",
        "",
        *table(["", *(measure for measure, _ in TIMES)], exact),
        *class_last(ran),
    ]


def class_last(rows: Sequence[Row]) -> list[str]:
    """Towers whose output is another: how near they are to float32 with the class token behind the patches."""
    found = {row["name"]: row["accuracy_db"].get("vision_class_last") for row in rows}
    near = [f"{name} {db:.1f} dB" for name, db in found.items() if db is not None]
    if not near:
        return []
    return [
        "",
        "Where vision is far off, the tower is another: float32 with the class token behind the patches, and the first "
        f"patch left out in its place, agrees with {', '.join(near)}.",
    ]


def making_table(rows: Sequence[Row]) -> list[str]:
    """Seconds and memory of making."""
    lines = [
        [
            row["name"],
            f"{made['seconds']:.1f}",
            *(sized(count) for count in (made["peak_rss_bytes"], row["file_bytes"])),
            ", ".join(made["artefacts"]),
        ]
        for row in rows
        if (made := row["making"]) is not None
    ]
    return table(["", "seconds", "peak memory, MiB", "files, MiB", "artefacts"], lines)


def judged(goals: Sequence[Goal]) -> list[str]:
    """The goals."""
    words = {True: "met", False: "not met", None: "not judged"}
    return table(["goal", "measured", ""], [[goal.text, goal.evidence, words[goal.met]] for goal in goals])


def missing(rows: Sequence[Row]) -> list[str]:
    """Who did not run, or stopped, and why."""
    lines = [
        f"* {row['name']}: {'stopped' if row['medians'] else 'not run'}: {row['why']}" for row in rows if row["why"]
    ]
    return ["", *lines] if lines else []


PAGE = """\
# Ours and the peers, side by side

Written by `make bench-peers`; the data is in `peers.json`.

MobileVLM-1.7B's shape with random weights. {threads} threads each, a cache of {context} tokens, one request at a time.
Prefill: {prefill} tokens. Decode: {decode} tokens, one by one, after these. Vision: one picture of 336 x 336, from its
bytes to its embeddings (23 layers of CLIP ViT-L/14 and the projector). First token: that picture and {words} tokens.
Contenders take turns, each stopped while another is measured; medians of {rounds} after one that warms up.

{machine}

Load average of the machine, about {threads} where nothing else runs: {loads}.{busy}

![medians](peers.svg)

{tables}

What they are:

{about}

## Goals

{goals}

## Making the artefacts

Each by a process of its own, from the same float16 checkpoint; the peak is that process's. What only brings the
checkpoint into the layout that a tool reads is not counted.

{making}
"""


#: load average from which on something else must have been running
BUSY = THREADS + 1.5


def busy(loads: Mapping[str, float]) -> str:
    """A warning where the machine had other work."""
    beside = max(loads.values(), default=0.0) > BUSY
    return " **Something else was running: these figures tell little, their ratios not much more.**" if beside else ""


def machine_line(machine: dict[str, Any]) -> str:
    """What it ran on."""
    processor = machine["processor"]
    versions = ", ".join(f"{name} {found or '(not installed)'}" for name, found in machine["packages"].items())
    return (
        f"{machine['date']}, {processor['name']}, {processor['cores']} cores ({', '.join(processor['features'])}), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, Python {machine['python']}, revision "
        f"{machine['commit']}; {versions}."
    )


def page(document: dict[str, Any], goals: Sequence[Goal]) -> str:
    """docs/benchmarks/peers.md."""
    rows = document["rows"]
    return PAGE.format(
        threads=THREADS,
        context=CONTEXT,
        prefill=PREFILL,
        decode=DECODE,
        words=WORDS,
        rounds=document["rounds"],
        machine=machine_line(document["machine"]),
        loads=", ".join(f"{load:.1f} {when}" for when, load in document["load_average"].items()),
        busy=busy(document["load_average"]),
        tables="\n".join([*run_tables(rows), *missing(rows)]),
        about="\n".join(f"* {row['name']}: {row['about']}; {row['version'] or 'not run'}" for row in rows),
        goals="\n".join(judged(goals)),
        making="\n".join(making_table(rows)),
    )
