"""The checkpoint that everyone starts from, read by itself: peers are fed without any code of ours in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from peers.load import Array

#: what a name of the language model begins with; the tower and the projector lie under the first prefix, too
TEXT = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")


class Checkpoint:
    """Tensors by their published names, each read on demand from a file that is closed again: none stays resident."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self.files: dict[str, str] = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, "numpy") as shard:
                self.files |= dict.fromkeys(shard.keys(), path.name)

    def __getitem__(self, name: str) -> Array:
        with safe_open(self.directory / self.files[name], "numpy") as shard:
            return shard.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.directory / self.files[name], "numpy") as shard:
            return tuple(shard.get_slice(name).get_shape())

    def text(self) -> Iterator[str]:
        """The names of the language model's tensors, which are a plain LLaMA's."""
        return (name for name in self.files if name.startswith(TEXT))


def made_up(size: int) -> list[str]:
    """Words for as many tokens, where a converter wants a vocabulary and random weights have none."""
    special = ["<unk>", "<s>", "</s>"]
    return [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *(f"w{n}" for n in range(size))][:size]
