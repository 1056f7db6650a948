"""Artefacts, each made once by a process of its own, timed, and kept while what it was made from is unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peers.process import Failed, last_line, peak_rss_bytes

RECORD = "made.json"

#: of one artefact, in seconds
PATIENCE = 1500.0


@dataclass(frozen=True)
class Artefact:
    """Made by `python -m ARGUMENTS`, where OUT stands for its directory, and a name in braces for another artefact's.

    `sources`: files and directories whose content it depends on. `packages`: distributions whose version it does.
    """

    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    @property
    def module(self) -> Path:
        return Path(self.arguments[0].replace(".", "/") + ".py")


@dataclass(frozen=True)
class Made:
    """What making it took; the sizes of its files."""

    digest: str
    seconds: float
    peak_rss_bytes: int
    bytes: int
    reused: bool = False


def installed(package: str) -> str:
    """The version of a distribution; Failed where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        raise Failed(f"{package} is not installed: see the output of `make bench-peers`") from None


def python_files(sources: Iterable[Path]) -> list[Path]:
    """The files themselves, and those of Python below directories."""
    return [file for source in sources for file in ([source] if source.is_file() else sorted(source.rglob("*.py")))]


def digest(artefact: Artefact, needs: Mapping[str, Made]) -> str:
    """Of all that the artefact is made from."""
    files = python_files([artefact.module, *map(Path, artefact.sources)])
    parts = {
        "arguments": artefact.arguments,
        "needs": {name: needs[name].digest for name in artefact.needs},
        "packages": {package: installed(package) for package in artefact.packages},
        "sources": {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def run(arguments: list[str], log: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of `python -m ARGUMENTS`. Raises `Failed`.

    The peak is looked at as it runs, too: an export sets the system's record of it back at each of its stages.
    """
    start, peak = time.monotonic(), 0
    with log.open("wb") as output:
        child = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output, stderr=output)
    while True:
        done, status, usage = os.wait4(child.pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - start > PATIENCE:
            child.kill()
            os.wait4(child.pid, 0)
            child.returncode = -9
            raise Failed(f"not made within {PATIENCE:.0f} s")
        peak = max(peak, peak_rss_bytes(child.pid))
        time.sleep(0.05)
    child.returncode = os.waitstatus_to_exitcode(status)  # waited for: Popen must not do so again
    if child.returncode:
        raise Failed(f"making it ended with status {child.returncode}: {last_line(log)}")
    return time.monotonic() - start, max(peak, usage.ru_maxrss * 1024)


def size(directory: Path) -> int:
    """Bytes of an artefact's files."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file() and file.name != RECORD)


class Workshop:
    """Makes artefacts of a table below a directory, in the order of their needs."""

    def __init__(self, table: Mapping[str, Artefact], directory: Path, progress: Callable[[str], None]) -> None:
        self.table, self.directory, self.progress = table, directory, progress
        self.made: dict[str, Made] = {}
        self.failed: dict[str, str] = {}

    def place(self, name: str) -> Path:
        return self.directory / name

    def make(self, name: str) -> Made:
        """The artefact, made or found. Raises `Failed`, at once where it or one of its needs has failed before."""
        if name in self.failed:
            raise Failed(self.failed[name])
        try:
            if name not in self.made:
                for need in self.table[name].needs:
                    self.make(need)
                self.made[name] = self.make_one(name)
        except Failed as failed:
            self.failed[name] = str(failed)
            raise
        return self.made[name]

    def make_one(self, name: str) -> Made:
        artefact, place = self.table[name], self.place(name)
        wanted = digest(artefact, self.made)
        if (place / RECORD).is_file():
            record: dict[str, Any] = json.loads((place / RECORD).read_text())
            if record["digest"] == wanted:
                self.progress(f"{name}: unchanged, reused")
                return Made(**{**record, "reused": True})
        self.progress(f"{name}: making it")
        part = place.with_name(f"{name}.part")
        for stale in (part, place):
            shutil.rmtree(stale, ignore_errors=True)
        part.mkdir(parents=True)
        names = {"OUT": str(part), **{need: str(self.place(need)) for need in self.table}}
        arguments = [argument.format(**names) for argument in artefact.arguments]
        seconds, peak = run(arguments, self.directory / f"{name}.log")
        made = Made(wanted, round(seconds, 2), peak, size(part))
        (part / RECORD).write_text(json.dumps(made.__dict__) + "\n")
        part.rename(place)
        self.progress(f"{name}: {seconds:.1f} s, peak memory {peak / 2**20:.0f} MiB, {made.bytes / 2**20:.0f} MiB")
        return made
