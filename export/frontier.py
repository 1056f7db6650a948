"""`make frontier`: accuracy against latency for passes x recipes x targets on zoo/mobilevlm-nano, into docs/frontier.*.

Every row is an export in a process of its own and its answers to held-out questions by the target's own runtime. A
finished row is saved at once, so that `--resume` goes on where a run was stopped. At the end all bundles are timed side
by side, round after round: only then need the machine have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from export.doctor import LIBRARIES, RUNS
from export.frontier_goals import REFERENCE, Row
from export.frontier_page import page, picture
from export.frontier_rows import REQUEST, TIMED, Cell, Measurer, Setting
from export.frontier_times import NEW_TOKENS, PROMPT_TOKENS, REPEAT, ROUNDS
from export.machine import processor
from export.stages import Progress, to_stderr
from graphs.compress.base import parse, write
from graphs.compress.passes.prune import RULES
from graphs.errors import UserError
from graphs.files import read_json, write_whole
from quant.recipe import names, recipe

SCHEMA = 1

# The grid: blocks in order of importance, each of them passes x recipes x targets.

TOKENS = 36  # of a picture, before any pass
HALF, QUARTER = TOKENS // 2, TOKENS // 4
TARGETS = (*TIMED, "coreml")
RECIPES = (REFERENCE, *(name for name in names() if name != REFERENCE))
SHIPPING = (REFERENCE, *(name for name in RECIPES if recipe(name).layers))
BEST = (
    "",
    f"prune{{keep={HALF},method=cls_attention}}",
    f"prune{{keep={HALF},method=divprune}}",
    f"prune{{keep={QUARTER},method=divprune}}",
    "pool{factor=2}",
)
PASSES = (
    "",
    *(f"prune{{keep={keep},method={method}}}" for keep in (HALF, QUARTER) for method in RULES),
    "pool{factor=2}",
    "pixel_shuffle{factor=2}",
    "ldp{version=2}",
    f"decoder_prune{{layer=2,keep={HALF}}}",
    *(f"prune{{keep={keep},method=random,seed={seed}}}" for keep in (HALF, QUARTER) for seed in (1, 2)),
)


@dataclass(frozen=True)
class Block:
    """All combinations, the first passes and recipes first."""

    passes: tuple[str, ...]
    recipes: tuple[str, ...]
    targets: tuple[str, ...]

    def cells(self) -> Iterator[Cell]:
        for text in self.passes:
            for name in self.recipes:
                for target in self.targets:
                    yield Cell(write(parse(text)), name, target)


GRID = (
    Block(("",), RECIPES, TIMED),
    Block(PASSES, (REFERENCE,), ("onnxruntime",)),
    Block(BEST, SHIPPING, TIMED),
    Block(("",), RECIPES, ("coreml",)),
    Block(BEST, (REFERENCE, "mobile-balanced"), ("coreml",)),
)


def cells(grid: Sequence[Block], targets: Sequence[str] = TARGETS) -> list[Cell]:
    """The grid's cells on `targets`, each once, in order."""
    return list(dict.fromkeys(cell for block in grid for cell in block.cells() if cell.target in targets))


def load(path: Path) -> list[Row]:
    """The rows of an earlier run, none where there is no file. Raises UserError where it is damaged."""
    if not path.exists():
        return []
    rows = read_json(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: no rows of an earlier run: start without --resume")
    return rows


def run(
    wanted: Sequence[Cell],
    identity: Callable[[Cell], Row],
    stored: Sequence[Row],
    measure_one: Callable[[Cell], Row],
    save: Callable[[Sequence[Row], Sequence[Cell]], None],
    minutes: float,
    progress: Progress,
) -> list[Cell]:
    """Take finished rows from `stored`, measure the others until `minutes` are spent; `save` after every row.

    Gives the cells that no time was left for.

    A row that failed is measured again: what made it fail is what a new run is for. Finished rows that are not wanted
    now, such as another target's, stay.
    """
    rows = still_true(stored, identity)
    left = [cell for cell in wanted if cell not in rows]
    order = [*wanted, *(cell for cell in rows if cell not in wanted)]

    def so_far() -> list[Row]:
        return [rows[cell] for cell in order if cell in rows]

    progress(f"{len(wanted)} rows: {len(wanted) - len(left)} are there, {len(left)} to measure")
    began = time.monotonic()
    while left and time.monotonic() - began < 60 * minutes:
        cell = left.pop(0)
        progress(f"[{len(wanted) - len(left)}/{len(wanted)}] {cell}{remaining(rows.values(), len(left) + 1)}")
        start = time.monotonic()
        row = measure_one(cell)
        seconds = round(time.monotonic() - start, 1)
        rows[cell] = {**identity(cell), **row, "seconds": seconds, "date": date.today().isoformat()}
        progress(f"      {describe(row)}; {seconds:.0f} s")
        save(so_far(), left)
    save(so_far(), left)
    if left:
        progress(f"{minutes:g} minutes are spent, {len(left)} rows not run: `--resume` goes on")
    return left


def still_true(stored: Sequence[Row], identity: Callable[[Cell], Row]) -> dict[Cell, Row]:
    """The finished rows of `stored` whose inputs are what they were."""
    rows = {}
    for row in stored:
        cell = Cell(*(str(row.get(name)) for name in ("passes", "recipe", "target")))
        if row.get("status") not in ("measured", "refused") or cell.recipe not in RECIPES or cell.target not in TARGETS:
            continue
        if all(row.get(key) == value for key, value in identity(cell).items()):
            rows[cell] = row
    return rows


def remaining(rows: Collection[Row], left: int) -> str:
    """The estimated time for `left` rows, from what rows took before; nothing where none did."""
    seconds = [row["seconds"] for row in rows]
    return f" (about {left * statistics.fmean(seconds) / 60:.0f} min left)" if seconds else ""


def describe(row: Row) -> str:
    """A row in words."""
    if row["status"] != "measured":
        return f"{row['status'].upper()}: {row['why']}"
    return f"{100 * row['accuracy']['all']:.1f}% right, {row['tokens']} visual tokens"


def facts(setting: Setting, targets: Sequence[str]) -> Row:
    """Where, when and with what a run was made."""
    libraries = ("torch", *(LIBRARIES[name][1] for name in targets))
    return {
        "checkpoint": REQUEST.checkpoint,
        **asdict(setting),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "repeat": REPEAT,
        "rounds": ROUNDS,
        "processor": processor()["name"],
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "date": date.today().isoformat(),
        "command": f"python -m export.frontier --count {setting.count} --targets {','.join(targets)}",
        "targets": list(targets),
        "runs_here": {name: runs() for name, runs in RUNS.items()},
    }


def publish(out: Path, about: Row, rows: Sequence[Row], left: Sequence[Cell]) -> None:
    """Write the data, then the page and the picture made from it."""
    out.mkdir(parents=True, exist_ok=True)
    report = {"schema": SCHEMA, "facts": about, "rows": list(rows), "not_run": [asdict(cell) for cell in left]}
    write_whole(out / "frontier.json", json.dumps(report, indent=1) + "\n")
    (out / "frontier.md").write_text(page(report))
    (out / "frontier.svg").write_text(picture(report))


def main() -> int:
    """Run the grid; 1 where a row failed, which a refused one did not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=280, help="held-out questions, the same ones for every row")
    parser.add_argument("--minutes", type=float, default=75, help="start no new row after so long")
    parser.add_argument("--targets", default=",".join(TARGETS), help="which of them to measure")
    parser.add_argument("--resume", action="store_true", help="keep the finished rows of an earlier run")
    parser.add_argument("--bundles", type=Path, help="where bundles are kept for a next run")
    parser.add_argument("--no-times", action="store_true", help="leave latencies as they are")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="the folder to write to")
    args = parser.parse_args()
    targets = tuple(args.targets.split(","))
    setting = Setting.here(args.count)
    about = facts(setting, targets)

    def save(rows: Sequence[Row], left: Sequence[Cell]) -> None:
        publish(args.out, about, rows, left)

    with TemporaryDirectory(prefix="frontier-") as scratch:
        stored = load(args.out / "frontier.json") if args.resume else []
        kept = args.bundles or Path(scratch)
        kept.mkdir(parents=True, exist_ok=True)
        measurer = Measurer(setting, kept)
        left = run(cells(GRID, targets), setting.identity, stored, measurer, save, args.minutes, to_stderr)
        rows = load(args.out / "frontier.json")
        if not args.no_times:
            measurer.time([row for row in rows if row["target"] in targets], to_stderr)
            save(rows, left)
    failed = [row for row in rows if row["status"] == "failed"]
    to_stderr(f"{args.out / 'frontier.md'}: {len(rows)} rows, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
