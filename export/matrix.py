"""`make matrix`: every architecture up the ladder, into docs/matrix.md and, row by row as it is measured, matrix.json.

`--resume` keeps what an earlier run has measured. A rung that did not run is a blank.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from export.alone import alone
from export.matrix_jobs import KINDS, Job, jobs
from export.matrix_page import page
from export.stages import to_stderr
from graphs import registry
from graphs.files import write_whole

#: jobs at a time, each in a process of its own
WORKERS = 2


def attempt(job: Job) -> dict[str, Any]:
    """A job's row; what it raises is its reason."""
    try:
        return alone(job.run)
    except Exception as error:  # a row that failed shows why, the others go on
        return {"key": job.key, **vars(job), "failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def ordered(rows: Iterable[dict[str, Any]], wanted: Iterable[Job]) -> list[dict[str, Any]]:
    """Results by model and rung, whichever run they are from, then as they are wanted."""
    kinds, places = list(KINDS), {job.key: place for place, job in enumerate(wanted)}
    return sorted(rows, key=lambda row: (row["model"], kinds.index(row["kind"]), places.get(row["key"], -1)))


def main() -> int:
    """Run everything, two jobs at a time; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="the folder to write to")
    parser.add_argument("--models", nargs="*", default=registry.names(), help="only these models")
    parser.add_argument("--variants", nargs="*", help="lower only these variants, as mobilevlm-nano or tiny")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="only these rungs, the rest is kept")
    parser.add_argument("--minutes", type=float, help="start no job after so long; the page says how many were left")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run that did not fail")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    data, text = args.out / "matrix.json", args.out / "matrix.md"
    known: dict[str, dict[str, Any]] = {}
    if args.resume and data.is_file():
        known = {row["key"]: row for row in json.loads(data.read_text()) if "failed" not in row}
    wanted = list(jobs(args.models, args.variants))
    keys = {job.key for job in (wanted if args.variants is None else jobs(args.models, None))}
    known = {key: row for key, row in known.items() if row["model"] not in args.models or key in keys}
    todo = [job for job in wanted if job.key not in known and job.kind in args.kinds]
    start, lock = time.monotonic(), Lock()

    def run(job: Job) -> None:
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            return
        row = attempt(job)
        became = next((f"{why}: {row[why]}" for why in ("failed", "refused") if why in row), "passed")
        with lock:
            known[job.key] = row
            write_whole(data, json.dumps(ordered(known.values(), wanted), indent=1) + "\n")
            done = sum(j.key in known for j in wanted)
            to_stderr(f"[{done}/{len(wanted)}] {job.key}: {became}")

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(run, todo))
    rows = ordered(known.values(), wanted)
    left = sum(job.key not in known for job in wanted)
    command = " ".join(["python -m export.matrix", *sys.argv[1:]]) if sys.argv[1:] else "make matrix"
    write_whole(text, page(rows, command, left))
    failed = sum("failed" in row for row in rows)
    to_stderr(f"{text}: {len(rows)} jobs, {left} not run, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
