"""Samples from the zoo, from folders and from Hugging Face data sets, hostile ones included."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from calibration.samples import open_samples, zoo_samples
from graphs.errors import UserError

PICTURE = Image.effect_noise((20, 10), 50).convert("RGB")


def folder(place: Path, rows: list[Any]) -> Path:
    PICTURE.save(place / "a.png")
    (place / "list.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return place


def test_the_zoos_samples_are_the_seeds() -> None:
    first = list(islice(zoo_samples(14, seed=3), 14))
    again = list(zoo_samples(14, seed=3))
    assert [s.question for s in first] == [s.question for s in again]
    assert len({s.task for s in first}) == 7
    assert [s.answer for s in first] != [s.answer for s in zoo_samples(14, seed=4)]


def test_the_zoo_calibrates_on_its_training_split() -> None:
    found = list(open_samples("zoo", 9, seed=5))
    assert [(s.question, s.answer) for s in found] == [
        (s.question, s.answer) for s in zoo_samples(9, seed=5, split="train")
    ]


def test_a_folder(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "question": "What?", "answer": "noise"}, "", {"image": None, "question": "Why?"}]
    found = sorted(open_samples(str(folder(tmp_path, rows)), 2), key=lambda sample: sample.question)
    assert [(len(s.images), s.question, s.answer) for s in found] == [(1, "What?", "noise"), (0, "Why?", None)]
    assert found[0].images[0].size == (20, 10)


def test_a_folders_order_is_the_seeds_and_nothing_more_is_read(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.png", "question": str(n)} for n in range(40)]
    for n in range(40):
        PICTURE.save(folder(tmp_path, rows) / f"{n}.png")

    def questions(seed: int) -> list[str]:
        return [sample.question for sample in open_samples(str(tmp_path), 12, seed)]

    assert questions(0) == questions(0) != questions(1)
    assert len(set(questions(0))) == 12
    used = questions(0)
    for n in range(40):
        if str(n) not in used:
            (tmp_path / f"{n}.png").unlink()
    assert questions(0) == used


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", r"list\.jsonl:\d+: not valid JSON"),
        ("[" * 100_000, r"list\.jsonl:\d+: not valid JSON"),
        ('{"question": "\\ud800' + "x" * (1 << 20) + '"}', "longer than"),
        ({"image": "a.png"}, r"list\.jsonl:\d+: each line"),
        ({"image": 5, "question": "?"}, '"image" is not a string'),
        ({"image": "a.png", "question": "?", "answer": ["x"]}, '"answer" is not a string'),
        ({"image": "../a.png", "question": "?"}, "outside"),
        ({"image": "b.png", "question": "?"}, "no such file"),
        ({"image": "bad.png", "question": "?"}, "a corrupt image|not an image"),
    ],
)
def test_unreadable_samples_are_skipped_and_named(row: Any, words: str, tmp_path: Path) -> None:
    good = [{"image": "a.png", "question": str(n)} for n in range(8)]
    samples = open_samples(str(folder(tmp_path, [*good[:3], row, *good[3:]])), 9)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert sorted(sample.question for sample in samples) == [str(n) for n in range(8)]
    assert samples.skipped == len(samples.skipped_names) == 1
    with pytest.raises(UserError, match=words):
        raise UserError(samples.skipped_names[0])
    assert samples.skipped_names[0].startswith("list.jsonl:4: ")


def test_too_few_are_refused_and_ten_are_named(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "question": "?"}] * 7 + ["{"] * 15
    samples = open_samples(str(folder(tmp_path, rows)), 64)
    with pytest.raises(UserError, match=r"has 7 good samples, at least 8 are needed; 15 were unreadable, the first"):
        list(samples)
    assert (samples.skipped, len(samples.skipped_names)) == (15, 10)
    assert len(list(open_samples(str(tmp_path), 7))) == 7


def test_places_without_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold one \.jsonl"):
        open_samples(str(tmp_path))
    with pytest.raises(UserError, match=r"is no folder: name calibration data as zoo"):
        open_samples(str(tmp_path / "none"))
    with pytest.raises(UserError, match="0 samples"):
        open_samples("zoo", 0)


class Stream:
    """As `datasets.IterableDataset`: shuffled by a seed, iterated."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def shuffle(self, seed: int, buffer_size: int) -> Stream:
        assert buffer_size > 0
        return Stream(self.rows[seed:] + self.rows[:seed])

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield row


def publish(monkeypatch: pytest.MonkeyPatch, rows: list[Any]) -> list[tuple[str, str, bool]]:
    """A module `datasets` that knows one data set; the arguments it is asked with."""
    asked: list[tuple[str, str, bool]] = []

    def load_dataset(name: str, split: str, streaming: bool) -> Stream:
        asked.append((name, split, streaming))
        if name != "org/pictures":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return Stream(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_hugging_face_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    rows: list[Any] = [{"image": PICTURE.convert("L"), "query": f"q{n}", "answers": [f"a{n}", "b"]} for n in range(8)]
    rows[2]["image"] = {"bytes": file.getvalue(), "path": None}
    rows.insert(4, {"image": None, "query": "?", "answers": []})
    rows.insert(5, {"image": {"bytes": b"GIF89a?"}, "query": "?", "answers": []})
    rows.insert(6, {"image": PICTURE, "query": None, "answers": []})
    asked = publish(monkeypatch, rows)
    samples = open_samples("hf:org/pictures:validation", 8, seed=1)
    found = list(samples)
    assert asked == [("org/pictures", "validation", True)]
    assert [s.question for s in found] == ["q1", "q2", "q3", "q4", "q5", "q6", "q7", "q0"]
    assert [s.answer for s in found][:2] == ["a1", "a2"]
    assert {(s.images[0].mode, s.images[0].size) for s in found} == {("RGB", (20, 10))}
    assert samples.skipped == 3
    for name, words in zip(samples.skipped_names, ("no picture", "a corrupt image", "no question"), strict=True):
        assert name.startswith("hf:org/pictures row ")
        assert words in name


def test_a_stream_that_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [{"img": PICTURE, "question": "?"}] * 9 + [ConnectionError("gone")]
    publish(monkeypatch, rows)
    samples = open_samples("hf:org/pictures", 20)
    assert len(list(samples)) == 9
    assert samples.skipped_names == ["hf:org/pictures row 10: gone"]


def test_data_sets_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, [{"audio": 1, "question": "?"}])
    with pytest.raises(UserError, match=r"no image among its columns audio, question; it must be named one of image"):
        open_samples("hf:org/pictures")
    with pytest.raises(UserError, match=r"hf:org/none: cannot be opened: Dataset 'org/none' doesn't exist"):
        open_samples("hf:org/none")
    publish(monkeypatch, [])
    with pytest.raises(UserError, match=r"its split 'train' is empty"):
        open_samples("hf:org/pictures")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_samples("hf:org/pictures")
