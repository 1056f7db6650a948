"""ExecuTorch's stock `MultimodalRunner`, the C++ that phone apps embed, asked about pictures: a check, not a runtime.

It takes text and pixels, tokenizes by its own library and samples by itself, so an answer of its shows that a bundle
works in software that knows nothing of vlmx.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphs.errors import UserError
from graphs.preprocess.tokenizer import load_tokenizer
from runtimes.base import Unavailable

PACKAGE = "executorch.extension.llm.runner"
EXTENSION = "_llm_runner"


def bindings() -> ModuleType:
    """The runner's Python bindings. Raises `Unavailable` where the wheel has none.

    The compiled module is loaded by itself, because the package around it imports transformers for conveniences.
    """
    name = f"{PACKAGE}.{EXTENSION}"
    if name not in sys.modules:
        package = importlib.util.find_spec(PACKAGE)
        places = list(package.submodule_search_locations or ()) if package else []
        found = PathFinder.find_spec(EXTENSION, places)
        if found is None or found.origin is None:
            raise Unavailable(f"the installed executorch has no {name}")
        spec = importlib.util.spec_from_file_location(name, found.origin)
        assert spec is not None
        assert spec.loader is not None
        importlib.import_module("executorch.kernels.quantized")  # linked by the stock apps: quantized embeddings
        importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")  # the same: attention over a cache
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


class StockRunner:
    """The runner over a directory with `model.pte` and a byte-level BPE `tokenizer.json`, loaded once."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError where the directory has no tokenizer or the runner refuses it, `Unavailable`."""
        tokenizer = load_tokenizer(directory)
        if tokenizer is None:
            raise UserError(f"{directory} has no tokenizer, and the stock runner takes text")
        self.library: Any = bindings()
        # Multimodal prompts ignore the configuration's num_bos, so the token is written out; so are those that end.
        begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        self.begin = tokenizer.decode(begin, skip_special=False)
        self.ends = {tokenizer.decode([token], skip_special=False) for token in tokenizer.eos_ids}
        try:
            self.runner = self.library.MultimodalRunner(str(directory / "model.pte"), str(directory))
        except RuntimeError as error:
            raise UserError(f"{directory}: the stock runner cannot load it: {error}") from error

    def pieces(self, image: NDArray[np.uint8], before: str, after: str, max_new_tokens: int) -> list[str]:
        """The greedy answer's tokens as text, up to the one that ends it.

        The prompt is the token that begins a text, `before`, the picture [3, H, W] in the size that the model takes,
        then `after`. Raises RuntimeError where the runner fails, as for a prompt beyond its context,
        UnicodeDecodeError where a token is no UTF-8.
        """
        made, _ = self._generate(image, before, after, max_new_tokens)
        end = next((i for i, piece in enumerate(made) if piece in self.ends), len(made))
        return made[:end]

    def prompt_tokens(self, image: NDArray[np.uint8], before: str, after: str) -> int:
        """How many tokens the runner makes of a prompt, the picture's included. Raises as `pieces`."""
        return int(self._generate(image, before, after, 1)[1].num_prompt_tokens)

    def _generate(self, image: NDArray[np.uint8], before: str, after: str, limit: int) -> tuple[list[str], Any]:
        made: list[str] = []
        statistics: list[Any] = []
        inputs = [self.library.make_image_input(torch.from_numpy(image)), self.library.make_text_input(after)]
        if self.begin + before:
            inputs.insert(0, self.library.make_text_input(self.begin + before))
        config = self.library.GenerationConfig(echo=False, max_new_tokens=limit, temperature=0.0)
        self.runner.reset()
        self.runner.generate(inputs, config, made.append, statistics.append)
        return made, statistics[0]


def answer(directory: Path, image: NDArray[np.uint8], before: str, after: str, max_new_tokens: int) -> str:
    """The greedy answer of the stock runner over a bundle; see `StockRunner.pieces`."""
    return "".join(StockRunner(directory).pieces(image, before, after, max_new_tokens))
