"""Samples from the zoo and from folders, hostile ones included."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calibration.samples import folder_samples, zoo_samples
from graphs.errors import UserError


def folder(place: Path, rows: list[Any]) -> Path:
    Image.effect_noise((20, 10), 50).convert("RGB").save(place / "a.png")
    (place / "list.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return place


def test_the_zoos_samples_are_the_seeds() -> None:
    first = list(islice(zoo_samples(14, seed=3), 14))
    again = list(zoo_samples(14, seed=3))
    assert [s.question for s in first] == [s.question for s in again]
    assert len({s.task for s in first}) == 7
    assert [s.answer for s in first] != [s.answer for s in zoo_samples(14, seed=4)]


def test_a_folder(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "question": "What?", "answer": "noise"}, "", {"image": "a.png", "question": "Why?"}]
    found = list(folder_samples(folder(tmp_path, rows)))
    assert [(s.image.size, s.question, s.answer) for s in found] == [
        ((20, 10), "What?", "noise"),
        ((20, 10), "Why?", None),
    ]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], r"list\.jsonl:1: not valid JSON"),
        ([{"image": "a.png"}], r"list\.jsonl:1: each line"),
        ([{"image": "../a.png", "question": "?"}], "outside"),
        ([{"image": "b.png", "question": "?"}], "no such file"),
    ],
)
def test_lines_at_fault_are_named(rows: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        list(folder_samples(folder(tmp_path, rows)))


def test_a_folder_without_a_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold one \.jsonl"):
        list(folder_samples(tmp_path))
