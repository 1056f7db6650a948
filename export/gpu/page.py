"""What `make bench-gpu` measured, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

#: heading, the row's entry, and how it is written
COLUMNS = (
    ("vision ms", "vision_ms", "{:.2f}"),
    ("prefill ms", "prefill_ms", "{:.2f}"),
    ("decode ms", "decode_ms", "{:.3f}"),
    ("first token ms", "first_token_ms", "{:.1f}"),
    ("decode tokens/s", "decode_tokens_per_s", "{:.0f}"),
    ("GPU MiB", "memory_bytes", "MiB"),
    ("file MiB", "file_bytes", "MiB"),
    ("export s", "export_s", "{:.0f}"),
    ("load s", "load_s", "{:.1f}"),
    ("first calls s", "first_calls_s", "{:.1f}"),
)

#: the calls whose ratio to torch eager is shown
RATIOS = ("vision_ms", "prefill_ms", "decode_ms")

EAGER = "torch eager"


def page(table: Mapping[str, Any]) -> str:
    """Machine, then for each size the times, ratios, errors, and the reasons of what has none."""
    machine, rows = table["machine"], table["rows"]
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items() if found)
    lines = [
        "# TensorRT engines on an NVIDIA GPU",
        "",
        "`make bench-gpu` wrote this page. "
        f"{machine['name']}, compute capability {machine['compute_capability']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, driver {machine['driver'] or 'unknown'} (CUDA {machine['cuda']}), "
        f"{machine['cores']} cores, {machine['system']}, Python {machine['python']}; {packages}.",
        "",
        "Vision is one picture, prefill a prompt of 160 embeddings (fewer where the context is short), decode one "
        "token after it: medians of the device alone, inputs and outputs left on it. First token and decode tokens/s "
        "are through the runtime, pictures, embeddings and logits carried over the bus. First calls: kernels are "
        "compiled for their shapes. GPU memory is what the device has less of than before. MobileVLM 1.7B has random "
        "weights.",
        *(f"\n{note}." for note in table["notes"]),
        "",
    ]
    for size in dict.fromkeys(row["size"] for row in rows):
        lines += section(size, [row for row in rows if row["size"] == size])
    return "\n".join(lines).rstrip() + "\n"


def section(size: str, rows: Sequence[Row]) -> list[str]:
    """One size."""
    eager = next((row for row in rows if row["by"] == EAGER and "failed" not in row), None)
    done = [row for row in rows if "vision_ms" in row]
    lines = [f"## {size}", ""]
    if done:
        heads = ["by", "numbers", *(name for name, _, _ in COLUMNS), "times as fast as eager: vision, prefill, decode"]
        lines += [f"| {' | '.join(heads)} |", f"|---|---|{'--:|' * (len(heads) - 2)}"]
        lines += [f"| {' | '.join([called(row), row['numbers'], *cells(row), ratios(row, eager)])} |" for row in done]
        lines += ["", *errors(done)]
    lines += [f"- {called(row)}, {row['numbers']}: no numbers. {row['failed']}" for row in rows if "failed" in row]
    return [*lines, ""]


def called(row: Row) -> str:
    """What computed, and where it was built if not here."""
    name = str(row.get("version") or row["by"]).partition(" on ")[0]
    name = row["by"] if row["by"].startswith("torch") else name
    return f"{name}, built {row['built']}" if "without" in row.get("built", "") else name


def cells(row: Row) -> list[str]:
    """The numbers of a row, `-` where there is none."""
    found = []
    for _, entry, form in COLUMNS:
        value = row.get(entry)
        found.append("-" if value is None else f"{value / 2**20:.0f}" if form == "MiB" else form.format(value))
    return found


def ratios(row: Row, eager: Row | None) -> str:
    """How many times as fast as eager on the same GPU."""
    if eager is None or row is eager:
        return "-"
    return ", ".join(f"{eager[name] / row[name]:.2f}" for name in RATIOS)


def errors(rows: Sequence[Row]) -> list[str]:
    """Errors of outputs: against the graph that was lowered, and against eager in half precision."""
    lines = []
    for row in rows:
        told = [f"WRONG: {row['wrong']}"] if "wrong" in row else []
        for name, entry in row.get("lower", {}).items():
            if entry.get("executed"):
                told.append(f"{name} {entry['relative_l2']:.1e} of {entry['limit']:.1e}")
            else:
                told.append(f"{name} not executed: {entry.get('why')}")
        if told:
            lines.append(f"- {called(row)}, {row['numbers']}, relative L2 against its own graph: {'; '.join(told)}")
        if against := row.get("against_eager"):
            found = "; ".join(f"{name} {entry['relative_l2']:.1e}" for name, entry in against.items())
            lines.append(f"- {called(row)}, {row['numbers']}, against torch eager in fp16 on this GPU: {found}")
    return [*lines, ""] if lines else []
