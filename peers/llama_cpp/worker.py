"""llama.cpp through the functions of its own libraries: text and pictures as its command line's tools run them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd

from peers import load as what
from peers.load import Array

SIDE = 336


class Text:
    """A model, its context, and the tokens that stand in the cache; no context where only the vocabulary is read."""

    def __init__(self, path: Path, vocabulary_only: bool = False) -> None:
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        loading.vocab_only = vocabulary_only
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), loading)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path.name}")
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


class Pictures:
    """The multimodal library over a tower's file."""

    def __init__(self, path: Path, text: Text) -> None:
        options = mtmd.mtmd_context_params_default()
        options.use_gpu, options.print_timings, options.warmup = False, False, False
        options.n_threads = what.THREADS
        self.text = text
        self.width = llama_cpp.llama_model_n_embd(text.model)
        self.context = mtmd.mtmd_init_from_file(bytes(path), text.model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot load {path.name}")
        pixels = np.ascontiguousarray(what.picture(SIDE))
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        self.bitmap = mtmd.mtmd_bitmap_init(SIDE, SIDE, data)

    def encode(self) -> tuple[ctypes.c_void_p, object, Array]:
        """The picture prepared and encoded: its chunks, the picture's own among them, and embeddings [M, D]."""
        chunks = mtmd.mtmd_input_chunks_init()
        marker = mtmd.mtmd_default_marker()
        prompt = mtmd.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(self.bitmap)
        if mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(prompt), bitmaps, 1):
            raise SystemExit("mtmd_tokenize failed")
        found = [mtmd.mtmd_input_chunks_get(chunks, n) for n in range(mtmd.mtmd_input_chunks_size(chunks))]
        chunk = next(c for c in found if mtmd.mtmd_input_chunk_get_type(c) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)
        if mtmd.mtmd_encode_chunk(self.context, chunk):
            raise SystemExit("mtmd_encode_chunk failed")
        shape = mtmd.mtmd_input_chunk_get_n_tokens(chunk), self.width
        return chunks, chunk, np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.context), shape)

    def read(self) -> Array:
        """The embeddings alone."""
        chunks, _, embeds = self.encode()
        copy: Array = embeds.copy()
        mtmd.mtmd_input_chunks_free(chunks)
        return copy

    def into(self, text: Text) -> None:
        """Encode, and read the embeddings into an empty cache."""
        chunks, chunk, embeds = self.encode()
        after = llama_cpp.llama_pos(0)
        data = embeds.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        callback = mtmd.mtmd_helper_post_decode_callback(0)
        if mtmd.mtmd_helper_decode_image_chunk(
            self.context, text.context, chunk, data, 0, 0, what.CONTEXT, ctypes.byref(after), callback, None
        ):
            raise SystemExit("mtmd_helper_decode_image_chunk failed")
        mtmd.mtmd_input_chunks_free(chunks)


class LlamaCpp:
    """Text and pictures."""

    def __init__(self, text: Path, vision: Path) -> None:
        self.text = Text(text / "text.gguf")
        self.pictures = Pictures(vision / "vision.gguf", self.text)
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

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
