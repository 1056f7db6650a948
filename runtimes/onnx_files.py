"""ONNX files that nobody vouches for: damage and data outside their directory are found before a runtime loads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from graphs.errors import UserError
from graphs.files import contained, reason, shown

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto


def checked_model(directory: Path, name: str) -> Path:
    """The path of the ONNX file `name` in `directory`, once every tensor it keeps elsewhere is found in that directory.

    Raises: UserError where the file is missing, is not ONNX, or names external data that is missing, too short or
    outside the directory.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = contained(directory, name)
    try:
        model: ModelProto = onnx.load_model(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise UserError(f"{path}: damaged, or not an ONNX file: {reason(error)}") from error
    if not model.graph.node:
        raise UserError(f"{path}: damaged, or not an ONNX file: its graph is empty")
    for tensor in tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            check_external(path, tensor)
    return path


def tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor stored in a graph: initializers and attributes, those of inner graphs too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (attribute.g, *attribute.graphs):
                yield from tensors(inner)


def check_external(path: Path, tensor: TensorProto) -> None:
    """Raise UserError unless the bytes that `tensor` refers to lie in a file beside `path`."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    data = contained(path.parent, where.get("location", ""))
    try:
        offset, length = int(where.get("offset", "0")), int(where.get("length", "0"))
    except ValueError as error:
        raise UserError(f"{path}: tensor '{shown(tensor.name)}' has an external offset that is no number") from error
    size = data.stat().st_size
    if offset < 0 or length < 0 or offset + length > size:
        where_it_is = f"tensor '{shown(tensor.name)}' is at {offset} to {offset + length}"
        raise UserError(f"{data}: {size} bytes, but {where_it_is}: the file is cut short or damaged")
