"""`make matrix`: every architecture up the ladder, into docs/matrix.md and, row by row as it is measured, matrix.json.

`--resume` keeps what an earlier run has measured, of other models too. A rung that did not run is a blank.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from export.alone import alone
from export.matrix_jobs import KINDS, Job, jobs
from export.matrix_page import page
from export.measured import failure
from export.stages import to_stderr
from graphs import registry
from graphs.files import write_whole

#: jobs at a time, each in a process of its own, unless told otherwise
WORKERS = 2


def attempt(job: Job) -> dict[str, Any]:
    """A job's row; what it raises is its reason."""
    try:
        return alone(job.run)
    except Exception as error:  # a row that failed shows why, the others go on
        return {"key": job.key, **vars(job), **failure(error)}


def main() -> int:
    """Run everything, two jobs at a time; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="the folder to write to")
    parser.add_argument("--models", nargs="*", default=registry.names(), help="only these models")
    parser.add_argument("--variants", nargs="*", help="lower only these variants, as mobilevlm-nano or tiny")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="only these rungs, the rest is kept")
    parser.add_argument("--minutes", type=float, help="start no job after so long; the page says how many were left")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run that did not fail")
    parser.add_argument("--workers", type=int, default=WORKERS, help="jobs at a time")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    data, text = args.out / "matrix.json", args.out / "matrix.md"
    known: dict[str, dict[str, Any]] = {}
    if args.resume and data.is_file():
        known = {row["key"]: row for row in json.loads(data.read_text())}
    wanted = list(jobs(args.models, args.variants))
    order = [job.key for job in jobs(registry.names(), None)]
    todo = [job for job in wanted if job.kind in args.kinds and "failed" in known.get(job.key, {"failed": ""})]
    start, lock = time.monotonic(), Lock()

    def rows() -> list[dict[str, Any]]:
        return [known[key] for key in order if key in known]

    def run(job: Job) -> None:
        if args.minutes and time.monotonic() - start > 60 * args.minutes:
            return
        row = attempt(job)
        became = next((f"{why}: {row[why]}" for why in ("failed", "refused") if why in row), "passed")
        with lock:
            known[job.key] = row
            write_whole(data, json.dumps(rows(), indent=1) + "\n")
            done = sum(j.key in known for j in wanted)
            to_stderr(f"[{done}/{len(wanted)}] {job.key}: {became}")

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(run, todo))
    command = " ".join(["python -m export.matrix", *sys.argv[1:]]) if sys.argv[1:] else "make matrix"
    write_whole(text, page(rows(), command, sum(key not in known for key in order)))
    failed = sum("failed" in row for row in rows())
    to_stderr(f"{text}: {len(known)} jobs, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
