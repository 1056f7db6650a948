"""Workers asked, kept still, and failing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from peers.process import Failed, Process


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    started = worker(tmp_path, "counts")
    yield started
    started.kill()


def worker(tmp_path: Path, word: str) -> Process:
    return Process(["peers.worker", "tests.peers.contender", str(tmp_path / word)], tmp_path / f"{word}.log")


def stopped(process: Process) -> bool:
    """Whether it is, or comes to be in a while: a signal takes its time on a busy machine."""
    for _ in range(200):
        if Path(f"/proc/{process.child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.05)
    return False


def test_answers_are_apart_from_what_libraries_print(process: Process, tmp_path: Path) -> None:
    assert process.hello["version"] == "counter 1"
    assert process.hello["measures"] == ["prefill", "vision"]
    first = process.ask(do="prefill", save=str(tmp_path / "out.npy"))
    assert first["finite"]
    assert 0 <= first["seconds"] < 1
    assert np.load(tmp_path / "out.npy").tolist() == [1, 1, 1]
    assert process.ask(do="vision", save=None)["seconds"] >= 0.05
    said = (tmp_path / "counts.log").read_text()
    assert "a library talks" in said
    assert "past Python" in said


def test_a_worker_is_stopped_between_questions(process: Process) -> None:
    assert stopped(process)
    process.ask(do="vision", save=None)
    assert stopped(process)


def test_the_end_tells_peak_memory(process: Process) -> None:
    peak = process.end()["peak_rss_bytes"]
    assert 10 << 20 < peak < 1 << 30
    assert process.child.poll() is not None


def test_the_last_word_of_a_dead_worker_is_the_reason(tmp_path: Path) -> None:
    process = worker(tmp_path, "dies")
    for _ in range(2):
        process.ask(do="prefill", save=None)
    with pytest.raises(Failed, match="status 1: died of old age"):
        process.ask(do="prefill", save=None)


def test_a_worker_that_cannot_load_says_why(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="no such thing"):
        worker(tmp_path, "unloadable")
