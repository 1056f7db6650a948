"""Make what is missing, run everyone in turn, write docs/benchmarks/peers.{json,md,svg}.

python -m peers [--work build/peers] [--out docs/benchmarks] [--rounds 5] [--only NAME...]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.machine import described
from peers.contenders import ARTEFACTS, CONTENDERS, Contender
from peers.goals import Goal, judged
from peers.load import THREADS
from peers.make import Made, Workshop
from peers.page import page
from peers.picture import picture
from peers.process import Failed, Process
from peers.rounds import ROUNDS, Result, alternate
from peers.rows import accuracy, row

#: distributions whose versions stand beside the numbers
PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-genai",
    "executorch",
    "torchao",
    "llama-cpp-python",
    "gguf",
    "transformers",
    "numpy",
)


def to_stderr(start: float) -> Callable[[str], None]:
    """Progress with the minutes that have passed."""

    def say(line: str) -> None:
        seconds = time.monotonic() - start
        sys.stderr.write(f"[{int(seconds // 60):2}:{int(seconds % 60):02}] {line}\n")
        sys.stderr.flush()

    return say


def made(workshop: Workshop, names: Sequence[str]) -> dict[str, Made | str]:
    """Artefacts, or why there is none."""
    found: dict[str, Made | str] = {}
    for name in names:
        try:
            found[name] = workshop.make(name)
        except Failed as failed:
            found[name] = f"{name}: {failed}"
            workshop.progress(f"{name}: failed: {failed}")
    return found


def start(contender: Contender, artefacts: Mapping[str, Made | str], workshop: Workshop) -> Process | None:
    """The running worker, None where there is none. Raises `Failed`, too where an artefact is missing."""
    for found in artefacts.values():
        if isinstance(found, str):
            raise Failed(found)
    if contender.worker is None:
        return None
    workshop.progress(f"{contender.name}: loading")
    directories = [str(workshop.place(name)) for name in contender.artefacts]
    log = workshop.directory / f"worker-{slug(contender)}.log"
    return Process(["peers.worker", contender.worker, *directories], log)


def slug(contender: Contender) -> str:
    """A name that files can have."""
    return "".join(letter if letter.isalnum() else "-" for letter in contender.name)


def compete(
    chosen: Sequence[Contender], artefacts: Mapping[str, dict[str, Made | str]], workshop: Workshop, rounds: int
) -> dict[str, Result]:
    """Start everyone, measure everyone; a result a contender, by slug, and its outputs below the work's directory."""
    outputs = workshop.place("outputs")
    shutil.rmtree(outputs, ignore_errors=True)
    outputs.mkdir()
    running: dict[str, Process] = {}
    others: dict[str, Result] = {}
    try:
        for contender in chosen:
            try:
                process = start(contender, artefacts[contender.name], workshop)
            except Failed as why:
                others[slug(contender)] = Result(why=str(why))
                continue
            if process is None:
                others[slug(contender)] = Result()
            else:
                running[slug(contender)] = process
        return {**alternate(running, rounds, outputs, workshop.progress), **others}
    finally:
        for process in running.values():
            process.kill()


def bench(workshop: Workshop, chosen: Sequence[Contender], rounds: int) -> dict[str, Any]:
    """The JSON document of one run."""
    loads = {"before making": os.getloadavg()[0]}
    reference = made(workshop, ["reference"])["reference"]
    artefacts = {contender.name: made(workshop, contender.artefacts) for contender in chosen}
    loads["before running"] = os.getloadavg()[0]
    results = compete(chosen, artefacts, workshop, rounds)
    loads["after running"] = os.getloadavg()[0]
    exact = workshop.place("reference") if isinstance(reference, Made) else None
    rows = [
        row(
            contender,
            results[slug(contender)],
            artefacts[contender.name],
            accuracy(slug(contender), workshop.place("outputs"), exact),
        )
        for contender in chosen
    ]
    return {
        "schema": 1,
        "machine": described(PACKAGES),
        "load_average": {when: round(value, 2) for when, value in loads.items()},
        "rounds": rounds,
        "rows": rows,
        "goals": [goal.__dict__ for goal in judged(rows)],
    }


def write(document: dict[str, Any], out: Path) -> None:
    """The document, its page and its picture."""
    out.mkdir(parents=True, exist_ok=True)
    title = f"MobileVLM-1.7B's shape, {THREADS} threads, {document['machine']['processor']['name']}"
    (out / "peers.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "peers.md").write_text(page(document, [Goal(**goal) for goal in document["goals"]]))
    (out / "peers.svg").write_text(picture(document["rows"], title))


def main() -> None:
    """The command line."""
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="artefacts and logs")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"values of each median, at least {ROUNDS}")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help=f"of {names}")
    options = parser.parse_args()
    if options.rounds < ROUNDS:
        parser.error(f"--rounds {options.rounds}: a median is of at least {ROUNDS}")
    os.environ["HF_HUB_OFFLINE"] = "1"  # no tool is to look for anything elsewhere
    say = to_stderr(time.monotonic())
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [contender for contender in CONTENDERS if contender.name in options.only]
    write(bench(Workshop(ARTEFACTS, options.work.resolve(), say), chosen, options.rounds), options.out)
    say(f"{options.out}/peers.json, peers.md, peers.svg")


if __name__ == "__main__":
    main()
