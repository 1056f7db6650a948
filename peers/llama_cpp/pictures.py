"""llama.cpp's multimodal library: a picture to embeddings, and into a language model's cache."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp as mtmd

from peers import load as what
from peers.llama_cpp.text import Text
from peers.load import Array

SIDE = 336


class Pictures:
    """The multimodal library over a tower's file."""

    def __init__(self, path: Path, text: Text) -> None:
        options = mtmd.mtmd_context_params_default()
        options.use_gpu, options.print_timings, options.warmup = False, False, False
        options.n_threads = what.THREADS
        self.width = text.width
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
