"""llama.cpp's multimodal library alone; of the language model it is given no weights."""

from __future__ import annotations

from pathlib import Path

from peers.llama_cpp.pictures import Pictures
from peers.llama_cpp.text import Text, version
from peers.load import Array


class Tower:
    """The tower and its projector."""

    def __init__(self, text: Path, vision: Path) -> None:
        self.text = Text(text / "text.gguf", vocabulary_only=True)
        self.pictures = Pictures(vision / "vision.gguf", self.text)
        self.version = version()

    def vision(self) -> Array:
        return self.pictures.read()


def load(text: Path, vision: Path) -> Tower:
    """The contender over the language model's artefact and a tower's."""
    return Tower(text, vision)
