from collections import Counter, defaultdict

import numpy as np
import pytest

from zoo import digits
from zoo.questions import TASKS
from zoo.scenes import WORDS, Scene, samples, scene


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene("train", 3, index) for index in range(600)]


def test_a_scene_is_a_function_of_split_seed_and_index() -> None:
    first, again = scene("train", 5, 17), scene("train", 5, 17)
    assert np.array_equal(first.image, again.image)
    assert (first.questions, first.marks) == (again.questions, again.marks)
    for other in (scene("heldout", 5, 17), scene("train", 6, 17), scene("train", 5, 18)):
        assert not np.array_equal(first.image, other.image)


def test_samples_repeat_and_take_the_tasks_in_turn() -> None:
    first, again = list(samples("heldout", 28, 2)), list(samples("heldout", 28, 2))
    assert [sample.task for sample in first] == list(TASKS) * 4
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.image, two.image)
        assert (one.question, one.answer) == (two.question, two.answer)
        assert one.image.size == (96, 96)
        assert one.image.mode == "RGB"


def test_digits_of_train_and_heldout_are_disjoint_and_complete() -> None:
    train, heldout = set(digits.indices("train").tolist()), set(digits.indices("heldout").tolist())
    assert not train & heldout
    assert len(train | heldout) == 1797
    assert len(heldout) == 359
    for split in ("train", "heldout"):
        images, values = digits.load(split)
        assert images.shape == (len(digits.indices(split)), 8, 8)
        assert set(values.tolist()) == set(range(10))
    # No image of one split is also in the other under another index.
    assert not {i.tobytes() for i in digits.load("train")[0]} & {i.tobytes() for i in digits.load("heldout")[0]}


def test_answers_are_balanced(scenes: list[Scene]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for made in scenes:
        for task, _, answer in made.questions:
            answers[task][answer] += 1
    limits = {"color": 0.25, "shape": 0.3, "count": 0.4, "position": 0.2, "digits": 0.1, "words": 0.08, "caption": 0.08}
    for task, limit in limits.items():
        most, total = answers[task].most_common(1)[0][1], answers[task].total()
        assert total > 100
        assert most / total < limit, (task, answers[task].most_common(3))
    assert set(answers["words"]) <= set(WORDS)
    assert len(answers["words"]) > 50


def test_the_picture_decides_the_answer(scenes: list[Scene]) -> None:
    by_question: dict[str, set[str]] = defaultdict(set)
    for made in scenes:
        for _, question, answer in made.questions:
            by_question[question].add(answer)
    assert len(by_question["What color is the star?"]) == 8
    assert len(by_question["What shape is the red object?"]) == 6
    assert len(by_question["How many objects are there?"]) == 5


def test_marks_lie_on_what_is_drawn(scenes: list[Scene]) -> None:
    for made in scenes[:200]:
        pixels = np.asarray(made.image).astype(int)
        for mark in made.marks:
            left, top, right, bottom = (round(edge) for edge in mark.box)
            assert -1 <= left < right <= 97
            assert -1 <= top < bottom <= 97
            inside = pixels[max(top, 0) : bottom, max(left, 0) : right].reshape(-1, 3)
            assert np.ptp(inside, axis=0).max() > 40, mark  # something stands out against the ground


def test_one_question_has_one_answer_in_a_scene(scenes: list[Scene]) -> None:
    for made in scenes:
        asked = [question for _, question, _ in made.questions]
        assert len(asked) == len(set(asked))
