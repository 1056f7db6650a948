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
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from calibration.source import Calibration
from export.alone import alone
from export.pipeline import ExportOptions, export
from export.stages import silent, to_stderr
from export.targets.base import TARGETS, load_target
from graphs import registry
from graphs.compress.passes.prune import RULES
from graphs.errors import GateError, UserError
from graphs.model import Request, load_model, zoo_checkpoints
from graphs.trace import count_parameters, trace
from quant.recipe import names

#: exports at a time, each in a process of its own
WORKERS = 2

#: variants that go through every pass as well
COMPRESSED = ("mobilevlm-nano", "tiny")

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
            "model": model,
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


def passes_for(tokens: int) -> list[str]:
    """Every pass once, at half of a picture's tokens or a quarter."""
    half = max(1, tokens // 2)
    prunes = [f"prune{{keep={half},method={method}}}" for method in RULES]
    return ["pool{factor=2}", "pixel_shuffle{factor=2}", "ldp{version=1}", "ldp{version=2}", *prunes]


def in_decoder(tokens: int) -> str:
    """The pass that prunes inside the decoder, behind its first layer."""
    return f"decoder_prune{{layer=1,keep={max(1, tokens // 2)}}}"


def grid(request: Request) -> Iterator[tuple[str, str | None]]:
    """Passes and recipes of one model: each recipe; for image-text decoders each pass, and one with each recipe."""
    for recipe in names():
        yield "", recipe
    tokens = load_model(request).architecture.facts().get("visual_tokens")
    if tokens and request.variant in COMPRESSED:
        for passes in (*passes_for(tokens), in_decoder(tokens)):
            yield passes, None
        for recipe in (name for name in names() if not name.startswith("reference")):
            yield f"prune{{keep={max(1, tokens // 2)},method=divprune}}", recipe


def lowered(request: Request, target: str, passes: str, recipe: str | None) -> dict[str, Any]:
    """One export, measured; or the reason why there is none: refused by a capability table, or failed."""
    row = {
        "model": request.model,
        "variant": request.variant,
        "target": target,
        "passes": passes,
        "recipe": recipe or load_target(target).capabilities.default_recipe,
    }
    calibration = Calibration(count=16)
    with TemporaryDirectory() as scratch:
        options = ExportOptions(request, target, recipe, calibration, passes, out=Path(scratch) / "b")
        try:
            out = export(options, silent)
        except UserError as error:
            return {**row, "refused": str(error)}
        except GateError as error:
            return {**row, "failed": str(error)}
        manifest = json.loads((out / "manifest.json").read_text())
        return {
            **row,
            "lower": {name: entry["lower"] for name, entry in manifest["verification"].items()},
            "quantize": {name: entry["quantize"] for name, entry in manifest["verification"].items()},
            "schemes": manifest["quantization"]["schemes"],
            "limits": manifest["limits"],
            "seconds": sum(stage["seconds"] for stage in manifest["stages"]),
            "peak_rss_bytes": max(stage["peak_rss_bytes"] for stage in manifest["stages"]),
            "file_bytes": sum(record["bytes"] for record in manifest["files"].values()),
        }


def cell(row: dict[str, Any], method: str) -> str:
    """What became of one method, and what its layers are kept in."""
    entry = row["lower"][method]
    found = f"{entry['relative_l2']:.1e}" if entry["executed"] else f"not executed; {entry['checked']}"
    schemes = ", ".join(f"{count} {scheme}" for scheme, count in row["schemes"].get(method, {}).items())
    return f"{method} {found}" + (f" ({schemes})" if schemes else "")


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"| {row['model']} | {row['variant']} | {row['target']} | {row['passes']} | {row['recipe']} |"
    for why in ("failed", "refused"):
        if why in row:
            return f"{head} {why.upper() if why == 'failed' else why}: {row[why]} | | | |"
    cells = "; ".join(cell(row, method) for method in row["lower"])
    costs = (f"{row['seconds']:.0f}", f"{row['peak_rss_bytes'] / 2**20:.0f}", f"{row['file_bytes'] / 2**20:.1f}")
    return f"{head} {cells} | {' | '.join(costs)} |"


def page(sizes: list[dict[str, Any]], rows: list[dict[str, Any]], command: str, left: int) -> str:
    """The results as Markdown."""
    executed = [row for row in rows if "lower" in row]
    refused, failed = (sum(why in row for row in rows) for why in ("refused", "failed"))
    lines = [
        "# What was lowered, and how far from its graph",
        "",
        "Relative L2 of each lowered method against the graph it was lowered from, prefill and decode steps, on seeded "
        "inputs. The limit is 1e-4 in fp32 and 1e-2 in fp16 and for quantized graphs, or, where activations are "
        "rounded, twice what the graph itself moves when it is computed in other floats; what is beyond it is not "
        "written. Behind each error, how many layers the recipe keeps in which scheme (`vlmx list targets` explains "
        "what each target takes). `tiny` variants have random weights. A combination that a target's capability table "
        "excludes is refused, with the reason.",
        "",
        f"{len(rows)} exports: {len(executed)} written, {refused} refused, {failed} failed"
        + (f"; {left} more were not run for want of time." if left else "."),
        "",
        "| model | variant | target | passes | recipe | methods | seconds | peak MiB | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(line, rows),
        "",
        "## Published sizes, on fake tensors",
        "",
        "| model | variant | parameters | catalogue | difference | methods traced | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {size['model']} | {size['variant']} | {size['parameters']:,} | {size['catalogue']:,} | "
        f"{100 * (size['parameters'] / size['catalogue'] - 1):+.2f}% | {size['methods']} | {size['seconds']:.1f} |"
        for size in sizes
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines += ["", f"Made by `{command}` on {date.today()}: Python {platform.python_version()}, {versions}.", ""]
    return "\n".join(lines)


def main() -> int:
    """Run everything, two exports at a time; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/matrix.md"))
    parser.add_argument("--models", nargs="*", default=registry.names(), help="only these models")
    parser.add_argument("--variants", nargs="*", help="only these variants, as mobilevlm-nano or tiny")
    parser.add_argument("--minutes", type=float, help="start no export after so long; the page says how many were left")
    args = parser.parse_args()
    sizes: list[dict[str, Any]] = []
    jobs: list[tuple[Request, str, str, str | None]] = []
    for model in args.models:
        to_stderr(f"{model}: tracing the published sizes")
        sizes += published(model)
        for request in small(model):
            if args.variants and request.variant not in args.variants:
                continue
            chosen = list(grid(request))
            jobs += [(request, target, passes, recipe) for passes, recipe in chosen for target in TARGETS]

    start = time.monotonic()

    def run(number: int) -> dict[str, Any] | None:
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            return None
        request, target, passes, recipe = jobs[number]
        row = alone(lowered, *jobs[number])
        became = next((f"{why}: {row[why]}" for why in ("failed", "refused") if why in row), "passed")
        what = f"{request.variant} to {target}, {passes or 'no pass'}, {recipe or 'default'}"
        to_stderr(f"[{number + 1}/{len(jobs)}] {what}: {became}")
        return row

    with ThreadPoolExecutor(WORKERS) as pool:
        rows = [row for row in pool.map(run, range(len(jobs))) if row is not None]
    args.out.parent.mkdir(exist_ok=True)
    command = " ".join(["python -m export.matrix", *sys.argv[1:]]) if sys.argv[1:] else "make matrix"
    args.out.write_text(page(sizes, rows, command, len(jobs) - len(rows)))
    failed = [row for row in rows if "failed" in row]
    to_stderr(f"{args.out}: {len(rows)} exports, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
