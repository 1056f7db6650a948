"""Small readers of files that nobody vouches for: bounded, confined to their directory, every fault one line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from graphs.errors import UserError

MAX_JSON_BYTES = 64 << 20


def shown(text: object, limit: int = 120) -> str:
    """An untrusted string made fit for a one-line message: control characters escaped, long ones cut."""
    word = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return word if len(word) <= limit else word[:limit] + "..."


def reason(error: BaseException) -> str:
    """What an exception says, in one line: the system's words for an OSError, else the first line of its text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return shown(lines[0] if lines else type(error).__name__, 200)


def listing(directory: Path, limit: int = 8) -> str:
    """The names in a directory, sorted, the first `limit` of them, for a message about what is missing there."""
    names = sorted(shown(p.name, 60) for p in directory.iterdir() if not p.name.startswith("."))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "nothing"


def contained(directory: Path, name: str) -> Path:
    """The regular file `name` of `directory`, refused where it is missing or its real place is elsewhere.

    Links may leave the directory in one case, the Hugging Face cache: `models--org--name/snapshots/REVISION/` holds
    links into `models--org--name/blobs/`, whose entries may link on into `blobs/` beside all repositories.

    Raises: UserError.
    """
    if not name or name in {".", ".."} or Path(name).name != name or "\\" in name or not name.isprintable():
        raise UserError(f"{directory}: '{shown(name)}' points outside the directory; only plain file names are allowed")
    base, path = directory.resolve(), directory / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        if path.is_symlink():
            raise UserError(f"{path}: a broken link to {shown(os.readlink(path))}") from error
        raise UserError(f"{path}: no such file; {directory} holds {listing(directory)}") from error
    homes = [base]
    if base.parent.name == "snapshots":
        homes += [base.parent.parent / "blobs", base.parent.parent.parent / "blobs"]
    if not any(real.is_relative_to(home) for home in homes):
        raise UserError(f"{path}: a link that points outside its directory, to {shown(real)}")
    if not real.is_file():
        raise UserError(f"{path}: not a regular file")
    return path


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises: UserError where it cannot be read, is larger than `max_bytes`, is not JSON or is not an object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UserError(f"{path}: {size} bytes, more than the {max_bytes} that a JSON file may have")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {reason(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON {type(value).__name__}, not an object")
    return value


def read_optional_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in `directory/name`, or an empty one where there is no such file."""
    if not (directory / name).exists() and not (directory / name).is_symlink():
        return {}
    return read_json(contained(directory, name))


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def readable(value: Any, width: int = 120, indent: str = "") -> str:
    """JSON for people: an object or array that fits into a line of `width` is one, others have a line an entry.

    Raises: ValueError for a number that is not finite, TypeError for what JSON does not have.
    """
    line = json.dumps(value, allow_nan=False)
    if len(line) + len(indent) <= width or not isinstance(value, dict | list | tuple):
        return line
    inner = f"{indent} "
    if isinstance(value, dict):
        rows = [f"{json.dumps(str(key))}: {readable(entry, width, inner)}" for key, entry in value.items()]
        opening, closing = "{}"
    else:
        rows = [readable(entry, width, inner) for entry in value]
        opening, closing = "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(rows) + f"\n{indent}{closing}"


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all, in place of any that was there."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(text)
    draft.replace(path)
