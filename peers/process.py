"""The other end of `peers.worker`: starts a contender, asks it, and keeps it still while others are measured."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peers.load import THREADS

#: of one answer, in seconds, before a contender counts as stuck
PATIENCE = 300.0


class Failed(Exception):  # noqa: N818 (a finding, not an error)
    """A contender could not be made, loaded or measured; the message says why in one line."""


def peak_rss_bytes(process: int | str) -> int:
    """The highest resident size so far of a process, "self" for this one, where the system tells (Linux); else 0."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def last_line(log: Path) -> str:
    """What a process said last, for the reason of its end."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no word"


class Process:
    """A worker. Between questions it is stopped: threads that spin while they wait would slow the others."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        # Unbuffered: what it prints stands in the log in the order in which it was said
        told = {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS), "PYTHONUNBUFFERED": "1"}
        self.log, self.rest = log, b""
        with log.open("wb") as errors:
            self.child = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **told},
            )
        self.hello = self.answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Raises `Failed`."""
        assert self.child.stdin is not None
        self.child.send_signal(signal.SIGCONT)
        try:
            self.child.stdin.write(json.dumps(request).encode() + b"\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            raise self.failure() from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Read one line, then stop the process. Raises `Failed` where it ends or takes longer than `PATIENCE`."""
        assert self.child.stdout is not None
        until = time.monotonic() + PATIENCE
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.child.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                self.kill()
                raise Failed(f"no answer within {PATIENCE:.0f} s")
            part = os.read(self.child.stdout.fileno(), 1 << 16)
            if not part:
                raise self.failure()
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        with suppress(ProcessLookupError):
            self.child.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def failure(self) -> Failed:
        """Why the process has ended."""
        return Failed(f"ended with status {self.child.wait()}: {last_line(self.log)}")

    def end(self) -> dict[str, Any]:
        """Its last answer, with its peak memory; the process is gone then."""
        try:
            return self.ask(do="end")
        finally:
            self.kill()

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()
