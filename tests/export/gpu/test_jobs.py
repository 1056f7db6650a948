"""What the GPU's benchmark plans, and how it runs commands: time limits, last words, nothing left behind."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from export.gpu import jobs
from export.gpu.jobs import LARGE, SMALL, Budget, Engine, Size
from export.targets.tensorrt import TARGET
from quant.recipe import KEEP, recipe


def test_every_recipe_is_one_that_the_target_takes() -> None:
    for name in jobs.RECIPES.values():
        for rule in recipe(name).layers:
            kinds = [rule.kind] if rule.kind else ["linear"]
            for kind in kinds if "embedding" not in rule.match else ["embedding"]:
                assert any(text == KEEP or text in TARGET.capabilities.schemes[kind] for text in rule.schemes), rule


def test_what_is_exported() -> None:
    large, small = jobs.sizes(Path("scratch"), None)
    assert (large.name, small.name) == (LARGE, SMALL)
    assert large.make[1:3] == ("-m", "zoo.random_checkpoint")
    given, _ = jobs.sizes(Path("scratch"), "my/checkpoint")
    assert (given.name, given.checkpoint, given.make) == ("checkpoint", "my/checkpoint", ())
    assert [e.numbers for e in jobs.engines(large, ["tensorrt-rtx"])] == ["fp16", "int8", "int4", "fp8"]
    found = list(jobs.engines(small, ["tensorrt-rtx", "tensorrt"]))
    assert [(e.numbers, e.builder, e.hidden) for e in found[4:]] == [
        ("fp16", "tensorrt", False),
        ("fp16", "tensorrt-rtx", True),
    ]
    assert len({e.key for e in found}) == len(found)


def test_static_ranges_are_read_once() -> None:
    size, scratch = Size(SMALL, f"zoo:{SMALL}"), Path("scratch")
    ranges = str(jobs.statistics(size, scratch))
    assert ranges in jobs.calibrate(size, scratch)
    commands = {numbers: Engine(size, numbers).command(scratch) for numbers in jobs.RECIPES}
    assert [numbers for numbers, command in commands.items() if ranges in command] == ["int8", "fp8"]


def test_a_command_that_ends_well(tmp_path: Path) -> None:
    ran = jobs.run([sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"], 60, tmp_path / "log", 3)
    assert ran.why is None
    assert (tmp_path / "log").read_text() == "3\n"
    hides = [sys.executable, "-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"]
    jobs.run(hides, 60, tmp_path / "hidden", 3, hidden=True)
    assert (tmp_path / "hidden").read_text() == "''\n"


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    ran = jobs.run([sys.executable, "-c", "print('first'); raise SystemExit('because')"], 60, tmp_path / "log", 1)
    assert ran.why == "because"
    assert jobs.run([sys.executable, "-c", "raise SystemExit(4)"], 60, tmp_path / "silent", 1).why == "exit status 4"


def test_a_command_beyond_its_time_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = "import time; time.sleep(60)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"open({str(pid)!r}, 'w').write(str(p.pid)); print('halfway', flush=True); p.wait()"
    )
    start = time.monotonic()
    ran = jobs.run([sys.executable, "-c", parent], 3, tmp_path / "log", 1)
    assert time.monotonic() - start < 30
    assert ran.why == "stopped after 3 s; last: halfway"
    deadline = time.monotonic() + 10
    while alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(pid.read_text()))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be noticed does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_no_time_left_starts_nothing(tmp_path: Path) -> None:
    ran = jobs.run([sys.executable, "-c", "print('ran')"], 0.5, tmp_path / "log", 1)
    assert ran == jobs.Ran(0.0, "not run: no time was left")
    assert not (tmp_path / "log").exists()


def test_shares_of_the_time() -> None:
    budget = Budget(100, start=time.monotonic() - 30)
    assert budget.left == pytest.approx(70, abs=1)
    assert budget.until(0.6) == pytest.approx(30, abs=1)
    assert budget.until(0.2) == 0
    assert Budget(1, start=time.monotonic() - 30).left == 0


def test_as_many_exports_at_a_time_as_cores_and_memory_allow() -> None:
    assert jobs.at_a_time(16, 128 << 30) == 4
    assert jobs.at_a_time(16, 32 << 30) == 2
    assert jobs.at_a_time(2, 8 << 30) == 1
    assert jobs.memory_bytes() > 1 << 30
