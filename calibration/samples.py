"""Samples to measure and calibrate with, by name: the zoo's own, a folder's, or those of a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from calibration.folder import folder_readers
from calibration.hub_data import hub_readers
from calibration.reading import Reader, Sample, Samples, given
from graphs.errors import UserError

__all__ = ["Sample", "Samples", "open_samples", "zoo_samples"]


def zoo_samples(count: int, seed: int = 0, split: Literal["train", "heldout"] = "heldout") -> Iterator[Sample]:
    """The generated questions that zoo/mobilevlm-nano is trained on (`train`) or measured by (`heldout`)."""
    from zoo.scenes import samples

    for sample in samples(split, count, seed):
        yield Sample(sample.image, sample.question, sample.answer, sample.task)


def zoo_readers(seed: int) -> Iterator[Reader]:
    """The zoo's training questions, without end."""
    for sample in zoo_samples(1 << 40, seed, "train"):
        yield partial(given, sample)


def open_samples(text: str, count: int = 64, seed: int = 0) -> Samples:
    """The samples that `text` names: `zoo` (its training split), `hf:NAME` or `hf:NAME:SPLIT`, or a folder.

    The same seed gives the same samples. Raises UserError where there is no such data.
    """
    if count < 1:
        raise UserError(f"{count} samples cannot calibrate anything: ask for 1 or more")
    if text == "zoo":
        return Samples(text, zoo_readers(seed), count, seed)
    if text.startswith("hf:"):
        return Samples(text, hub_readers(text.removeprefix("hf:"), seed), count, seed)
    return Samples(text, folder_readers(Path(text), seed), count, seed)
