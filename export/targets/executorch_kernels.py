"""Which kernels XNNPACK runs for the layers of a lowered method, read from the bytes that its runtime will read.

The names are XNNPACK's: qs8 activations are int8 with constant scales, qd8 with a scale a row that is found when it
runs; qc8w and qc4w weights have a scale a channel, qb4w one a block.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

BACKEND = "XnnpackBackend"
#: layers with weights: the type of the node and what it is in a kernel's name
LAYERS = {"XNNFullyConnected": "linear", "XNNConv2d": "conv", "XNNDepthwiseConv2d": "depthwise_conv"}
ACTIVATIONS = {"xnn_datatype_fp32": "f32", "xnn_datatype_qint8": "qs8", "xnn_datatype_qdint8": "qd8_f32"}
WEIGHTS = {
    "xnn_datatype_fp32": "",
    "xnn_datatype_qcint8": "_qc8w",
    "xnn_datatype_qcint4": "_qc4w",
    "xnn_datatype_qbint4": "_qb4w",
}


def kernels(graph_module: Any) -> dict[str, int]:
    """How many layers of a method's lowered graph XNNPACK runs, by kind and kernel: `{"linear qd8_f32_qb4w": 28}`."""
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    lowered = [module for _, module, _ in get_lowered_submodules(graph_module)]
    graphs = read([module.processed_bytes for module in lowered if module.backend_id == BACKEND])
    counts: Counter[str] = Counter()
    for graph in graphs:
        types = datatypes(graph)
        for node in graph["xnodes"]:
            if node["xnode_union_type"] in LAYERS:
                layer = node["xnode_union"]
                kernel = ACTIVATIONS[types[layer["input1_id"]]] + WEIGHTS[types[layer["filter_id"]]]
                counts[f"{LAYERS[node['xnode_union_type']]} {kernel}"] += 1
    return dict(sorted(counts.items()))


def datatypes(graph: dict[str, Any]) -> dict[int, str]:
    """The datatype of every value by its number."""
    values = [value["xvalue_union"] for value in graph["xvalues"]]
    plain = [value.get("tensor_value", value) for value in values]
    return {value["id_out"]: value["datatype"] for value in plain}


def read(delegates: list[bytes]) -> list[dict[str, Any]]:
    """XNNPACK's graphs out of the bytes of its delegates, by the schema and the compiler that ExecuTorch ships."""
    from importlib.resources import files

    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _run_flatc

    schema = files("executorch.backends.xnnpack.serialization") / "schema.fbs"
    with TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "schema.fbs").write_bytes(schema.read_bytes())
        paths = []
        for number, data in enumerate(delegates):
            header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
            paths.append(directory / f"{number}.bin")
            paths[-1].write_bytes(data[header.flatbuffer_offset :][: header.flatbuffer_size])
        if paths:
            arguments = ["--json", "--defaults-json", "--strict-json", "-o", name, str(directory / "schema.fbs"), "--"]
            _run_flatc([*arguments, *map(str, paths)])
        texts = [path.with_suffix(".json").read_text() for path in paths]
    return [json.loads(re.sub(r"(: )-?inf\b", r"\1null", text)) for text in texts]  # JSON has no infinite bounds
