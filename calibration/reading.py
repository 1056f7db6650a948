"""Image-text samples, read one at a time: one that cannot be read is skipped, counted and named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from PIL import Image

from graphs.errors import UserError
from graphs.files import shown

#: fewer good samples than this are too few, unless fewer were asked for
FEWEST = 8
#: unreadable samples that are named, and how many of them make further reading pointless
NAMED = 10
MOST_SKIPPED = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A picture, a question about it, and the right answer where it is known; without a picture, text alone."""

    image: Image.Image | None
    question: str
    answer: str | None = None
    task: str = ""

    @property
    def images(self) -> list[Image.Image]:
        """The picture, or none."""
        return [] if self.image is None else [self.image]


Reader = Callable[[], Sample]  # reads one sample, or raises UserError with the reason and the place


def given(sample: Sample) -> Sample:
    """A reader of what is at hand."""
    return sample


@dataclass
class Samples:
    """Up to `count` good samples of `readers`; iterate once. `data` is what the user named, `seed` drew the order."""

    data: str
    readers: Iterator[Reader]
    count: int
    seed: int = 0
    skipped: int = 0
    skipped_names: list[str] = field(default_factory=list)  # the first ten, each with its reason

    @classmethod
    def of(cls, samples: Iterable[Sample], data: str = "given") -> Samples:
        """Samples at hand."""
        kept = list(samples)
        return cls(data, (partial(given, sample) for sample in kept), len(kept))

    def __iter__(self) -> Iterator[Sample]:
        return self.prepared(given)

    def prepared(self, prepare: Callable[[Sample], T]) -> Iterator[T]:
        """What `prepare` makes of each good sample; one that it raises UserError for is skipped like an unreadable one.

        Raises UserError at the end where there were too few.
        """
        good = 0
        while good < self.count and self.skipped < MOST_SKIPPED:
            reader = next(self.readers, None)
            if reader is None:
                break
            try:
                item = prepare(reader())
            except UserError as error:
                self.skip(str(error))
                continue
            good += 1
            yield item
        fewest = min(self.count, FEWEST)
        if good < fewest:
            names = f", the first {self.skipped_names[0]}" if self.skipped_names else ""
            raise UserError(
                f"calibration data '{shown(self.data)}' has {good} good samples, at least {fewest} are needed; "
                f"{self.skipped} were unreadable{names}"
            )

    def skip(self, why: str) -> None:
        """Count a sample that is left out, and name it while the list is short."""
        self.skipped += 1
        if len(self.skipped_names) < NAMED:
            self.skipped_names.append(shown(why, 300))
