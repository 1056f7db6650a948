from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from zoo.layout import architecture
from zoo.nano import Student
from zoo.packing import COLORS, IGNORED, MASKED, NAMES, Batch, Encoder, drill, mask, pack, thin
from zoo.scenes import Scene, scene
from zoo.tokens import train_tokenizer

PATCH = 8


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer())


@pytest.fixture(scope="module")
def student(encoder: Encoder) -> Student:
    torch.manual_seed(1)
    return Student(architecture(encoder.tokenizer)).eval()


def summed(student: Student, batch: Batch, encoder: Encoder) -> tuple[float, int]:
    """The answers' cross entropy in nats, summed over tokens, and their number."""
    with torch.no_grad():
        *_, image = student.nano.see(batch.pixels)
        states = student.nano.read(image, torch.tensor(encoder.before), batch.ids, batch.positions, batch.segments)
        wanted = batch.targets != IGNORED
        loss = F.cross_entropy(student.nano.logits(states[wanted]), batch.targets[wanted], reduction="sum")
    return loss.item(), int(wanted.sum())


def test_packed_loss_is_that_of_the_questions_one_by_one(student: Student, encoder: Encoder) -> None:
    scenes = [scene("train", 0, index) for index in range(3)]
    packed, tokens = summed(student, pack(scenes, encoder, PATCH), encoder)
    alone = [
        summed(student, pack([replace(s, questions=(question,))], encoder, PATCH), encoder)
        for s in scenes
        for question in s.questions
    ]
    assert tokens == sum(count for _, count in alone)
    assert packed == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)


def test_mask_shows_the_prefix_and_the_question_itself() -> None:
    shown = mask(torch.tensor([[0, 0, 1, 1, -1]]), prefix=2)[0, 0] == 0
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 1],
    ]
    assert shown.int().tolist() == expected
    assert mask(torch.tensor([[0]]), 1).min() == MASKED


def test_targets_are_the_answers_and_their_ends(encoder: Encoder) -> None:
    made = scene("train", 0, 4)
    batch = pack([made], encoder, PATCH)
    for number, (_, question, answer) in enumerate(made.questions):
        here = batch.segments[0] == number
        targets = [t for t in batch.targets[0][here].tolist() if t != IGNORED]
        assert targets == encoder.answer(answer)
        assert batch.ids[0][here].tolist() == encoder.question(question) + encoder.answer(answer)[:-1]
        assert batch.positions[0][here].tolist() == list(range(int(here.sum())))


def test_patch_labels_are_what_the_marks_say(encoder: Encoder) -> None:
    made = scene("train", 0, 9)
    batch = pack([made], encoder, PATCH)
    for mark in made.marks:
        column, row = (int((mark.box[i] + mark.box[i + 2]) / 2 // PATCH) for i in (0, 1))
        label = row * 12 + column
        assert NAMES[batch.names[0, label]] == mark.name
        assert COLORS[batch.colors[0, label]] == mark.color
    assert (batch.names == 0).float().mean() > 0.3


def test_thinning_keeps_reading(encoder: Encoder) -> None:
    def reads(made: Scene) -> bool:
        return any(task in ("digits", "words") for task, _, _ in made.questions)

    for index in range(30):
        whole = scene("train", 0, index)
        thinned = thin(whole, 3, np.random.default_rng(index))
        assert len(thinned.questions) == min(3, len(whole.questions))
        assert set(thinned.questions) <= set(whole.questions)
        assert reads(thinned) == reads(whole)


def test_drilling_asks_more_and_contradicts_nothing() -> None:
    counts = []
    for index in range(60):
        whole = scene("train", 0, index)
        drilled = drill(whole, 8, np.random.default_rng(index)).questions
        answers = {question: answer for _, question, answer in whole.questions}
        assert all(answers.get(question, answer) == answer for _, question, answer in drilled)
        assert len({question for _, question, _ in drilled}) == len(drilled) <= 8
        counts.append(len(drilled))
    assert np.mean(counts) > 6
