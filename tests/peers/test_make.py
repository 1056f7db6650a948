"""Artefacts made once, kept, made again when what they come from changes."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest

from peers.contenders import ARTEFACTS, CONTENDERS
from peers.make import Artefact, Workshop
from peers.process import Failed

FIRST = Artefact(("tests.peers.maker", "{OUT}", "one"))
SECOND = Artefact(("tests.peers.maker", "{OUT}", "two", "{a-first}"), needs=("a-first",))
BAD = Artefact(("tests.peers.maker", "{OUT}", "fail"))


def workshop(directory: Path, table: dict[str, Artefact]) -> Workshop:
    return Workshop(table, directory, lambda line: None)


def test_needs_come_first_and_memory_is_that_of_the_process(tmp_path: Path) -> None:
    made = workshop(tmp_path, {"a-first": FIRST, "second": SECOND}).make("second")
    assert (tmp_path / "second/file").read_text() == "onetwo"
    assert made.bytes == 6
    # the system counts what the process that starts another one held then
    mine = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 64 << 20 < made.peak_rss_bytes < max(1 << 30, mine + (64 << 20))
    assert 0 < made.seconds < 60
    assert not made.reused


def test_what_is_unchanged_is_reused_with_its_figures(tmp_path: Path) -> None:
    table = {"a-first": FIRST, "second": SECOND}
    before = workshop(tmp_path, table).make("second")
    after = workshop(tmp_path, table).make("second")
    assert after == replace(before, reused=True)
    other = Artefact(("tests.peers.maker", "{OUT}", "uno"))
    again = workshop(tmp_path, {"a-first": other, "second": SECOND}).make("second")
    assert not again.reused
    assert (tmp_path / "second/file").read_text() == "unotwo"


def test_a_source_that_changes_makes_it_again(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("1")
    table = {"a": Artefact(FIRST.arguments, sources=(str(source),))}
    workshop(tmp_path, table).make("a")
    assert workshop(tmp_path, table).make("a").reused
    source.write_text("2")
    assert not workshop(tmp_path, table).make("a").reused


def test_failure_is_told_in_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    shop = workshop(tmp_path, {"bad": BAD, "after": Artefact(FIRST.arguments, needs=("bad",))})
    for name in ("bad", "after"):
        with pytest.raises(Failed, match="status 1: the weights are made of cheese"):
            shop.make(name)
    assert not (tmp_path / "bad").exists()
    with pytest.raises(Failed, match="no-such-package is not installed"):
        workshop(tmp_path, {"x": Artefact(FIRST.arguments, packages=("no-such-package",))}).make("x")


def test_the_table_is_whole() -> None:
    for artefact in ARTEFACTS.values():
        assert set(artefact.needs) <= set(ARTEFACTS)
        for argument in artefact.arguments:
            argument.format(OUT="", **dict.fromkeys(artefact.needs, ""))
        assert all(Path(source).exists() for source in artefact.sources)
    used = [name for contender in CONTENDERS for name in contender.artefacts]
    assert set(used) <= set(ARTEFACTS)
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)
