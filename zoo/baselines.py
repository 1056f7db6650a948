"""Scores of not looking: chance, the most frequent answer, and the best answer to the question's words alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from zoo.scenes import Sample, scene

TRAIN_SCENES = 8000


@dataclass(frozen=True)
class Baselines:
    """Counts of the training split's answers, by task and by question."""

    by_task: dict[str, Counter[str]]
    by_question: dict[str, Counter[str]]

    @classmethod
    def count(cls, scenes: int = TRAIN_SCENES, seed: int = 0) -> Baselines:
        """Counts over all questions of that many training scenes."""
        by_task: dict[str, Counter[str]] = defaultdict(Counter)
        by_question: dict[str, Counter[str]] = defaultdict(Counter)
        for index in range(scenes):
            for task, question, answer in scene("train", seed, index).questions:
                by_task[task][answer] += 1
                by_question[question][answer] += 1
        return cls(dict(by_task), dict(by_question))

    def chance(self, task: str) -> float:
        """Expected exact match of a uniform guess among all answers that the task had in training."""
        return 1 / len(self.by_task[task])

    def frequent(self, sample: Sample) -> str:
        """The task's most frequent training answer."""
        return self.by_task[sample.task].most_common(1)[0][0]

    def text_only(self, sample: Sample) -> str:
        """The most frequent training answer to exactly this question; the task's, where the question is new."""
        answers = self.by_question.get(sample.question)
        return answers.most_common(1)[0][0] if answers else self.frequent(sample)


def share(right: Iterable[bool]) -> float:
    """The share that is right, 0..1."""
    values: Sequence[bool] = list(right)
    return sum(values) / len(values)
