"""The .pte of ExecuTorch's own flow, run by the wheel's runtime."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401  # registers kernels, as the import above does
import numpy as np
import torch
from executorch.runtime import Runtime

from peers import load as what
from peers.executorch.threads import bound
from peers.load import Array


class Own:
    """Its one method takes token ids and the position of the first; the cache is the program's own."""

    def __init__(self, directory: Path) -> None:
        bound()
        self.program = Runtime.get().load_program(directory / "model.pte")
        method = self.program.load_method("forward")
        assert method is not None
        self.method = method
        self.version = f"executorch {version('executorch')}"

    def read(self, ids: list[int], start: int) -> Array:
        outputs = self.method.execute([torch.tensor([ids]), torch.tensor([start])])
        logits: Array = outputs[0].numpy().reshape(-1)
        return logits

    def prefill(self) -> Array:
        return self.read(what.prompt_ids(), 0)

    def decode(self) -> Array:
        logits = np.empty(0)
        for number, token in enumerate(what.next_ids()):
            logits = self.read([token], what.PREFILL + number)
        return logits


def load(directory: Path) -> Own:
    """The contender over an artefact's directory."""
    return Own(directory)
