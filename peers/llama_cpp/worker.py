"""llama.cpp: text and pictures, as the tools of its command line run them."""

from __future__ import annotations

from pathlib import Path

from peers import load as what
from peers.llama_cpp.pictures import Pictures
from peers.llama_cpp.text import Text, version
from peers.load import Array


class LlamaCpp:
    """Text and pictures."""

    def __init__(self, text: Path, vision: Path) -> None:
        self.text = Text(text / "text.gguf")
        self.pictures = Pictures(vision / "vision.gguf", self.text)
        self.version = version()

    def prefill(self) -> Array:
        self.text.rewind(0)
        self.text.read(what.prompt_ids())
        return self.text.logits()

    def decode(self) -> Array:
        self.text.rewind(what.PREFILL)
        for token in what.next_ids():
            self.text.read([token])
            logits = self.text.logits()
        return logits

    def vision(self) -> Array:
        return self.pictures.read()

    def ttft(self) -> Array:
        self.text.rewind(0)
        self.pictures.into(self.text)
        self.text.read(what.question_ids())
        return self.text.logits()


def load(text: Path, vision: Path) -> LlamaCpp:
    """The contender over its two artefacts."""
    return LlamaCpp(text, vision)
