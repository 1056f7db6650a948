"""What a run ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: what kernels choose by
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "sve")


def processor() -> dict[str, Any]:
    """Its name, cores and the features that matter, as far as the system tells (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = [line.partition(":") for line in text.splitlines()]
    first: dict[str, str] = {}
    for key, _, text in lines:
        first.setdefault(key.strip(), text.strip())
    flags = (first.get("flags") or first.get("Features") or "").split()
    return {
        "name": first.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": [feature for feature in FEATURES if feature in flags],
    }


def packages(names: Iterable[str]) -> dict[str, str | None]:
    """Versions; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in names:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The revision of this project, where it is in a repository."""
    asked = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def described(names: Iterable[str]) -> dict[str, Any]:
    """For a JSON document: the machine, and the versions of some packages."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages(names),
        "commit": commit(),
    }
