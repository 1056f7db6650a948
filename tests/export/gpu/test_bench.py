"""`make bench-gpu` on a machine without a GPU: it refuses; and its parts, with everything real but the GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from export.gpu import bench, jobs
from export.gpu.jobs import SMALL, Budget, Size
from export.stages import silent
from runtimes import cuda

MACHINE: dict[str, Any] = {
    "name": "a GPU",
    "compute_capability": "9.0",
    "memory_bytes": 8 << 30,
    "cuda": "13.0",
    "driver": "580.1",
    "cores": 2,
    "system": "Linux",
    "python": "3.11",
    "packages": {"torch": "2.13.0", "tensorrt-cu13": None},
}


def run_of(tmp_path: Path, seconds: float) -> bench.Run:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return bench.Run(scratch, Budget(seconds), bench.Results(tmp_path / "out", MACHINE), silent, sys.executable, 4)


def test_without_a_gpu_one_line_and_nothing_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so")
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(tmp_path / "benchmarks")])
    assert bench.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "bench-gpu: no NVIDIA GPU here; nothing was run or written\n"
    assert list(tmp_path.iterdir()) == []


def test_what_fails_is_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so")
    monkeypatch.setattr(jobs, "RECIPES", {"fp16": "reference-fp16", "int9": "no-such-recipe"})
    monkeypatch.setattr(jobs, "SAMPLES", 1)
    nowhere = Size("nowhere", "nowhere", (sys.executable, "-c", "raise SystemExit('disk full')"))
    run = run_of(tmp_path, 500)
    run.everything([nowhere, Size("nano", f"zoo:{SMALL}")], ["tensorrt-rtx"])
    table = json.loads((tmp_path / "out" / "gpu.json").read_text())
    rows = {(row["size"], row["numbers"], row.get("built", row["by"])): row for row in table["rows"]}
    here = "on this machine"
    assert set(rows) == {
        ("nowhere", "fp16", here),
        ("nowhere", "int9", here),
        ("nano", "fp16", here),
        ("nano", "int9", here),
        ("nano", "fp16", "torch"),
    }
    assert rows["nowhere", "fp16", here]["failed"] == "no checkpoint: disk full"
    assert "unknown recipe 'no-such-recipe'" in rows["nano", "int9", here]["failed"]
    built = rows["nano", "fp16", here]  # really exported and built, but not run here
    assert built["file_bytes"] > 1_000_000
    assert "no NVIDIA GPU here" in built["failed"]
    assert "is a CPU build" in rows["nano", "fp16", "torch"]["failed"]
    told = (tmp_path / "out" / "gpu.md").read_text()
    assert "no checkpoint: disk full" in told
    assert "no NVIDIA GPU here" in told


def test_no_time_left_is_said_of_every_row(tmp_path: Path) -> None:
    run = run_of(tmp_path, 0)
    run.everything([Size(SMALL, f"zoo:{SMALL}")], ["tensorrt-rtx"])
    assert len(run.results.rows) == 6
    assert all("no time was left" in row["failed"] for row in run.results.rows)
