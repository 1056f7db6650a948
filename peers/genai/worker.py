"""The decoder under onnxruntime-genai: its generator, its cache, tokens given to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from peers import load as what
from peers.load import Array


class GenAI:
    """One generator; what was read after the prompt is rewound before it is read again."""

    def __init__(self, directory: Path) -> None:
        config = og.Config(str(directory))
        threads = {"intra_op_num_threads": what.THREADS}
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {str(threads).replace(chr(39), chr(34))}}}}}}}')
        self.model = og.Model(config)
        self.version = f"onnxruntime-genai {og.__version__}"
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=what.CONTEXT, do_sample=False)
        self.generator = og.Generator(self.model, parameters)

    def read(self, ids: list[int], start: int) -> None:
        if self.generator.token_count() > start:
            self.generator.rewind_to(start)
        self.generator.append_tokens(np.array([ids], np.int32))

    def logits(self) -> Array:
        found: Array = np.asarray(self.generator.get_logits()).reshape(-1)
        return found

    def prefill(self) -> Array:
        self.read(what.prompt_ids(), 0)
        return self.logits()

    def decode(self) -> Array:
        for number, token in enumerate(what.next_ids()):
            self.read([token], what.PREFILL + number)
        return self.logits()


def load(directory: Path) -> GenAI:
    """The contender over an artefact's directory."""
    return GenAI(directory)
