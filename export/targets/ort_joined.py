"""Layers that read the same activations as one `MatMulNBits`: queries, keys and values; gate and up.

Activations are rounded to integers once instead of each time, and threads meet once. Rows of weights stay as they are,
so every number does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

from export.targets.onnx_qdq import Spelling
from export.targets.onnx_quant_ops import attribute
from export.targets.onnx_weights import is_weight, lazy, plain
from export.targets.ort_patterns import MICROSOFT

#: a weight is in memory whole when it is written: no larger ones are made of smaller ones
MOST_BYTES = 64 << 20


def join_layers(model: ir.Model) -> None:
    """Put one operator for all `MatMulNBits` of one input whose weights are stored alike."""
    alike: defaultdict[tuple[object, ...], list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            settings = tuple(sorted((a.name, a.value) for a in node.attributes.values() if a.name != "N"))
            parts = tuple(value is not None for value in node.inputs)
            alike[node.inputs[0], settings, parts].append(node)
    for nodes in alike.values():
        if len(nodes) > 1 and all(map(is_own, nodes)) and weight_bytes(nodes) <= MOST_BYTES:
            join(model.graph, nodes)
    common.RemoveUnusedNodesPass()(model)
    in_order(model.graph)


def in_order(graph: ir.Graph) -> None:
    """Let weights lie, and be written, in the order in which they are first read: large heads last."""
    read = [value for node in graph for value in node.inputs if value is not None and value.is_initializer()]
    rest = graph.initializers.values()
    weights = list(dict.fromkeys([*read, *rest]))
    graph.initializers.clear()
    for value in weights:
        graph.register_initializer(value)


def is_own(node: ir.Node) -> bool:
    """Whether all parts of a layer are weights that no other reads."""
    return all(is_weight(part) and len(part.uses()) == 1 for part in node.inputs[1:] if part is not None)


def weight_bytes(nodes: Sequence[ir.Node]) -> int:
    """What the packed weights of some layers come to."""
    return sum(attribute(node, "N") * attribute(node, "K") * attribute(node, "bits") // 8 for node in nodes)


def join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """One layer whose outputs are those of `nodes`, one behind the other; attention takes them so, others parts."""
    first, reader = nodes[0], attention_of(nodes)
    if reader is not None:
        nodes = [value.producer() for value in reader.inputs[:3] if value is not None]  # type: ignore[misc]
    spell = Spelling(graph, first)
    parts = [stacked(graph, [node.inputs[index] for node in nodes]) for index in range(1, len(first.inputs))]
    rows = [attribute(node, "N") for node in nodes]
    settings = {a.name: a.value for a in first.attributes.values()} | {"N": sum(rows)}
    whole = spell.op("MatMulNBits", first.inputs[0], *parts, domain=MICROSOFT, **settings)
    whole.type = first.outputs[0].type
    if reader is not None:
        for index, value in enumerate((whole, None, None)):
            reader.replace_input_with(index, value)
    else:
        sizes = spell.constant(rows, ir.DataType.INT64)
        pieces = spell.tape.op_multi_out("Split", [whole, sizes], {"axis": -1}, num_outputs=len(rows))
        for node, piece in zip(nodes, pieces, strict=True):
            piece.type, piece.shape = node.outputs[0].type, node.outputs[0].shape
            ir.convenience.replace_all_uses_with(node.outputs[0], piece)
    graph.insert_before(first, spell.tape.nodes)


def attention_of(nodes: Sequence[ir.Node]) -> ir.Node | None:
    """The attention over a cache whose queries, keys and values the outputs of `nodes` are, and nothing else."""
    uses = [use for node in nodes for use in node.outputs[0].uses()]
    readers = {use.node for use in uses}
    if len(readers) != 1 or sorted(use.idx for use in uses) != [0, 1, 2] or len(nodes) != 3:
        return None
    reader = readers.pop()
    return reader if reader.op_type == "GroupQueryAttention" else None


def stacked(graph: ir.Graph, values: Sequence[ir.Value | None]) -> ir.Value | None:
    """The rows of several weights in one, read when it is written."""
    tensors = [value.const_value for value in values if value is not None]
    late = [tensor for tensor in tensors if isinstance(tensor, ir.LazyTensor)]
    if values[0] is None or not late:
        return None
    shapes = [[size for size in tensor.shape if isinstance(size, int)] for tensor in late]
    reads = [tensor.raw for tensor in late]
    dtype, name = late[0].dtype, f"{values[0].name}.joined"
    rows = [size[0] for size in shapes]
    shape = ir.Shape([sum(rows), *shapes[0][1:]])

    def read() -> Tensor:  # a piece at a time: never more in memory than the whole and one piece
        whole = torch.empty([sum(rows), *shapes[0][1:]], dtype=to_torch_dtype(dtype))
        for part, one in zip(whole.split(rows), reads, strict=True):
            part.copy_(plain(one()))
        return whole

    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    value.const_value = lazy(read, dtype, shape, name)
    graph.register_initializer(value)
    return value
