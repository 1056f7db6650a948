"""Errors that a user can mend: one line that names the cause and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user asked or supplied. The command line prints it as one line and exits with status 2."""


class GateError(Exception):
    """A check that failed on what vlmx itself made. The command line prints it and exits with status 1."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice that looks most like `word`, as the tail of an error message; all choices where none is close."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(names)}"
