"""A bundle of ours, called as a deployer's loop would call it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from peers import load as what
from peers.executorch.threads import bound
from peers.load import Array
from runtimes.base import load_runtime
from runtimes.manifest import Bundle


class Ours:
    """Loaded with as many threads as everyone has."""

    def __init__(self, directory: Path) -> None:
        bundle = Bundle.open(directory / "bundle")
        if bundle.target == "executorch":
            bound()
        details = {**bundle.artifact.details, "threads": what.THREADS}
        self.runtime = load_runtime(bundle.target, replace(bundle.artifact, details=details))
        self.version = self.runtime.version
        pixels = what.picture(bundle.manifest["prompt"]["image_size"])
        self.pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])

    def embed(self, ids: list[int]) -> Array:
        return self.runtime.call("token_embedding", [np.array([ids], np.int64)])[0]

    def read(self, embeds: Array, start: int) -> Array:
        """The logits [V] after embeddings [1, S, D] that stand from `start` on."""
        positions = np.arange(start, start + embeds.shape[1])
        logits: Array = self.runtime.call("text_decoder", [embeds, positions])[0][0, -1]
        return logits

    def prefill(self) -> Array:
        return self.read(self.embed(what.prompt_ids()), 0)

    def decode(self) -> Array:
        logits = np.empty(0)
        for number, token in enumerate(what.next_ids()):
            logits = self.read(self.embed([token]), what.PREFILL + number)
        return logits

    def vision(self) -> Array:
        return self.runtime.call("vision_encoder", [self.pixels])[0]

    def ttft(self) -> Array:
        return self.read(np.concatenate([self.vision(), self.embed(what.question_ids())], 1), 0)


def load(directory: Path) -> Ours:
    """The contender over an artefact's directory."""
    return Ours(directory)
