"""An ONNX file into a TensorRT network whose weights stay on disk, however often the builder looks at them."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphs.errors import GateError

#: seconds between two times that pages of weights are given back
PERIOD = 0.25


@contextmanager
def parsed(trt: Any, network: Any, logger: Any, title: str, path: Path) -> Iterator[None]:
    """While this lasts `network` holds the graph of `path`; its weights are those of `<path>.data`, mapped.

    The parser's own mapping stays resident once it was read. Pages of this one go again and again: the builder copies
    what it reads, and what it reads a second time comes from the system's cache.
    Raises GateError naming the node that the library called `title` refuses.
    """
    parser = trt.OnnxParser(network, logger)
    with mapped(path.with_name(f"{path.name}.data")) as weights:
        graph = path.read_bytes()
        known = parser.load_model_proto(graph, str(path))
        known = known and all(parser.load_initializer(name, *place) for name, place in external(graph, weights))
        if not (known and parser.parse_model_proto()):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            told = "; ".join(f"node '{e.node_name()}' ({e.node_operator()}): {e.desc()}" for e in errors)
            raise GateError(f"{title} cannot parse {path.name}: {told or 'no reason given'}")
        yield
        del parser  # before what it reads


@contextmanager
def mapped(path: Path) -> Iterator[np.ndarray]:
    """The bytes of a file, whose pages are given back as time passes; none of a file that is not there."""
    if not path.exists() or not path.stat().st_size:
        yield np.empty(0, np.uint8)
        return
    done = threading.Event()
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def give_back() -> None:
        while not done.wait(PERIOD):
            pages.madvise(mmap.MADV_DONTNEED)

    thread = threading.Thread(target=give_back, daemon=True)
    thread.start()
    try:
        yield np.frombuffer(pages, np.uint8)
    finally:
        done.set()
        thread.join()


def external(graph: bytes, weights: np.ndarray) -> Iterator[tuple[str, tuple[int, int]]]:
    """The initializers of an ONNX file that lie in `weights`: name, and address and size in bytes."""
    for tensor in onnx.load_model_from_string(graph).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            offset, size = int(where.get("offset", 0)), int(where["length"])
            yield tensor.name, (weights[offset : offset + size].ctypes.data, size)
