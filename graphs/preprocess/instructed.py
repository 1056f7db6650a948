"""Pictures for encoders that read the question too, by a vocabulary of their own, as InstructBLIP's Q-Former does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from graphs.errors import UserError
from graphs.preprocess.image import ImageProcessor
from graphs.preprocess.picture import Picture, Processor
from graphs.preprocess.tokenizer import Encloser, load_tokenizer


@dataclass(frozen=True)
class InstructedProcessor(ImageProcessor):
    """As `ImageProcessor`; `vocabulary`: the directory, in a checkpoint, of the second tokenizer; `length`: the most
    ids that the encoder reads."""

    vocabulary: str = "qformer_tokenizer"
    length: int = 512

    def picture(self, image: Image.Image) -> Picture:
        """Pixels, and the instruction [1, 1] of a picture about which nothing is asked: the id 0, which pads."""
        return Picture((self(image), np.zeros((1, 1), np.int64)))

    def beside(self, directory: Path) -> Processor:
        """With the second tokenizer. Raises UserError where there is none."""
        tokenizer = load_tokenizer(directory / self.vocabulary)
        if tokenizer is None:
            raise UserError(f"{directory} has no {self.vocabulary}, by which its picture encoder reads the question")
        return Instructing(self, tokenizer)


class Instructing(Processor):
    """An `InstructedProcessor` with its tokenizer."""

    def __init__(self, processor: InstructedProcessor, tokenizer: Encloser) -> None:
        self.processor, self.tokenizer = processor, tokenizer

    def picture(self, image: Image.Image) -> Picture:
        return self.processor.picture(image)

    def asked(self, picture: Picture, words: str) -> Picture:
        """The picture with the ids [1, S] of `words`, between the special tokens of their tokenizer."""
        ids = np.array([self.tokenizer.enclose(words, self.processor.length)], np.int64)
        return replace(picture, arrays=(picture.arrays[0], ids))


PROCESSOR = InstructedProcessor
