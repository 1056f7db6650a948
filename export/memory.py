"""What this process holds in memory: its peak, and what it can give back."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: a process of this size is worth the third of a second that collecting takes
LARGE_BYTES = 512 << 20

#: glibc's numbers for how much free heap it keeps, and for the size from which on each block is a mapping of its own
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

#: the heap that an export keeps, and the sizes from which on blocks go back to the system: in exports, and where large
#: ones are to be returned
KEPT_BYTES, LARGE_BLOCK_BYTES, BLOCK_BYTES = 64 << 20, 32 << 20, 256 << 10


def resident_bytes() -> int:
    """What is resident now where the system tells (Linux), else the peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_rss_bytes()
    return pages * resource.getpagesize()


@contextmanager
def rare_collections() -> Iterator[None]:
    """While this lasts, cyclic garbage is looked for a fiftieth as often: graphs are many objects that stay.

    Of an export to ExecuTorch an eighth of the time went into some 7 500 such searches.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 50)
    gc.freeze()  # what the libraries are made of is never garbage: it is not looked through
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def trim() -> None:
    """Give freed heap back to the system where the C library can (glibc): it keeps tens of large buffers otherwise."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def keep_temporaries() -> None:
    """From now on blocks of less than `LARGE_BLOCK_BYTES` come from a heap that keeps `KEPT_BYTES` of free ones.

    Else the C library gives the temporaries of each few rows of a weight back, to have the system make and clear the
    same pages for the next: two seconds of an export of MobileVLM-1.7B.
    """
    tell(M_TRIM_THRESHOLD, KEPT_BYTES)
    tell(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


@contextmanager
def large_blocks_returned() -> Iterator[None]:
    """While this lasts a block of `BLOCK_BYTES` goes back to the system when it is freed.

    Else the C library keeps freed blocks for the next one: hundreds of MB where engines are built.
    """
    tell(M_MMAP_THRESHOLD, BLOCK_BYTES)
    try:
        yield
    finally:
        tell(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def tell(option: int, size: int) -> None:
    """Set an option of the C library's heap where it has such (glibc)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, size)


def reclaim() -> None:
    """In a large process, free graphs and what they hold, which are cycles, and give that back."""
    if resident_bytes() > LARGE_BYTES:
        gc.collect()
        trim()


def reset_peak() -> None:
    """Begin a new peak where the system can (Linux); elsewhere peaks are those of the process so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Peak resident size of this process since `reset_peak`, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def mebibytes(count: int) -> str:
    """A size in a table."""
    return f"{count / 2**20:,.0f}".replace(",", " ")
