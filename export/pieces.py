"""What an export has finished, for the next one to go on with: after an interruption, or where inputs are the same.

A piece is a group of a directory's files under a key that tells what it was made of. While an export runs, finished
pieces are recorded in its staging directory, which a killed or interrupted export leaves; a bundle's manifest records
those that it was put together from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from export.bundle import file_records, names
from graphs.errors import UserError
from graphs.files import read_json, sha256, write_whole
from runtimes.manifest import MANIFEST, Bundle, inside

#: in a staging directory: the pieces finished so far
FINISHED = ".pieces.json"

#: bundles beside the new one that are looked into, the newest first
BESIDE = 64

Record = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """`files`: by relative name, what the manifest records of them. `record`: what was said of them, in JSON values."""

    key: str
    files: Mapping[str, Mapping[str, Any]]
    record: Record

    @classmethod
    def read(cls, directory: Path, key: str, files: Mapping[str, Any], record: Mapping[str, Any]) -> Piece:
        """Of a directory that nobody vouches for. Raises UserError, KeyError, TypeError or ValueError for a bad one."""
        for name, recorded in files.items():
            inside(directory, name)
            int(recorded["bytes"]), str(recorded["sha256"])
        return cls(str(key), dict(files), dict(record))

    def is_in(self, directory: Path) -> bool:
        """Whether its files are there, byte for byte."""
        return all(
            (path := inside(directory, name)).is_file()
            and path.stat().st_size == recorded["bytes"]
            and sha256(path) == recorded["sha256"]
            for name, recorded in self.files.items()
        )


def finished(directory: Path) -> list[Piece]:
    """The pieces that are recorded in a staging directory; none where its record is damaged."""
    try:
        rows = read_json(directory / FINISHED)["pieces"]
        return [Piece.read(directory, row["key"], row["files"], row["record"]) for row in rows]
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return []


def of_bundle(directory: Path) -> list[Piece]:
    """The pieces that a bundle was put together from; none where it has no good record of them."""
    try:
        manifest = Bundle.open(directory).manifest
        files, details = manifest["files"], manifest["details"]["methods"]
        return [
            Piece.read(directory, key, {n: files[n] for n in row["files"]}, {m: details[m] for m in row["methods"]})
            for key, row in manifest.get("pieces", {}).items()
        ]
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return []


def begun(directory: Path) -> bool:
    """Whether a staging directory holds anything to go on with."""
    return (directory / FINISHED).is_file()


@dataclass(frozen=True)
class Found:
    """A piece of an earlier export, in `place`; `left`: which was interrupted, so that its files may be taken away."""

    place: Path
    piece: Piece
    left: bool

    def bring(self, directory: Path) -> bool:
        """Put its files into a directory; whether they are what they were when they were recorded."""
        try:
            for name in self.piece.files:
                goal = inside(directory, name)
                goal.parent.mkdir(parents=True, exist_ok=True)
                (shutil.move if self.left else shutil.copyfile)(inside(self.place, name), goal)
        except OSError:
            return False
        return self.piece.is_in(directory)

    def __str__(self) -> str:
        return "finished before an export was interrupted" if self.left else f"made of the same inputs in {self.place}"


class Pieces:
    """Makes or finds the pieces of the export that fills `directory`.

    Interrupted exports left the directories `left`; `bundles` are looked into besides. Files are hashed by a thread,
    beside what is made next: a piece is finished when it is recorded. A context manager: at its end the thread stops.
    """

    def __init__(
        self, directory: Path, left: Iterable[Path], bundles: Iterable[Path], say: Callable[[str], None]
    ) -> None:
        self.directory, self.say = directory, say
        places = [(place, piece, True) for place in left for piece in finished(place)]
        places += [(place, piece, False) for place in bundles for piece in of_bundle(place)]
        self.earlier = {piece.key: Found(place, piece, left) for place, piece, left in reversed(places)}
        self.done: dict[str, Piece] = {}
        self.pool = ThreadPoolExecutor(1, "pieces")
        self.pending: list[Future[None]] = []

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.shutdown()

    def __call__(self, what: str, key: Callable[[], str], make: Callable[[], Record]) -> Record:
        """The record of a piece called `what`, whose files are in the directory afterwards."""
        found = self.earlier.get(key()) if self.earlier else None
        if found and found.bring(self.directory):
            self.say(f"{what}: {found}")
            self.later(lambda: found.piece)
            return found.piece.record
        if found:
            for name in found.piece.files:
                inside(self.directory, name).unlink(missing_ok=True)
        before = names(self.directory)
        record: Record = json.loads(json.dumps(make()))
        made = {name for name in names(self.directory) - before if not name.startswith(FINISHED)}
        called = key()
        self.later(lambda: Piece(called, file_records(self.directory, made), record))
        return record

    def later(self, described: Callable[[], Piece]) -> None:
        """Have the thread describe a piece and record it as finished, behind what it was given before."""
        self.pending.append(self.pool.submit(self.keep, described))

    def keep(self, described: Callable[[], Piece]) -> None:
        """Record a piece as finished."""
        piece = described()
        self.done[piece.key] = piece
        rows = [asdict(piece) for piece in self.done.values()]
        write_whole(self.directory / FINISHED, json.dumps({"pieces": rows}))

    def finish(self) -> None:
        """The directory's record goes, and what is of no use in a bundle: pieces of hidden files."""
        for future in self.pending:
            future.result()
        (self.directory / FINISHED).unlink(missing_ok=True)
        for key, piece in list(self.done.items()):
            if any(name.startswith(".") for name in piece.files):
                del self.done[key]
                for name in piece.files:
                    (self.directory / name).unlink()

    def to_json(self) -> dict[str, dict[str, list[str]]]:
        """What the manifest keeps of the pieces."""
        return {key: {"methods": list(piece.record), "files": list(piece.files)} for key, piece in self.done.items()}

    def known(self) -> dict[str, Mapping[str, Any]]:
        """What is recorded of the directory's files already."""
        return {name: recorded for piece in self.done.values() for name, recorded in piece.files.items()}


def bundles_beside(out: Path) -> list[Path]:
    """The bundle that is at `out`, and those beside it, the newest first."""
    manifests = sorted(out.parent.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = [path.parent for path in manifests if path.parent != out][:BESIDE]
    return [out, *found] if (out / MANIFEST).is_file() else found


def recorded_origin(out: Path) -> Mapping[str, str]:
    """What the bundle at `out` says that it was made of; nothing where there is none, or no record."""
    try:
        found = read_json(out / MANIFEST).get("made_of")
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def whole(out: Path) -> bool:
    """Whether there is a bundle at `out` with all of its files as they were made."""
    try:
        return Bundle.open(out).check_files() > 0
    except (UserError, KeyError, TypeError, AttributeError):
        return False
