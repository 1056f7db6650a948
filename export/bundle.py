"""Writing a bundle: staged beside its final place, synced, then renamed, so that it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
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


def staging_name(out: Path, kind: str, pid: int | str) -> Path:
    """A hidden sibling of `out` that belongs to one process."""
    return out.with_name(f".{out.name}.{kind}.{pid}")


def alive(pid: str) -> bool:
    """Whether a process of that number runs."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def sweep(out: Path) -> None:
    """Remove what a killed export to `out` left beside it; a bundle that it had moved aside comes back."""
    for left in out.parent.glob(f".{out.name}.replaced.*"):
        if not alive(left.suffix[1:]):
            if out.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(out)
    for left in out.parent.glob(f".{out.name}.partial.*"):
        if not alive(left.suffix[1:]):
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
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """A directory to fill; on a clean exit it becomes `out`, on any exception it is removed with all made for it."""
    check_destination(out, force)
    made = make_parents(out.parent)
    sweep(out)
    staging = staging_name(out, "partial", os.getpid())
    try:
        try:
            staging.mkdir()
        except OSError as error:
            raise UserError(f"cannot write to {out.parent}: {reason(error)}; choose another --out") from error
        yield staging
        publish(staging, out, force)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for path in made:
            try:
                path.rmdir()
            except OSError:
                break
        raise


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
    aside = staging_name(out, "replaced", os.getpid())
    if out.exists():
        out.rename(aside)
    try:
        staging.rename(out)
    except OSError as error:
        raise UserError(f"{out} appeared while this export ran: {reason(error)}") from error
    shutil.rmtree(aside, ignore_errors=True)


def file_records(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below `directory`, by relative name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }


def write_manifest(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Add the record of all files present and write the manifest, last of all files."""
    complete = {**manifest, "files": file_records(directory)}
    (directory / MANIFEST).write_text(readable(complete) + "\n")
