"""What `make published` measures of an architecture, with its tiny variant in place of a published one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from export import published
from export.published import cells, page, smallest
from graphs import registry


def test_the_smallest_size_is_a_published_one() -> None:
    variant, parameters = smallest("mobilevlm")
    assert variant.name == "mobilevlm-v2-1.7b"
    assert parameters == pytest.approx(1.7e9, rel=0.05)


def test_rows_are_measured_once_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "smallest", lambda model: (registry.variant(model, "tiny"), 10**6))
    arguments = ["published", "--out", str(tmp_path), "--models", "qwen2_vl", "--max-context", "64", "--resume"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert published.main() == 0
    document = json.loads((tmp_path / "published.json").read_text())
    (row,) = document["rows"]
    assert row["seconds"] > 1
    assert 100 << 20 < row["peak_rss_bytes"] < row["estimated_rss_bytes"]
    assert all(lower["executed"] and lower["relative_l2"] < 0.1 for lower in row["lower"].values())
    text = (tmp_path / "published.md").read_text()
    assert text == page(document)
    assert f"| {' | '.join(cells(row))} |" in text
    monkeypatch.setattr(published, "alone", lambda *args: pytest.fail("what is known is not measured again"))
    assert published.main() == 0
    assert json.loads((tmp_path / "published.json").read_text())["rows"] == [row]


def test_what_has_no_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "smallest", lambda model: (registry.variant(model, "tiny"), 10**15))
    monkeypatch.setattr(sys, "argv", ["published", "--out", str(tmp_path), "--models", "clip"])
    assert published.main() == 0
    assert "refused: the disk has no room for 3725290 GiB" in (tmp_path / "published.md").read_text()
