"""Pictures of one size whose embeddings stand between tokens that announce them and tokens that end them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from graphs.preprocess.image import ImageProcessor
from graphs.preprocess.picture import Picture


@dataclass(frozen=True)
class FramedProcessor(ImageProcessor):
    """As `ImageProcessor`; the prompt reads a picture as `before`, `count` times `placeholder`, `after`."""

    before: str = ""
    placeholder: str = "<image>"
    count: int = 1
    after: str = ""

    @classmethod
    def of(cls, processor: ImageProcessor, before: str, placeholder: str, count: int, after: str) -> FramedProcessor:
        """What `processor` makes of a picture, read so."""
        fields: dict[str, Any] = {name: getattr(processor, name) for name in ImageProcessor.__dataclass_fields__}
        return cls(**fields, before=before, placeholder=placeholder, count=count, after=after)

    def picture(self, image: Image.Image) -> Picture:
        return Picture((self(image),), self.before + self.placeholder * self.count + self.after)


PROCESSOR = FramedProcessor
