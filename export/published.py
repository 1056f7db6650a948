"""`make published`: every architecture at a published size, into docs/benchmarks/published.*: seconds, memory, gates.

Weights are random, in float16, and mapped, as a checkpoint's are. Of each export the page has what `--max-memory` says
that it will take, too. `--resume` keeps what an earlier run has measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from export.alone import alone
from export.gate import words
from export.machine import described
from export.measured import Row, failure, measured
from export.memory import mebibytes
from export.pipeline import ExportOptions
from export.stages import to_stderr
from export.targets.base import TARGETS
from graphs import registry
from graphs.files import write_whole
from graphs.model import Request
from graphs.spec import Variant
from graphs.trace import count_parameters
from zoo.random_checkpoint import write

#: a ceiling that nothing reaches: estimates are made where there is one
NO_CEILING = 1 << 50

PACKAGES = ("torch", "onnxruntime", "executorch", "coremltools", "tensorrt-rtx-cu13")


def smallest(model: str) -> tuple[Variant, int]:
    """The published variant with the fewest parameters, and how many these are."""
    published = [each for each in registry.architecture(model).variants() if not each.name.startswith("tiny")]
    return min(((each, count_parameters(each.architecture)) for each in published), key=lambda found: found[1])


def told(manifest: Mapping[str, Any]) -> Row:
    """What the page has of a manifest besides."""
    return {
        "estimated_rss_bytes": max(stage.get("estimated_rss_bytes", 0) for stage in manifest["stages"]),
        "left_out": sum(map(len, (manifest["left_out"] or {}).values())),
    }


def timed(options: ExportOptions) -> Row:
    """What an export took, with the seconds of its process from the start."""
    start = time.perf_counter()
    try:
        found = alone(measured, options, told)
    except Exception as error:
        found = failure(error)
    return {**found, "seconds": time.perf_counter() - start}


def cells(row: Row) -> list[str]:
    """A row of the table."""
    name = [row["model"], row["variant"], f"{row['parameters'] / 1e9:.2f}", row["target"]]
    why = next((f"{word}: {row[word]}" for word in ("refused", "failed") if word in row), None)
    if why is not None:
        return [*name, *[""] * 5, why]
    gates = "; ".join(
        f"{method} {words(lower) if lower['executed'] else 'not executed'}" for method, lower in row["lower"].items()
    )
    sizes = (mebibytes(row[key]) for key in ("peak_rss_bytes", "estimated_rss_bytes", "file_bytes"))
    return [*name, f"{row['seconds']:.0f}", *sizes, str(row["left_out"]), gates]


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine, rows = document["machine"], document["rows"]
    processor = machine["processor"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["packages"].items() if found)
    head = ("model", "variant", "10^9 parameters", "target", "s", "peak MiB", "estimated MiB", "bundle MiB")
    lines = [
        "# Every architecture at a published size",
        "",
        f"Written by `{document['command']}`; the data is in `published.json`.",
        "",
        f"The smallest published size of each, its random float16 weights mapped from files, by `{document['recipe']}` "
        f"({document['options']}). Seconds and peak memory are the whole process's; *estimated* is what "
        "`--max-memory` would have refused it by. Large models are checked by one layer of each kind: *left out* are "
        "those that others stand for. Errors are relative L2 of what was lowered against its graph.",
        "",
        f"{machine['date']}, {processor['name']}, {processor['cores']} cores ({', '.join(processor['features'])}), "
        f"{machine['system']}, Python {machine['python']}, revision {machine['commit']}; {versions}.",
        "",
        *(f"| {' | '.join(line)} |" for line in ((*head, "left out", "errors"), ["---"] * 10, *map(cells, rows))),
    ]
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace, model: str, done: Sequence[tuple[str, str]]) -> list[Row]:
    """The rows of one model that are not `done`."""
    targets = [target for target in args.targets if (model, target) not in done]
    variant, parameters = smallest(model)
    row = {"model": model, "variant": variant.name, "parameters": parameters}
    with TemporaryDirectory(dir=args.scratch) as scratch:
        if targets and 4 * parameters > shutil.disk_usage(scratch).free:  # twice the checkpoint
            why = f"the disk has no room for {4 * parameters >> 30} GiB"
            return [{**row, "target": target, "refused": why} for target in targets]
        checkpoint, rows = Path(scratch) / variant.name, []
        if targets:
            alone(write, checkpoint, variant)
        request = Request(model, checkpoint=str(checkpoint), max_context=args.max_context)
        for target in targets:
            out = Path(scratch) / "bundle"
            options = ExportOptions(request, target, args.quant, out=out, force=True, max_memory=NO_CEILING)
            rows.append({**row, "target": target, **timed(options)})
            to_stderr(" | ".join(cells(rows[-1])))
        return rows


def main() -> int:
    """Run the rows one after the other; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="the folder to write to")
    parser.add_argument("--models", nargs="*", default=registry.names(), help="only these models")
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=["onnxruntime"], help="only these targets")
    parser.add_argument("--quant", default="peers/quick.toml", help="the recipe")
    parser.add_argument("--max-context", type=int, help="tokens of the decoders' caches, otherwise as published")
    parser.add_argument("--scratch", type=Path, help="where checkpoints and bundles are made, one at a time")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run that did not fail")
    args = parser.parse_args()
    data = args.out / "published.json"
    rows: list[Row] = json.loads(data.read_text())["rows"] if args.resume and data.is_file() else []
    rows = [row for row in rows if "failed" not in row and "refused" not in row]
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        rows += run(args, model, [(row["model"], row["target"]) for row in rows])
        rows.sort(key=lambda row: (row["model"], row["target"]))
        context = "as published" if args.max_context is None else f"of {args.max_context} tokens"
        document = {
            "command": " ".join(["python -m export.published", *sys.argv[1:]]) if sys.argv[1:] else "make published",
            "recipe": args.quant,
            "options": f"nothing calibrated, contexts {context}",
            "machine": described(PACKAGES),
            "rows": rows,
        }
        write_whole(data, json.dumps(document, indent=1) + "\n")
        write_whole(args.out / "published.md", page(document))
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
