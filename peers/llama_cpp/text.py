"""llama.cpp's language model, by the functions of its library."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

from peers import load as what
from peers.load import Array


def version() -> str:
    """Of the package, and what its build uses of the processor."""
    info = llama_cpp.llama_print_system_info().decode().replace(":", "|").split("|")
    used = [part.split("=")[0].strip() for part in info if part.strip().endswith("= 1")]
    return f"llama-cpp-python {llama_cpp.__version__} ({', '.join(used)})"


class Text:
    """A model, its context, and the tokens that stand in the cache; no context where only the vocabulary is read."""

    def __init__(self, path: Path, vocabulary_only: bool = False) -> None:
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.vocab_only = vocabulary_only
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), loading)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path.name}")
        words = ctypes.create_string_buffer(32)
        llama_cpp.llama_model_meta_val_str(self.model, b"llama.embedding_length", words, len(words))
        self.width = int(words.value)
        if vocabulary_only:
            return
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = what.CONTEXT
        options.n_threads = options.n_threads_batch = what.THREADS
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def rewind(self, start: int) -> None:
        llama_cpp.llama_memory_seq_rm(self.memory, 0, start, -1)

    def read(self, ids: list[int]) -> None:
        """Tokens after those in the cache; only the last one's logits are computed."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")

    def logits(self) -> Array:
        found = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(found, (self.vocabulary,)).copy()
