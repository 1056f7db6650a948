"""`make matrix`: every small variant lowered to every target by every recipe and measured, into docs/matrix.md.

Published sizes climb the rungs that need no weights: parameters counted and methods traced on fake tensors. A rung that
did not run is a blank.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from export.alone import alone
from export.pipeline import ExportOptions, export
from export.stages import silent, to_stderr
from export.targets.base import TARGETS, load_target
from graphs import registry
from graphs.errors import GateError, UserError
from graphs.model import Request, zoo_checkpoints
from graphs.trace import count_parameters, trace

PACKAGES = ("torch", "onnxruntime", "executorch", "coremltools", "tensorrt-rtx-cu13")


def published(model: str) -> Iterator[dict[str, Any]]:
    """L1 and L2 of each published size: parameters against the catalogue's, all methods traced, seconds taken."""
    for variant in registry.architecture(model).variants():
        if variant.parameters is None:
            continue
        start = time.perf_counter()
        program = trace(variant.architecture, {})
        program.check()
        yield {
            "variant": variant.name,
            "parameters": count_parameters(variant.architecture),
            "catalogue": variant.parameters,
            "methods": len(program.methods),
            "seconds": time.perf_counter() - start,
        }


def small(model: str) -> list[Request]:
    """What is lowered whole: the zoo's checkpoints, and the sizes that exist for tests, with random weights."""
    zoo = [Request(model, name) for name in zoo_checkpoints() if name.split("-")[0] == model]
    tests = [v.name for v in registry.architecture(model).variants() if v.parameters is None]
    return [*zoo, *(Request(model, name) for name in tests)]


def lowered(request: Request, target: str, recipe: str) -> dict[str, Any]:
    """One export, measured; or the reason why there is none."""
    row = {"variant": request.variant, "target": target, "recipe": recipe}
    with TemporaryDirectory() as scratch:
        try:
            out = export(ExportOptions(request, target, recipe, out=Path(scratch) / "b"), silent)
        except (GateError, UserError) as error:
            return {**row, "failed": str(error)}
        manifest = json.loads((out / "manifest.json").read_text())
        return {
            **row,
            "lower": {name: entry["lower"] for name, entry in manifest["verification"].items()},
            "quantize": {name: entry["quantize"] for name, entry in manifest["verification"].items()},
            "seconds": sum(stage["seconds"] for stage in manifest["stages"]),
            "peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in manifest["stages"]),
            "file_bytes": sum(record["bytes"] for record in manifest["files"].values()),
        }


def cell(row: dict[str, Any], method: str) -> str:
    """What became of one method."""
    entry = row["lower"].get(method)
    if entry is None:
        return ""
    return f"{entry['relative_l2']:.1e}" if entry["executed"] else f"not executed; {entry['checked']}"


def page(sizes: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# What was lowered, and how far from its graph",
        "",
        "Relative L2 of each lowered method against the graph it was lowered from, prefill and decode steps, on seeded "
        "inputs. The limit is 1e-4 in fp32 and 1e-2 in fp16; what is beyond it is not written. `tiny` and `tiny-v2` "
        "have random weights.",
        "",
        "| variant | target | recipe | vision_encoder | token_embedding | text_decoder | seconds | peak MiB | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['variant']} | {row['target']} | {row['recipe']} |"
        if "failed" in row:
            lines.append(f"{head} FAILED: {row['failed']} | | | | | |")
            continue
        cells = " | ".join(cell(row, method) for method in ("vision_encoder", "token_embedding", "text_decoder"))
        sizes_of = f"{row['seconds']:.0f} | {row['peak_rss_bytes'] / 2**20:.0f} | {row['file_bytes'] / 2**20:.1f}"
        lines.append(f"{head} {cells} | {sizes_of} |")
    lines += [
        "",
        "## Published sizes, on fake tensors",
        "",
        "| variant | parameters | catalogue | difference | methods traced | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {size['variant']} | {size['parameters']:,} | {size['catalogue']:,} | "
        f"{100 * (size['parameters'] / size['catalogue'] - 1):+.2f}% | {size['methods']} | {size['seconds']:.1f} |"
        for size in sizes
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines += ["", f"Made by `make matrix` on {date.today()}: Python {platform.python_version()}, {versions}.", ""]
    return "\n".join(lines)


def main() -> int:
    """Run everything; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/matrix.md"))
    args = parser.parse_args()
    sizes: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for model in registry.names():
        to_stderr(f"{model}: tracing the published sizes")
        sizes += published(model)
        for request in small(model):
            for target in TARGETS:
                for recipe in load_target(target).capabilities.recipes:
                    to_stderr(f"{request.variant} to {target}, {recipe}")
                    rows.append(alone(lowered, request, target, recipe))
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(page(sizes, rows))
    failed = [row for row in rows if "failed" in row]
    to_stderr(f"{args.out}: {len(rows)} exports, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
