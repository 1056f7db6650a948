"""Writing a bundle: staged beside its final place, synced, then renamed, so that it appears whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from graphs.errors import UserError
from graphs.files import readable, reason, sha256
from runtimes.manifest import MANIFEST


def check_destination(out: Path, force: bool) -> None:
    """Raise UserError where `out` may not be written: it exists without `force`, or is no bundle, or a file."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is not a directory: choose another --out")
    if out.exists() and not force:
        raise UserError(f"{out} exists: choose another --out, or give --force (FORCE=1 with make) to replace it")
    if out.exists() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is no bundle, so even --force leaves it alone: choose another --out")


#: staging directories that this process fills
OURS: set[Path] = set()


def staging_name(out: Path, kind: str) -> Path:
    """A hidden sibling of `out` that belongs to this process alone."""
    return out.with_name(f".{out.name}.{kind}.{token_hex(4)}.{os.getpid()}")


def alive(staging: Path) -> bool:
    """Whether the process that a staging directory belongs to still fills it."""
    pid = staging.suffix[1:]
    if pid == str(os.getpid()):
        return staging in OURS
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def left_behind(out: Path) -> list[Path]:
    """The staging directories that interrupted exports to `out` left, the newest first."""
    found = [path for path in out.parent.glob(f".{glob.escape(out.name)}.partial.*") if not alive(path)]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def sweep(out: Path, kept: Callable[[Path], bool] = lambda directory: False) -> None:
    """Remove what a killed export to `out` left, but what is to be `kept`; a bundle that it moved aside comes back."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.replaced.*"):
        if not alive(left):
            if out.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(out)
    for left in left_behind(out):
        if not kept(left):
            shutil.rmtree(left, ignore_errors=True)


def make_parents(directory: Path) -> list[Path]:
    """Create `directory` with its parents; those that were made, innermost first. Raises UserError."""
    missing = []
    for path in (directory, *directory.parents):
        if path.exists():
            break
        missing.append(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {reason(error)}; choose another --out") from error
    return missing


@contextmanager
def staged(out: Path, force: bool = False, kept: Callable[[Path], bool] = lambda directory: False) -> Iterator[Path]:
    """A directory to fill; on a clean exit it becomes `out`, on an exception it is removed with all made for it.

    An interrupted one stays where it is worth being `kept`, like one whose process was killed, and so do those that are
    found there, until one export to `out` comes to an end.
    """
    check_destination(out, force)
    made = make_parents(out.parent)
    sweep(out, kept)
    staging = staging_name(out, "partial")
    OURS.add(staging)
    try:
        try:
            staging.mkdir()
        except OSError as error:
            raise UserError(f"cannot write to {out.parent}: {reason(error)}; choose another --out") from error
        yield staging
        publish(staging, out, force)
        sweep(out)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and kept(staging):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        sweep(out)
        for path in made:
            try:
                path.rmdir()
            except OSError:
                break
        raise
    finally:
        OURS.discard(staging)


def sync(directory: Path) -> None:
    """Force every file and folder below `directory`, and itself, to disk."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(staging: Path, out: Path, force: bool) -> None:
    """Rename `staging` to `out`, in one step where `out` is new. Raises UserError where another process was faster."""
    sync(staging)
    check_destination(out, force)
    aside = staging_name(out, "replaced")
    if out.exists():
        out.rename(aside)
    try:
        staging.rename(out)
    except OSError as error:
        raise UserError(f"{out} appeared while this export ran: {reason(error)}") from error
    shutil.rmtree(aside, ignore_errors=True)


def names(directory: Path) -> set[str]:
    """Every file below a directory, by its name relative to that."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def file_records(directory: Path, files: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Size and sha256 of files of a directory, by relative name."""
    found = {name: directory / name for name in sorted(files)}
    return {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in found.items()}


def write_manifest(directory: Path, manifest: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the record of all files present, of which some are `known`, and write the manifest, last of all files."""
    files = {**known, **file_records(directory, names(directory) - known.keys())}
    complete = {**manifest, "files": dict(sorted(files.items()))}
    (directory / MANIFEST).write_text(readable(complete) + "\n")
